"""Neighbor's gradient and the SDE's, for one old policy and reward, beside the true gradient of the expected reward."""
# N solver steps, S groups of one prompt, G candidates, D latent elements, B anchors, K trained steps: all but the last.

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ngrpo_kernels import neighbor_grpo_loss_from_velocity
from ngrpo_train.sampling.sde import NoiseLevel, mean_slope, sde_step, step_std

from .flows import DTYPE, Policy, centred, cosine, flat, gradient, schedule, solve, standardised
from .page import check_table

D, G, N, S = 16, 12, 8, 1024
SIGMAS = schedule(N)
TRAINED = range(N - 1)


@functools.cache
def world() -> tuple[Policy, Callable[[Tensor], Tensor]]:
    """The old policy, and a smooth reward of a final state."""
    draw = torch.Generator().manual_seed(3)
    direction = torch.randn(D, generator=draw, dtype=DTYPE)
    direction /= direction.norm()
    return Policy(D, seed=0), lambda x: (x @ direction).tanh() + 0.3 * (2 * x.square().mean(-1)).cos()


def shares(noise: Tensor) -> Tensor:
    """d mean(reward) / d theta [N, parameters] of an Euler solve from `noise`, by the step through which it flows."""
    policy, reward = world()
    with torch.no_grad():
        states = solve(policy, noise, SIGMAS)
    adjoint = torch.func.grad(lambda x: reward(x).mean())(states[-1])
    through = []
    for k in reversed(range(N)):
        x = states[k].requires_grad_()
        velocity = policy(x, SIGMAS[k])
        *parameters, to_x = torch.autograd.grad(
            velocity, [*policy.parameters(), x], (SIGMAS[k + 1] - SIGMAS[k]) * adjoint
        )
        through.append(flat(parameters))
        adjoint = adjoint + to_x
    return torch.stack(through[::-1])


@functools.cache
def truth() -> Tensor:
    """The true gradient's shares of the trained steps, twice over 20,000 noises: [2, K, parameters]."""
    noise = torch.randn(2, 20_000, D, generator=torch.Generator().manual_seed(4), dtype=DTYPE)
    return torch.stack([shares(half)[: N - 1] for half in noise])


def cosine_of_expectations(left: Tensor, right: Tensor) -> Tensor:
    """Cosine of what two estimates tend to, each given as the means of two independent halves [2, ..., parameters].

    The square of a mean's norm has the mean's variance in it, in which an estimate of 800 numbers drowns; the product
    of independent halves has not.
    """
    squares = (left[0] * left[1]).sum(-1) * (right[0] * right[1]).sum(-1)
    return (left.mean(0) * right.mean(0)).sum(-1) / squares.sqrt()


class Estimate(NamedTuple):
    """Gradients at ratio 1, where the objective ascends."""

    by_group: Tensor  # [S, parameters], summed over steps
    by_step: Tensor  # [2, K, parameters], averaged over either half of the groups


def estimate(states: list[Tensor], weights: list[Tensor]) -> Estimate:
    """From what weighs the velocity at the states of each trained step, both [S, members, D]."""
    policy, _ = world()
    by_group, by_step = torch.zeros((), dtype=DTYPE), []
    for k in TRAINED:
        gradients = policy.gradient_by_group(states[k], SIGMAS[k], weights[k])
        by_group = by_group + gradients
        by_step.append(gradients.unflatten(0, (2, -1)).mean(1))
    return Estimate(by_group, torch.stack(by_step, 1))


