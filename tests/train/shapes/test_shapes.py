"""The shapes world: pictures, splits, scorers, and the shipped pipeline seen through stock diffusers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline

from ngrpo_train.shapes.judge import judge
from ngrpo_train.shapes.pipeline import WORDS, clip_tokenizer, t5_tokenizer
from ngrpo_train.shapes.verifier import score, verify
from ngrpo_train.shapes.world import (
    COLOURS,
    SHAPES,
    SIZES,
    SPLITS,
    Caption,
    captions,
    coverage,
    draw,
    prompts,
    rgb,
)
from ngrpo_train.worlds import pipeline_dir

EVERY = [caption for split in SPLITS for caption in captions(split)]


def quantised(images):
    return (images * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def drawn():
    return quantised(draw(EVERY, torch.Generator().manual_seed(0)))


def test_splits_share_no_combination_and_cover_all():
    assert len(EVERY) == len(set(EVERY)) == sum(SPLITS.values()) == 2 * 6 * 4 * 5
    for split in SPLITS:  # every value of every attribute is met in every split
        values = [{getattr(caption, name) for caption in captions(split)} for name in Caption.__slots__]
        assert [len(v) for v in values] == [2, 6, 4, 6]


def test_prompts_parse_back_and_others_are_refused():
    assert [Caption.parse(str(caption)) for caption in EVERY] == EVERY
    assert prompts("validation")[0] == str(captions("validation")[0])
    for prompt in ("a red circle", "a large red circle on a mauve background", "", "two large red circles"):
        with pytest.raises(ValueError, match="shapes world"):
            Caption.parse(prompt)
    with pytest.raises(ValueError, match="train, validation, test"):
        captions("tset")


@pytest.mark.parametrize("shape, area", [("circle", np.pi * 16**2), ("square", (2 * 0.886 * 16) ** 2)])
def test_outline_covers_the_area_of_geometry(shape, area):
    covered = coverage(shape, torch.tensor([16.0]), torch.tensor([[32.0, 32.0]])).sum().item()
    assert covered == pytest.approx(area, rel=5e-3)


def test_triangle_and_star_against_an_independent_rasteriser():
    """PIL draws the same polygons from their corners, 8 times finer."""
    from PIL import Image, ImageDraw

    fine, radius = 8, 15.0
    for shape, corners, waist in (("triangle", 3, None), ("star", 5, 0.45)):
        reach = 1.3 * radius
        radii = [reach] if waist is None else [reach, waist * reach]
        count = corners * len(radii)
        points = [
            (
                fine * (32 + radii[i % len(radii)] * np.sin(2 * np.pi * i / count)),
                fine * (32 - radii[i % len(radii)] * np.cos(2 * np.pi * i / count)),
            )
            for i in range(count)
        ]
        canvas = Image.new("L", (64 * fine, 64 * fine))
        ImageDraw.Draw(canvas).polygon(points, fill=255)
        expected = np.asarray(canvas, dtype=np.float32).reshape(64, fine, 64, fine).mean((1, 3)) / 255
        got = coverage(shape, torch.tensor([radius]), torch.tensor([[32.0, 32.0]]))[0].numpy()
        assert np.abs(got - expected).mean() < 4e-3, shape


def test_drawing_is_seeded_and_has_the_asked_colours(drawn):
    again = quantised(draw(EVERY, torch.Generator().manual_seed(0)))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, quantised(draw(EVERY, torch.Generator().manual_seed(1))))
    corner = drawn[:, :, 0, 0].float() / 255
    assert torch.allclose(corner, rgb([c.background for c in EVERY]), atol=0.003)
    centre = drawn[:, :, 32, 32].float() / 255
    assert torch.allclose(centre, rgb([c.colour for c in EVERY]), atol=0.003)


def test_verifier_recognises_every_drawn_picture(drawn):
    verdict = verify(drawn, [str(c) for c in EVERY])
    assert verdict.all_right.all()
    assert verdict.score.mean() > 0.9


@pytest.fixture(scope="module")
def own_scores(drawn):
    """What the verifier and the judge give to each picture for its own prompt."""
    texts = [str(caption) for caption in EVERY]
    return score(drawn, texts), judge(drawn, texts)


@pytest.mark.parametrize("attribute", Caption.__slots__)
def test_verifier_and_judge_prefer_the_right_attribute(drawn, own_scores, attribute):
    """Each picture against its own prompt and every prompt with that one attribute wrong."""
    values = {"size": tuple(SIZES), "colour": tuple(COLOURS), "shape": SHAPES, "background": tuple(COLOURS)}[attribute]
    known = set(EVERY)
    wrong = [(i, replace(caption, **{attribute: value})) for i, caption in enumerate(EVERY) for value in values]
    wrong = [(i, caption) for i, caption in wrong if caption in known and caption != EVERY[i]]
    rows, others = [i for i, _ in wrong], [str(caption) for _, caption in wrong]
    verified, judged = (scores[rows] for scores in own_scores)
    margin = verified - score(drawn[rows], others)
    assert margin.min() > 0.05  # the worst pair is of shapes, 0.061
    assert margin.mean() > 0.15, "half of what one of the three parts of the score can make"
    assert (judged > judge(drawn[rows], others)).float().mean() > 0.97


@pytest.mark.parametrize("split, page", [("test", 0.83), ("train", 0.86)])
def test_the_vae_leaves_the_score_that_the_page_tells(split, page):
    """Of one drawing of each prompt; from seed to seed it differs by 0.005."""
    wanted = captions(split)
    with torch.no_grad():
        vae = AutoencoderKL.from_pretrained(pipeline_dir("shapes"), subfolder="vae").eval()
        pictures = draw(wanted, torch.Generator().manual_seed(0))
        restored = vae.decode(vae.encode(2 * pictures - 1).latent_dist.mode()).sample
    got = score(quantised(((restored + 1) / 2).clamp(0, 1)), [str(caption) for caption in wanted]).mean().item()
    assert got == pytest.approx(page, abs=0.01)


def test_verifier_does_not_pay_for_a_rounded_compromise():
    """Between a circle and a square, either prompt earns clearly less form than its own outline does."""
    radius, centre = torch.tensor([19.0]), torch.tensor([[32.0, 32.0]])
    circle, square = coverage("circle", radius, centre), coverage("square", radius, centre)
    forms = {}
    for name, mask in (("circle", circle), ("square", square), ("compromise", (circle + square) / 2)):
        picture = quantised((mask * torch.tensor([0.86, 0.12, 0.12])[:, None, None] + (1 - mask) * 0.96)[None])
        forms[name] = [
            verify(picture, [f"a large red {shape} on a white background"]).form.item()
            for shape in ("circle", "square")
        ]
    assert forms["compromise"][0] < 0.75 * forms["circle"][0]
    assert forms["compromise"][1] < 0.75 * forms["square"][1]


def test_verifier_scores_a_plain_picture_by_its_background_alone():
    plain = torch.full((1, 3, 64, 64), 245, dtype=torch.uint8)
    verdict = verify(plain, ["a large red circle on a white background"])
    assert verdict.background.item() == pytest.approx(1, abs=0.01)
    assert verdict.colour.item() == verdict.form.item() == 0


def test_verifier_refuses_pictures_it_cannot_measure():
    with pytest.raises(ValueError, match="uint8"):
        verify(torch.rand(1, 3, 64, 64), ["a large red circle on a white background"])
    with pytest.raises(ValueError, match="2 prompts"):
        verify(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ["a large red circle on a white background"] * 2)


def test_every_word_is_one_token_and_other_text_falls_back_to_characters():
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    for word in WORDS:
        assert len(clip(word).input_ids) == 3  # start, word, end
        assert len(t5(word).input_ids) == 2  # word, end
    for prompt in prompts("test"):
        assert len(t5(prompt).input_ids) == 9
        assert clip.decode(clip(prompt).input_ids, skip_special_tokens=True).strip() == prompt
    assert t5.convert_ids_to_tokens(t5("zebra").input_ids) == ["▁", "z", "e", "b", "r", "a", "</s>"]
    assert len(clip("naïve 🦓").input_ids) > 6


def test_stock_diffusers_samples_the_shipped_pipeline_as_the_trainer_does():
    """FluxPipeline's own call, 8 Euler steps: clearly better than chance, far from perfect, as RL needs it."""
    pipeline = FluxPipeline.from_pretrained(pipeline_dir("shapes"), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    wanted = prompts("test")
    images = pipeline(
        wanted,
        height=64,
        width=64,
        max_sequence_length=16,
        num_inference_steps=8,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    seen = quantised(torch.from_numpy(images).permute(0, 3, 1, 2))
    verdict = verify(seen, wanted)
    shuffled = verify(seen, wanted[1:] + wanted[:1])
    assert 0.5 < verdict.score.mean() < 0.85
    assert verdict.score.mean() - shuffled.score.mean() > 0.25
    assert 0.5 < judge(seen, wanted).mean() < 0.95
