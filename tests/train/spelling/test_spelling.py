"""The spelling world: its words, how they are drawn, its judges, and the pipeline that ships with it."""

import random
from collections import Counter
from itertools import chain

import pytest
import torch
from diffusers import FluxPipeline

from ngrpo_train.spelling import judge, paper, pretrain
from ngrpo_train.spelling.pipeline import CLIP_LENGTH, MAX_SEQUENCE_LENGTH, clip_tokenizer, t5_tokenizer
from ngrpo_train.spelling.world import (
    COLOURS,
    HEIGHT,
    INK,
    LETTERS,
    SPLITS,
    WIDTH,
    Sign,
    draw,
    prompts,
    row_of,
    signs,
    words,
)
from ngrpo_train.worlds import pipeline_dir


def drawn(*wanted, seed=0, **how):
    """Uint8 pictures of signs."""
    images = draw(wanted, torch.Generator().manual_seed(seed), **how)
    return (255 * images).round().to(torch.uint8)


# --- words and prompts


def test_no_word_is_in_two_splits_and_no_letter_is_unseen():
    train, validation, test = (words(split) for split in SPLITS)
    assert (len(train), len(validation), len(test)) == (622, 24, 48)
    assert len({*train, *validation, *test}) == 622 + 24 + 48
    counts = Counter(chain.from_iterable(train))
    assert set(counts) == set(LETTERS)
    assert min(counts.values()) >= 5
    assert all(len(word) == 4 for word in (*train, *validation, *test))