def neighbor(
    sigma: float,
    B: int = G,
    temperature: float | None = None,
    advantages_of: Callable[[Tensor], Tensor] = standardised,
) -> Estimate:
    """Neighbor's (Eqs. 7 to 10), `(2 / tau) sum_i A_i x_i` through one Euler step; tau "neighborhood" unless given."""
    policy, reward = world()
    draw = torch.Generator().manual_seed(5)
    base = torch.randn(S, 1, D, generator=draw, dtype=DTYPE)
    noise = math.sqrt(1 - sigma**2) * base + sigma * torch.randn(S, G, D, generator=draw, dtype=DTYPE)
    with torch.no_grad():
        states = solve(policy, noise, SIGMAS)
    advantages = advantages_of(reward(states[-1]))
    weights = [
        (SIGMAS[k + 1] - SIGMAS[k]) * pull(advantages, states[k + 1], temperature).expand(S, B, D) / B for k in TRAINED
    ]
    return estimate([x[:, :B] for x in states], weights)


def pull(advantages: Tensor, candidates: Tensor, temperature: float | None) -> Tensor:
    """`(2 / tau) sum_i A_i x_i` [S, 1, D]."""
    tau = temperature or torch.cdist(candidates, candidates).square().sum((1, 2))[:, None, None] / (G * (G - 1))
    return 2 / tau * torch.einsum("sg,sgd->sd", advantages, candidates)[:, None]


def sde(level: NoiseLevel, eta: float, advantages_of: Callable[[Tensor], Tensor] = standardised) -> Estimate:
    """The SDE policy's (Eqs. 4, 5); a group shares its first noise, and the last step is the ODE's."""
    policy, reward = world()
    draw = torch.Generator().manual_seed(6)
    x = torch.randn(S, 1, D, generator=draw, dtype=DTYPE).expand(S, G, D)
    states, weights = [], []
    with torch.no_grad():
        for k in TRAINED:
            noise = torch.randn(S, G, D, generator=draw, dtype=DTYPE)
            std = step_std(level, eta, SIGMAS, k)
            states.append(x)
            weights.append(mean_slope(SIGMAS[k], SIGMAS[k + 1], std) / std * noise / G)
            x = sde_step(x, policy(x, SIGMAS[k]), noise, SIGMAS[k], SIGMAS[k + 1], std)
        advantages = advantages_of(reward(x - SIGMAS[-2] * policy(x, SIGMAS[-2])))
    return estimate(states, [advantages[..., None] * weight for weight in weights])


@functools.cache
def estimates() -> dict[str, Estimate]:
    return {
        "SDE, constant 0.3": sde("constant", 0.3),
        "SDE, flow 0.7": sde("flow", 0.7),
        "Neighbor, size 0.1": neighbor(0.1),
        "Neighbor, size 0.3": neighbor(0.3),
        "Neighbor, size 0.3, B = 4": neighbor(0.3, B=4),
        "Neighbor, size 0.3, temperature 1": neighbor(0.3, temperature=1.0),
        "Neighbor, size 1": neighbor(1.0),
        "SDE, constant 0.3, centred": sde("constant", 0.3, centred),
        "Neighbor, size 0.1, centred": neighbor(0.1, advantages_of=centred),
        "Neighbor, size 0.3, centred": neighbor(0.3, advantages_of=centred),
    }


def test_the_shares_of_the_true_gradient_add_up_to_it() -> None:
    policy, reward = world()
    noise = torch.randn(20, D, generator=torch.Generator().manual_seed(7), dtype=DTYPE)
    expected = gradient(reward(solve(policy, noise, SIGMAS)[-1]).mean(), policy)
    torch.testing.assert_close(shares(noise).sum(0), expected, rtol=0, atol=1e-10 * float(expected.norm()))


def test_neighbors_gradient_is_that_of_the_loss() -> None:
    policy, reward = world()
    k, dt = 2, SIGMAS[2] - SIGMAS[3]
    with torch.no_grad():
        states = solve(policy, torch.randn(1, G, D, generator=torch.Generator().manual_seed(7), dtype=DTYPE), SIGMAS)
    advantages = standardised(reward(states[-1]))
    loss = neighbor_grpo_loss_from_velocity(
        policy(states[k], SIGMAS[k]),
        states[k],
        dt,
        states[k + 1],
        torch.arange(G)[None],
        advantages,
        old_velocity="detach",
        temperature="neighborhood",
        backend="reference",
    ).loss
    expected = -gradient(loss, policy)
    weight = -dt / G * pull(advantages, states[k + 1], None).expand(1, G, D)
    got = policy.gradient_by_group(states[k], SIGMAS[k], weight)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 * float(expected.norm()))


