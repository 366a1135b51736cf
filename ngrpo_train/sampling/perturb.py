"""The starting noises of a group: perturbed copies of one base noise (Eq. 7)."""
# G candidates of a prompt, S the dimensions of a latent.

import math

import torch
from torch import Tensor

from ngrpo_train.draws import NOISE, stream


def neighborhood(
    shape_S: tuple[int, ...], num_generations: int, sigma: float, *, seed: int, step: int, slot: int
) -> Tensor:
    """The G starting noises of a prompt (Eq. 7): `sqrt(1 - sigma^2) * base + sigma * delta_i`, fp32 [G, *S] on CPU.

    Each is standard normal; any two have the correlation `1 - sigma^2`. The base depends on neither G nor sigma.
    Raises ValueError unless 0 < sigma <= 1 and G >= 1.
    """
    if not 0 < sigma <= 1:
        raise ValueError(f"algorithm.sigma must be in (0, 1], got {sigma}")
    if num_generations < 1:
        raise ValueError(f"algorithm.num_generations must be at least 1, got {num_generations}")
    generator = stream(seed, step, slot, NOISE)
    base_S = torch.randn(shape_S, generator=generator)
    delta_GS = torch.randn((num_generations, *shape_S), generator=generator)
    return delta_GS.mul_(sigma).add_(base_S, alpha=math.sqrt(1 - sigma**2))
