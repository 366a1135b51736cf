"""The motion world: clips, splits, the verifier, and the shipped pipeline seen through stock diffusers."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from ngrpo_train.__main__ import main
from ngrpo_train.motion.pipeline import MAX_SEQUENCE_LENGTH, WORDS, tokenizer
from ngrpo_train.motion.verifier import MEASURES, Scores, verify
from ngrpo_train.motion.world import (
    BACKGROUND,
    FRAMES,
    MOTIONS,
    SPLITS,
    TRAVEL,
    TRAVEL_JITTER,
    Caption,
    captions,
    draw,
    prompts,
)
from ngrpo_train.shapes.world import COLOURS, SHAPES, rgb
from ngrpo_train.worlds import pipeline_dir
from ngrpo_train.worlds.pretraining import misled

EVERY = [caption for split in SPLITS for caption in captions(split)]
TEXTS = [str(caption) for caption in EVERY]


def quantised(clips):
    return (clips * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def drawn():
    return quantised(draw(EVERY, torch.Generator().manual_seed(0)))


# --- the world


def test_splits_share_no_combination_and_cover_all():
    assert len(EVERY) == len(set(EVERY)) == sum(SPLITS.values()) == 6 * 4 * 4
    for split in SPLITS:  # every value of every attribute is met in every split
        assert len(captions(split)) == SPLITS[split]
        values = [{getattr(caption, name) for caption in captions(split)} for name in Caption.__slots__]
        assert [len(v) for v in values] == [6, 4, 4]


def test_held_out_combinations_are_balanced():
    """One motion of each colour and shape, and every value of an attribute as often as the others."""
    tested = captions("test")
    assert len({(caption.colour, caption.shape) for caption in tested}) == len(tested) == 6 * 4
    for name in Caption.__slots__:
        assert len({*Counter(getattr(caption, name) for caption in tested).values()}) == 1


def test_prompts_parse_back_and_others_are_refused():
    assert [Caption.parse(text) for text in TEXTS] == EVERY
    assert prompts("validation")[0] == str(captions("validation")[0]) == str(captions("validation")[0]).lower()
    for prompt in ("a red circle", "a red circle that moves sideways", "", "a large red circle that moves left"):
        with pytest.raises(ValueError, match="motion world"):
            Caption.parse(prompt)
    with pytest.raises(ValueError, match="train, validation, test"):
        captions("tset")


def test_drawing_is_seeded_and_has_the_asked_colours(drawn):
    assert torch.equal(drawn, quantised(draw(EVERY, torch.Generator().manual_seed(0))))
    assert not torch.equal(drawn, quantised(draw(EVERY, torch.Generator().manual_seed(1))))
    pixels = drawn.float() / 255
    assert torch.allclose(pixels[:, :, :, 0, 0], torch.tensor(BACKGROUND).expand(len(EVERY), FRAMES, 3), atol=0.003)
    middle = pixels[:, FRAMES // 2, :, 16, 16]
    assert torch.allclose(middle, rgb([caption.colour for caption in EVERY]), atol=0.003)


def test_shapes_go_the_way_that_is_asked_for(drawn):
    """By the mean place of the pixels that are no background, which no function of the world or the verifier gives."""
    seen = (drawn.int() - (torch.tensor(BACKGROUND) * 255).round().int()[:, None, None]).abs().sum(2).double()
    axis = torch.arange(32, dtype=torch.float64)
    x = (seen.sum(2) * axis).sum(-1) / seen.sum((2, 3))
    y = (seen.sum(3) * axis).sum(-1) / seen.sum((2, 3))
    for path_x, path_y, caption in zip(x, y, EVERY, strict=True):
        along, across = (path_x, path_y) if caption.motion in ("left", "right") else (path_y, path_x)
        steps = along.diff() * (1 if caption.motion in ("right", "down") else -1)
        assert TRAVEL - TRAVEL_JITTER - 0.1 < steps.sum() < TRAVEL + TRAVEL_JITTER + 0.1
        assert steps.max() - steps.min() < 0.1, "an even motion"
        assert across.max() - across.min() < 0.1, "along one line"


# --- the verifier


def test_verifier_recognises_every_drawn_clip(drawn):
    verdict = verify(drawn, TEXTS)
    assert verdict.all_right.all()
    assert verdict.score.mean() > 0.95
    assert verdict.motion.min() > 0.97


@pytest.mark.parametrize("attribute", Caption.__slots__)
def test_verifier_prefers_the_right_attribute(drawn, attribute):
    """Each clip against its own prompt and every prompt with that one attribute wrong."""
    values = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": tuple(MOTIONS)}[attribute]
    wrong = [(i, value) for i, caption in enumerate(EVERY) for value in values if value != getattr(caption, attribute)]
    rows, others = [i for i, _ in wrong], [str(replace(EVERY[i], **{attribute: value})) for i, value in wrong]
    own, other = verify(drawn, TEXTS), verify(drawn[rows], others)
    assert not getattr(other, f"{attribute}_right").any()
    assert (own.score[rows] - other.score).min() > 0.15
    for name in {*Caption.__slots__} - {attribute}:  # the other two parts do not see it
        assert torch.equal(getattr(other, name), getattr(own, name)[rows])


def test_motion_is_that_of_the_whole_clip(drawn):
    own = verify(drawn, TEXTS)
    backwards = verify(drawn.flip(1), TEXTS)
    assert backwards.motion.max() == 0
    assert torch.allclose(backwards.shape, own.shape, atol=1e-5)
    still = verify(drawn[:, 4:5].expand(-1, FRAMES, -1, -1, -1), TEXTS)
    assert still.motion.max() < 1e-3
    assert not still.motion_right.any()
    jumping = verify(drawn[:, [0, 8, 1, 7, 2, 6, 3, 5, 4]], TEXTS)
    assert jumping.motion.max() < 0.2
    diagonal = verify(torch.stack([frame.roll(i - 4, -1) for i, frame in enumerate(drawn.unbind(1))], 1), TEXTS)
    upright = torch.tensor([caption.motion in ("up", "down") for caption in EVERY])
    assert (diagonal.motion < 0.6 * own.motion)[upright].all(), "sideways as fast as along"
    fast = verify(drawn[:, ::2], TEXTS)
    assert torch.allclose(fast.motion, own.motion, atol=0.02), "the way counts, not the number of frames"


def test_verifier_pays_nothing_for_an_empty_clip_and_little_for_one_that_comes_and_goes(drawn):
    empty = (torch.tensor(BACKGROUND) * 255).round().to(torch.uint8)[:, None, None].expand(drawn.shape).contiguous()
    assert verify(empty, TEXTS).score.max() == 0
    half = drawn.clone()
    half[:, 5:] = empty[:, 5:]
    verdict, own = verify(half, TEXTS), verify(drawn, TEXTS)
    assert not (verdict.colour_right | verdict.shape_right | verdict.motion_right).any()
    assert (verdict.score < 0.6 * own.score).all()


def test_verifier_does_not_pay_for_a_rounded_compromise(drawn):
    """Between a circle and a square, either prompt earns clearly less than its own outline does."""
    red = {caption.shape: caption for caption in EVERY if (caption.colour, caption.motion) == ("red", "left")}
    same = [draw([red[shape]], torch.Generator().manual_seed(3)) for shape in ("circle", "square")]
    between = quantised((same[0] + same[1]) / 2)
    for shape, clip in zip(("circle", "square"), same, strict=True):
        text = [str(red[shape])]
        assert verify(between, text).shape.item() < 0.75 * verify(quantised(clip), text).shape.item()


def test_verifier_refuses_what_it_cannot_measure(drawn):
    for clips in (drawn.float(), drawn[:, 0], drawn[:, :1], drawn[..., :16], drawn[:3]):
        with pytest.raises(ValueError, match=r"96 prompts, not torch\.\w+ \["):
            verify(clips, TEXTS)


def test_the_scorer_takes_whole_clips_and_has_five_measures(drawn):
    verdict = verify(drawn[:8].flip(1), TEXTS[:8])
    scores = {measure: Scores(measure)(drawn[:8].flip(1), TEXTS[:8]) for measure in MEASURES}
    assert Scores("score").takes_videos
    assert torch.equal(scores["score"], (verdict.colour + verdict.shape + verdict.motion) / 3)
    assert [scores[each].tolist() for each in ("colour", "shape", "motion", "all")] == [[1.0] * 8] * 2 + [[0.0] * 8] * 2
    assert all(each.dtype == torch.float32 for each in scores.values())


# --- the pipeline


def test_every_word_is_one_token_and_prompts_fit():
    words = tokenizer()
    for word in WORDS:
        assert len(words(word).input_ids) == 2  # word, end
    assert {len(words(text).input_ids) for text in TEXTS} == {MAX_SEQUENCE_LENGTH - 1}


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in pipeline_dir("motion").rglob("*")) < 6e6


@pytest.mark.parametrize("split, page", [("test", 0.81), ("train", 0.88)])
def test_the_vae_leaves_the_score_that_the_page_tells(split, page):
    """Of one drawing of each prompt; from seed to seed it differs by 0.005."""
    wanted = captions(split)
    with torch.no_grad():
        vae = AutoencoderKLWan.from_pretrained(pipeline_dir("motion"), subfolder="vae").eval()
        clips = draw(wanted, torch.Generator().manual_seed(0)).transpose(1, 2)
        restored = vae.decode(vae.encode(2 * clips - 1).latent_dist.mode()).sample.transpose(1, 2)
    got = verify(quantised(((restored + 1) / 2).clamp(0, 1)), [str(caption) for caption in wanted])
    assert got.score.mean().item() == pytest.approx(page, abs=0.01)


def test_stock_diffusers_samples_the_shipped_pipeline():
    """WanPipeline's own call, 8 Euler steps: clearly better than chance, far from perfect, as RL needs it."""
    pipeline = WanPipeline.from_pretrained(pipeline_dir("motion"), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    wanted = prompts("test")
    clips = pipeline(
        wanted,
        height=32,
        width=32,
        num_frames=FRAMES,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        num_inference_steps=8,
        guidance_scale=1.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).frames
    seen = quantised(clips)
    right, others = verify(seen, wanted), verify(seen, wanted[1:] + wanted[:1])
    assert 0.5 < right.score.mean() < 0.85
    assert right.score.mean() - others.score.mean() > 0.2
    assert 0.1 < right.all_right.float().mean() < 0.7


def test_attributes_of_captions_are_replaced_as_often_as_asked_and_by_known_captions():
    known, values = captions("train"), {"colour": tuple(COLOURS), "shape": SHAPES, "motion": tuple(MOTIONS)}
    random.seed(0)
    assert [misled(caption, values, 0.0, known) for caption in known] == list(known)
    caption, count = known[0], 4000
    changed = [misled(caption, values, 0.3, EVERY) for _ in range(count)]
    for name, choices in values.items():  # one of n choices is the old one
        share = sum(getattr(each, name) != getattr(caption, name) for each in changed) / count
        assert share == pytest.approx(0.3 * (1 - 1 / len(choices)), abs=0.03)  # four standard errors
    assert {misled(caption, values, 1.0, known) for _ in range(count)} <= {*known}


# --- the recipe


def test_the_recipe_trains_the_transformer_and_exports_it_for_stock_diffusers(tmp_path):
    few = ["--train.steps=2", "--prompts.per-rank=1", "--algorithm.num-generations=4", "--evaluation.validation="]
    assert main(["train", "motion_cpu", f"--log.output-dir={tmp_path}", "--evaluation.test=", *few]) == 0
    before = WanPipeline.from_pretrained(pipeline_dir("motion"), local_files_only=True)
    after = WanPipeline.from_pretrained(tmp_path / "export", local_files_only=True)
    for part in ("transformer", "text_encoder", "vae"):
        weights = zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
        assert all(torch.equal(a.float(), b.float()) for a, b in weights) == (part != "transformer")