def test_cosine_with_the_true_gradient_by_number_of_groups() -> None:
    """Averaged over disjoint sets of 1, 16 and 128 groups, and that of the expectation."""
    exact, rows = truth().sum(1), {}
    for label, found in estimates().items():
        means = [found.by_group.unflatten(0, (-1, count)).mean(1) for count in (1, 16, 128)]
        rows[label] = [float(cosine(mean, exact.mean(0)).mean()) for mean in means]
        rows[label].append(float(cosine_of_expectations(found.by_step.sum(1), exact)))
    one, limit = ({label: row[k] for label, row in rows.items()} for k in (0, -1))
    assert limit["SDE, constant 0.3, centred"] == pytest.approx(1, abs=0.05)
    assert max(value for label, value in limit.items() if "Neighbor" in label) < 0.93 < limit["SDE, constant 0.3"]
    assert limit["Neighbor, size 0.3"] > limit["Neighbor, size 0.3, temperature 1"] + 0.02
    assert limit["Neighbor, size 0.3, B = 4"] == pytest.approx(limit["Neighbor, size 0.3"], abs=0.01)
    assert one["Neighbor, size 1"] > 2 * max(one["SDE, constant 0.3"], one["SDE, flow 0.7"])
    check_table("groups", rows)


def test_cosine_with_the_true_gradient_by_step() -> None:
    rows = {label: cosine_of_expectations(found.by_step, truth()).tolist() for label, found in estimates().items()}
    for label in ("Neighbor, size 0.1, centred", "Neighbor, size 0.3, centred"):
        assert rows[label][:4] == pytest.approx([1] * 4, abs=0.04)
        assert rows[label][-1] < 0.7
    assert rows["SDE, constant 0.3, centred"][3:] == pytest.approx([1] * 4, abs=0.06)
    assert rows["Neighbor, size 0.3"][-1] < rows["Neighbor, size 0.3"][0] - 0.15
    check_table("steps", rows)


def test_neighbors_pull_is_the_true_one_times_the_covariance_of_the_neighborhood() -> None:
    """For small sigma, `Cov(reward, x_k) = sigma^2 J J^T dreward/dx_k`, J = d x_k / d noise (Stein's lemma)."""
    policy, reward = world()
    sigma, size = 0.01, 20_000
    draw = torch.Generator().manual_seed(8)
    base = torch.randn(D, generator=draw, dtype=DTYPE)
    delta = torch.randn(size // 2, D, generator=draw, dtype=DTYPE)
    noise = math.sqrt(1 - sigma**2) * base + sigma * torch.cat([delta, -delta])
    cosines = []
    with torch.no_grad():
        states = solve(policy, noise, SIGMAS)
        rewards = reward(states[-1])
        for k in TRAINED:
            measured = (rewards - rewards.mean()) @ states[k + 1] / size
            reach = torch.func.jacrev(lambda x, k=k: solve(policy, x, SIGMAS[: k + 2])[-1])(noise.mean(0))
            onward = torch.func.grad(lambda x, k=k: reward(solve(policy, x, SIGMAS[k + 1 :])[-1]))
            uphill = onward(solve(policy, noise.mean(0), SIGMAS[: k + 2])[-1])
            expected = sigma**2 * reach @ reach.T @ uphill
            assert (measured - expected).norm() < 0.05 * expected.norm()
            cosines.append(float(cosine(expected, uphill)))
    assert cosines[0] > 0.999 > cosines[2] > cosines[-1]
