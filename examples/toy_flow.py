"""Neighbor GRPO from start to end on a 2-D toy: python examples/toy_flow.py, some seconds on a CPU.

A small flow draws points from four modes; the reward asks for the right-hand one. The script prints how often
points from held-out noise land there. It has the whole algorithm and no other part of an image trainer.
"""
# P prompts, G candidates, B anchors, K trained steps of N; points have D = 2 coordinates. Suffixes are shapes.

from itertools import pairwise

import torch
from torch import Tensor, nn

from ngrpo_kernels import neighbor_grpo_loss_from_velocity, quasi_norm_advantages

P, G, B, N, SIGMA = 16, 8, 4, 8, 0.3
MODES = 4 * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
SIGMAS = 3 * torch.linspace(1, 0, N + 1) / (1 + 2 * torch.linspace(1, 0, N + 1))  # from noise to data, shift 3


def velocity(model: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
    return model(torch.cat([x, sigma.expand(*x.shape[:-1], 1)], -1))


@torch.no_grad()
def solve(model: nn.Module, noise: Tensor) -> list[Tensor]:
    states = [noise]
    for sigma, after in pairwise(SIGMAS):
        states.append(states[-1] - (sigma - after) * velocity(model, states[-1], sigma))  # Euler: no noise is added
    return states


def hits(model: nn.Module) -> float:
    held_out = torch.randn(2000, 2, generator=torch.Generator().manual_seed(123))
    return ((solve(model, held_out)[-1] - MODES[0]).norm(dim=-1) < 1).float().mean().item()


def main(seed: int = 0, K: int = N // 2, shuffle: bool = False) -> tuple[float, float]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(1000):  # pretraining by flow matching: v = noise - data at (1 - t) * data + t * noise
        data, noise = MODES[torch.randint(4, (256,))] + 0.3 * torch.randn(256, 2), torch.randn(256, 2)
        t = torch.rand(256, 1)
        optimizer.zero_grad()
        (velocity(model, (1 - t) * data + t * noise, t) - (noise - data)).square().mean().backward()
        optimizer.step()
    before = hits(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(150):
        noise_PGD = (1 - SIGMA**2) ** 0.5 * torch.randn(P, 1, 2) + SIGMA * torch.randn(P, G, 2)  # Eq. 7
        states = solve(model, noise_PGD)
        rewards_PG = -(states[-1] - MODES[0]).norm(dim=-1)
        if shuffle:  # the control: advantages without information
            rewards_PG = rewards_PG.gather(1, torch.rand(P, G).argsort(1))
        advantages_PG = quasi_norm_advantages(rewards_PG)  # Eqs. 3, 11
        anchors_PB = torch.rand(P, G).argsort(1)[:, :B]
        optimizer.zero_grad()
        for k in range(K):  # the noisy half of the steps
            x_PBD, dt = states[k].take_along_dim(anchors_PB[..., None], 1), SIGMAS[k] - SIGMAS[k + 1]
            v_PBD = velocity(model, x_PBD, SIGMAS[k])
            out = neighbor_grpo_loss_from_velocity(  # Eqs. 8 to 10
                v_PBD, x_PBD, dt, states[k + 1], anchors_PB, advantages_PG, old_velocity="detach"
            )
            (out.loss / K).backward()
        optimizer.step()
    after = hits(model)
    print(f"in the wanted mode: {before:.1%} before, {after:.1%} after")
    return before, after


if __name__ == "__main__":
    main()
