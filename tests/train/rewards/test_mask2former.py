"""Mask2Former as a detector: its files, its pictures and its objects, against transformers' own classes."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import Mask2FormerImageProcessorPil

from ngrpo_train.rewards.mask2former import Detector, objects, read_detector

from .detectors import save_detector


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory, and the model whose files it has."""
    directory = tmp_path_factory.mktemp("detector")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return directory, save_detector(directory, monkeypatch)


def pictures(count, height, width):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height * width))


# --- the network


def test_files_of_the_hub_are_read(saved):
    """Their names are older than those of transformers' classes."""
    directory, model = saved
    names = load_file(directory / "model.safetensors").keys()
    block = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self"
    assert {f"{block}.query.weight", f"{block}.relative_position_index", "criterion.empty_weight"} <= names
    network = read_detector(str(directory), 80).network.eval()
    pixels = pictures(2, 64, 96)
    with torch.no_grad():
        classes, masks = network(pixels)
        expected = model(pixels)
    torch.testing.assert_close(classes, expected.class_queries_logits, rtol=0, atol=1e-4)  # of up to 30
    torch.testing.assert_close(masks, expected.masks_queries_logits, rtol=0, atol=1e-5)
    assert masks.std() > 0.05


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda s: s | {"extra.weight": torch.ones(1)}, "expected only a Mask2Former's weights, found extra.weight"),
        (
            lambda s: {name: value for name, value in s.items() if name != "class_predictor.bias"},
            "expected the weight class_predictor.bias, found none",
        ),
        (
            lambda s: s | {"class_predictor.bias": torch.ones(3)},
            "expected other sizes of its weights, found",
        ),
    ],
    ids=["surplus", "lacks one", "shape"],
)
def test_almost_the_right_file(saved, tmp_path, change, complaint):
    (tmp_path / "config.json").write_text((saved[0] / "config.json").read_text())
    save_file(change(load_file(saved[0] / "model.safetensors")), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not a file for this scorer") as error:
        read_detector(str(tmp_path), 80)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_detector_of_these_classes(saved, tmp_path):
    with pytest.raises(ValueError, match=r"expected a detector of 133 classes, found one of 80$"):
        read_detector(str(saved[0]), 133)
    fields = json.loads((saved[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": "detr"}))
    with pytest.raises(ValueError, match=r"expected model_type \"mask2former\", found 'detr'$"):
        read_detector(str(tmp_path), 80)
    (tmp_path / "config.json").write_text(json.dumps(fields | {"num_queries": "many"}))
    with pytest.raises(ValueError, match=r"config\.json is no configuration of a Mask2Former: "):
        read_detector(str(tmp_path), 80)


# --- pictures


class Recording(torch.nn.Module):
    """A network that keeps the pixels that it gets, and finds nothing."""

    dtype = torch.float32

    def forward(self, pixels):
        self.pixels = pixels
        return torch.zeros(len(pixels), 4, 81), torch.zeros(len(pixels), 4, pixels.shape[2] // 4, pixels.shape[3] // 4)


@pytest.mark.parametrize(
    "size, resized, filled",
    [
        ((96, 144), (64, 96), (64, 96)),  # reduced
        ((32, 32), (64, 64), (64, 64)),  # enlarged
        ((40, 50), (64, 80), (64, 96)),
        ((90, 30), (106, 35), (128, 64)),  # as long as it may be: 35.3
    ],
    ids=str,
)
def test_pictures_are_prepared_as_by_transformers(size, resized, filled):
    detector = Detector(Recording(), edges=(64, 106))
    images = (255 * pictures(1, *size)).to(torch.uint8)
    assert detector.find(images / 255, [0.3]) == [[]]
    assert detector.size_of(*size) == resized
    pixels = detector.network.pixels
    assert pixels.shape == (1, 3, *filled)
    assert not pixels[..., resized[0] :, :].any()
    assert not pixels[..., resized[1] :].any()
    # Its processor stretches pictures to multiples of 32, where Mask2Former fills them up; so it gets the very size.
    processor = Mask2FormerImageProcessorPil(size={"height": resized[0], "width": resized[1]}, size_divisor=0)
    theirs = processor(images[0].permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
    ours = pixels[..., : resized[0], : resized[1]]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.01 / 255 / 0.224)  # PIL rounds to bytes, twice by a half


def test_the_usual_edges():
    detector = Detector(Recording())
    sizes = [detector.size_of(*size) for size in ((1024, 1024), (512, 512), (720, 1280), (512, 768), (2048, 512))]
    assert sizes == [(800, 800), (800, 800), (750, 1333), (800, 1200), (1333, 333)]


# --- objects


def test_objects_are_transformers_own():
    """Scores, classes and masks of its processor, which resizes all masks to 384 x 384, of random logits."""
    generator = torch.Generator().manual_seed(0)
    classes = 4 * torch.randn(2, 20, 11, generator=generator)
    classes[0, 3] = torch.tensor([6.0, 5.7] + [0.0] * 9)  # a query that is two objects
    coarse = 4 * torch.randn(2, 20, 6, 6, generator=generator)
    coarse[:, 5] = -5  # an empty mask
    masks = functional.interpolate(coarse, (96, 96), mode="bicubic")
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        outputs, threshold=0.3, return_binary_maps=True
    )
    for picture, expected in enumerate(theirs):
        found = objects(classes[picture], masks[picture], (384, 384), (384, 384), 0.3)
        info = sorted(expected["segments_info"], key=lambda each: -each["score"])
        assert len(found) == len(info) > 8
        assert [each.label for each in found] == [each["label_id"] for each in info]
        assert [each.score for each in found] == pytest.approx([each["score"] for each in info], abs=2e-6)
        for each, known in zip(found, info, strict=True):
            mask = expected["segmentation"][known["id"]].bool()
            assert torch.equal(each.mask, mask)
            rows, columns = mask.nonzero().unbind(1)
            assert each.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert len({each.label for each in found}) > 3


def test_masks_come_back_to_the_picture():
    """A picture of 40 x 50 that was enlarged to 64 x 80 and filled up to 96, in masks of a quarter of that."""
    logits = torch.full((1, 16, 24), -30.0)
    logits[:, 4:8, 5:15] = 30.0  # rows 16 to 32, columns 20 to 60 of the enlarged picture
    logits[:, :, 20:] = 30.0  # what the picture was filled up with
    classes = torch.tensor([[0.0, 9.0, 0.0]])
    [found] = objects(classes, logits, (64, 80), (40, 50), 0.5)
    assert found.label == 1
    assert 0.98 < found.score < 1  # certain, but for the mask's edge
    # By a scale of 1.6, and as the edges lie between two pixels of the mask, which are 2.5 of the picture's.
    assert found.box == pytest.approx((12.5, 10, 37.5, 20), abs=1.3)
    assert found.mask.shape == (40, 50)
    assert found.mask[12:18, 15:35].all()
    assert not found.mask[:, 40:].any()  # what it was filled up with begins at 50


def test_thresholds_are_strict_and_scores_fall():
    generator = torch.Generator().manual_seed(3)
    classes, masks = 2 * torch.randn(30, 6, generator=generator), 2 * torch.randn(30, 8, 8, generator=generator)
    found = objects(classes, masks, (32, 32), (32, 32), 0.0)
    scores = [each.score for each in found]
    assert scores == sorted(scores, reverse=True)
    assert len(found) == 100  # of 30 queries with 5 classes each
    third = scores[2]
    assert [each.score for each in objects(classes, masks, (32, 32), (32, 32), third)] == scores[:2]
    assert objects(classes, masks, (32, 32), (32, 32), 1.0) == []


def test_pictures_of_a_batch_are_found_one_by_one(saved):
    detector = read_detector(str(saved[0]), 80).eval()
    detector.edges = (64, 106)
    pixels = pictures(3, 48, 60)
    with torch.no_grad():
        together = detector.find(pixels, [0.3, 0.3, 0.5])
        alone = [detector.find(pixels[i : i + 1], [least])[0] for i, least in enumerate((0.3, 0.3, 0.5))]
    assert sum(map(len, together)) > 6
    for ours, single in zip(together, alone, strict=True):
        assert [each.label for each in ours] == [each.label for each in single]
        assert [each.score for each in ours] == pytest.approx([each.score for each in single], abs=1e-4)
        for one, other in zip(ours, single, strict=True):
            assert (one.mask == other.mask).float().mean() > 0.99  # pixels on the edge may fall to either side
