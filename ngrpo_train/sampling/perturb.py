"""The starting noises of a group: perturbed copies of one base noise (Eq. 7)."""
# G candidates of a prompt, T image tokens, C channels.

import math

import torch
from torch import Tensor

from ngrpo_train.draws import NOISE, stream


def neighborhood(
    shape_TC: tuple[int, int], num_generations: int, sigma: float, *, seed: int, step: int, slot: int
) -> Tensor:
    """The G starting noises of a prompt (Eq. 7): `sqrt(1 - sigma^2) * base + sigma * delta_i`, fp32 [G, T, C] on CPU.

    Each is standard normal; any two have the correlation `1 - sigma^2`. The base depends on neither G nor sigma.
    Raises ValueError unless 0 < sigma <= 1 and G >= 1.
    """
    if not 0 < sigma <= 1:
        raise ValueError(f"algorithm.sigma must be in (0, 1], got {sigma}")
    if num_generations < 1:
        raise ValueError(f"algorithm.num_generations must be at least 1, got {num_generations}")
    generator = stream(seed, step, slot, NOISE)
    base_TC = torch.randn(shape_TC, generator=generator)
    delta_GTC = torch.randn((num_generations, *shape_TC), generator=generator)
    return delta_GTC.mul_(sigma).add_(base_TC, alpha=math.sqrt(1 - sigma**2))