def test_signs_to_train_on_have_every_colour_and_others_one():
    assert Counter(sign.word for sign in signs("train")) == dict.fromkeys(words("train"), len(COLOURS))
    assert len(set(signs("train"))) == len(signs("train"))
    for split in ("validation", "test"):
        assert tuple(sign.word for sign in signs(split)) == words(split)
        assert max(Counter(sign.colour for sign in signs(split)).values()) <= -(-len(words(split)) // len(COLOURS))


def test_prompts_are_read_back():
    for split in SPLITS:
        for text in prompts(split):
            assert str(Sign.parse(text)) == text
            assert row_of(text) == {"text": text[-4:]}
    assert Sign.parse(" A blue SIGN that says lion ") == Sign("blue", "LION")


@pytest.mark.parametrize(
    "prompt",
    [
        "a pink sign that says LION",
        "a blue sign that says",
        "a blue sign that says LION CUB",
        "a blue sign that says L10N",
        "a blue sign that says ÖRTE",
        "LION",
        "",
    ],
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match=r"not a prompt of the spelling world: .*; expected 'a {red,green,"):
        Sign.parse(prompt)


def test_another_split_is_refused():
    with pytest.raises(ValueError, match="no split 'dev' in the spelling world; there are train, validation, test"):
        words("dev")


# --- pictures


@pytest.mark.parametrize("colour", COLOURS)
def test_a_sign_is_ink_on_paper_with_a_letter_in_each_quarter(colour):
    image = draw([Sign(colour, "HHHH")], torch.Generator().manual_seed(0))[0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert torch.equal(image[:, :3].flatten(1).amax(1), torch.tensor(COLOURS[colour]))
    assert torch.equal(image[:, -3:].flatten(1).amin(1), torch.tensor(COLOURS[colour]))
    assert torch.allclose(image.flatten(1).amax(1), torch.tensor(INK))
    bright = (image.mean(0) > 0.6).float().unflatten(1, (4, 16)).sum((0, 2))
    assert bright.min() > 0.8 * bright.max()  # at most a pixel of a stem is over an edge


def test_words_are_at_most_a_pixel_off_the_middle():
    images = draw([Sign("black", "OOOO")] * 200, torch.Generator().manual_seed(1))
    rows = torch.arange(HEIGHT) + 0.5
    weight = images.mean(1) - images.mean(1).flatten(1).amin(1)[:, None, None]
    centre = (weight.sum(2) * rows).sum(1) / weight.sum((1, 2))
    assert len(centre.mul(10).round().unique()) == 3
    assert centre.max() - centre.min() == pytest.approx(2, abs=0.05)


def test_one_generator_gives_one_picture():
    wanted = signs("test")[:5]
    assert torch.equal(drawn(*wanted, seed=3), drawn(*wanted, seed=3))
    assert not torch.equal(drawn(*wanted, seed=3), drawn(*wanted, seed=4))


# --- judges


def flat(*colours):
    """Pictures of one colour each, RGB in [0, 1]."""
    return (torch.tensor(colours)[:, :, None, None] * 255).round().to(torch.uint8).expand(-1, -1, HEIGHT, WIDTH)


def test_the_paper_is_judged_by_its_distance_to_the_colour_asked_for():
    asked = "a blue sign that says LION"
    blue, off = COLOURS["blue"], (COLOURS["blue"][0] + 0.3, *COLOURS["blue"][1:])
    scores = paper.closeness(flat(blue, off), [asked, asked])
    # A colour's byte is off by up to 1/510 in each channel, and a distance of 0.3 costs a factor of e.
    assert scores.tolist() == pytest.approx([1, 1 / torch.e], abs=3**0.5 / 510 / 0.3)
    assert paper.as_asked(flat(blue, COLOURS["purple"]), [asked, asked]).tolist() == [1, 0]


def test_the_ink_does_not_change_the_paper():
    wanted = [Sign(colour, "WWWW") for colour in COLOURS]
    texts = [str(sign) for sign in wanted]
    assert paper.as_asked(drawn(*wanted), texts).tolist() == [1] * 5
    assert paper.as_asked(drawn(*wanted), texts[1:] + texts[:1]).tolist() == [0] * 5
    assert paper.closeness(drawn(*wanted), texts).min() > 1 - 3**0.5 / 510 / 0.3


@pytest.mark.parametrize("font", pretrain._FONTS)
def test_the_judge_reads_what_is_drawn(font):
    wanted = signs("test") + signs("validation")
    images = drawn(*wanted, font=font, size=pretrain._FONTS[font])
    read = judge.read(images)
    assert sum(text == sign.word for text, sign in zip(read, wanted, strict=True)) >= 0.97 * len(wanted)
    assert judge.exact(images[:2], [str(wanted[0]), "a red sign that says QQQQ"]).tolist() == [1, 0]


# --- the pipeline


def test_a_prompt_of_four_letters_fills_the_text_exactly():
    t5, clip = t5_tokenizer(), clip_tokenizer()
    texts = [text for split in SPLITS for text in prompts(split)]
    assert {len(ids) for ids in t5(texts).input_ids} == {MAX_SEQUENCE_LENGTH}
    assert max(len(ids) for ids in clip(texts).input_ids) <= CLIP_LENGTH
    pieces = t5.convert_ids_to_tokens(t5("a blue sign that says LION").input_ids)
    assert pieces[pretrain._LETTERS_OF_T5] == list("LION")


def test_what_ships_is_small_and_is_what_the_code_describes():
    folder = pipeline_dir("spelling")
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    pipeline = FluxPipeline.from_pretrained(folder, local_files_only=True)
    texts = ["a blue sign that says LION", "a red sign that says quiz"]
    assert pipeline.tokenizer_2(texts).input_ids == t5_tokenizer()(texts).input_ids
    assert pipeline.tokenizer(texts).input_ids == clip_tokenizer()(texts).input_ids
    assert pipeline.transformer.dtype == torch.float32


# --- pretraining


def test_held_out_words_are_not_pretrained_on():
    random.seed(0)
    some = pretrain.some_signs(20_000)
    assert not {sign.word for sign in some} & {*words("validation"), *words("test")}
    assert 0.38 < sum(sign.word in words("train") for sign in some) / len(some) < 0.42
    assert set(chain.from_iterable(sign.word for sign in some)) == set(LETTERS)


def test_letters_are_replaced_as_often_as_asked():
    random.seed(0)
    sign = Sign("red", "AAAA")
    changed = "".join(pretrain.misspelt(sign, 0.3).word for _ in range(5000))
    # A random letter is A itself once in 26; 20,000 letters, so a standard deviation of 0.0032.
    assert 1 - changed.count("A") / len(changed) == pytest.approx(0.3 * 25 / 26, abs=0.015)
    assert pretrain.misspelt(sign, 0) == sign
