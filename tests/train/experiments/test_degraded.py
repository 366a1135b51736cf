"""Rewards made worse on purpose: as noisy, rare and strict as they say, and the same for the same picture."""

import math

import pytest
import torch
from torch import Tensor

from ngrpo_train.experiments import degraded
from ngrpo_train.shapes.verifier import score, verify
from ngrpo_train.shapes.world import captions, draw

N = 400


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, list[str]]:
    """Drawn pictures, every other one with the prompt of another."""
    wanted = [captions("train")[i % 168] for i in range(N)]
    images = (draw(wanted, torch.Generator().manual_seed(0)) * 255).round().to(torch.uint8)
    return images, [str(wanted[i + 1 if i % 2 and i + 1 < N else i]) for i in range(N)]


@pytest.mark.parametrize("name, sd", [("noise_005", 0.05), ("noise_01", 0.1), ("noise_02", 0.2)])
def test_noise_is_normal(pictures: tuple[Tensor, list[str]], name: str, sd: float) -> None:
    """Mean, spread and tails within four standard errors of the normal distribution's."""
    z = (getattr(degraded, name)(*pictures) - score(*pictures)) / sd
    assert abs(z.mean()) < 4 / math.sqrt(N)
    assert abs(z.std() - 1) < 4 / math.sqrt(2 * N)
    assert abs((z.abs() < 1).float().mean() - 0.6827) < 4 * math.sqrt(0.6827 * 0.3173 / N)
    assert abs((z > 0).float().mean() - 0.5) < 2 / math.sqrt(N)


def test_rewards_are_rare(pictures: tuple[Tensor, list[str]]) -> None:
    given, clean = degraded.rare(*pictures), score(*pictures)
    rewarded = given != 0
    assert abs(rewarded.float().mean() - 0.1) < 4 * math.sqrt(0.1 * 0.9 / N)
    assert torch.equal(given[rewarded], clean[rewarded])


def test_all_or_nothing(pictures: tuple[Tensor, list[str]]) -> None:
    given, verdict = degraded.all_or_nothing(*pictures), verify(*pictures)
    parts = [verdict.background_right, verdict.colour_right, verdict.shape_right, verdict.size_right]
    assert given.tolist() == [float(all(each)) for each in zip(*(part.tolist() for part in parts), strict=True)]
    assert 0.3 < given.mean() < 0.7  # half have another's prompt


def test_a_picture_has_one_score(pictures: tuple[Tensor, list[str]]) -> None:
    """In any batch and order, and another by one byte or another prompt."""

    def noise(images: Tensor, prompts: list[str]) -> Tensor:
        return degraded.noise_02(images, prompts) - score(images, prompts)

    images, prompts = pictures[0][:6], pictures[1][:6]
    drawn = noise(images, prompts)
    torch.testing.assert_close(noise(images[4:].flip(0), prompts[4:][::-1]), drawn[4:].flip(0), rtol=0, atol=1e-6)
    changed = images.clone()
    changed[0, 0, 30, 30] ^= 1
    assert (noise(changed, prompts) - drawn).abs().gt(1e-4).tolist() == [True] + [False] * 5
    asked_otherwise = noise(images, ["a small red star on a blue background"] * 6)
    assert (asked_otherwise - drawn).abs().min() > 1e-4
