"""Every random number of an iteration, as a function of (seed, step, slot, purpose).

`slot` is the prompt's index in the iteration's global batch. Draws are made on the CPU and depend on neither rank nor
device, so they are the same for any number of processes.
"""
# G candidates of a prompt, B anchors, K trained steps.

import hashlib

import torch
from torch import Tensor

NOISE = "noise"
ANCHORS = "anchors"
STEPS = "steps"


def stream(seed: int, step: int, slot: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, step, slot, purpose), seeded with 63 bits of their BLAKE2b hash.

    torch's CPU generator keeps only 32 of these bits. Among n streams, the probability that some two coincide is
    n^2 / 2^33: 1 % for 9,600 noises, those of 300 iterations of 32 prompts. The harm is small: one noise occurs twice.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{slot}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_anchors(num_generations: int, num_anchors: int, *, seed: int, step: int, slot: int) -> Tensor:
    """Draw B of the G candidates of a prompt, uniformly, without replacement: int64 [B] in random order, on the CPU.

    Raises ValueError unless 1 <= B <= G.
    """
    if not 1 <= num_anchors <= num_generations:
        raise ValueError(f"algorithm.num_anchors must be in 1..num_generations ({num_generations}), got {num_anchors}")
    return torch.randperm(num_generations, generator=stream(seed, step, slot, ANCHORS))[:num_anchors]


def draw_train_steps(step_range: tuple[int, int], num_train_steps: int, *, seed: int, step: int, slot: int) -> Tensor:
    """Draw K solver steps of range(start, stop), uniformly, without replacement: int64 [K], ascending, on the CPU.

    Raises ValueError unless 0 <= start and 1 <= K <= stop - start.
    """
    start, stop = step_range
    if not (start >= 0 and 1 <= num_train_steps <= stop - start):
        raise ValueError(
            f"algorithm.num_train_steps must be in 1..{max(stop - start, 0)}, the steps in algorithm.step_range "
            f"({start}, {stop}) with start >= 0, got {num_train_steps}"
        )
    order = torch.randperm(stop - start, generator=stream(seed, step, slot, STEPS))
    return start + order[:num_train_steps].sort().values
