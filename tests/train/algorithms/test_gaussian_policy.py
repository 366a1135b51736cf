"""The Gaussian policy's loss, gradient and figures, against Eq. 4 written out in float64 with torch.distributions."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ngrpo_train.algorithms.stochastic import GaussianPolicy, TransitionRows
from ngrpo_train.recipe.algorithms import Algorithm

ROWS, T, C = 6, 4, 16
D = T * C
# Of each row: sigma, the next sigma, the noise's level sigma_t (so that std = level * sqrt(dt)).
STEPS = [(1.0, 0.95, 2.0), (0.95, 0.9, 0.7), (0.9, 0.8, 0.3), (0.8, 0.6, 0.3), (0.6, 0.3, 0.8), (0.3, 0.1, 0.2)]
TOWARDS = torch.tensor([2.0, -1, 2, -1, -1, 2])  # what was drawn, or away from it: ratios on both sides of 1
PROMPT, ADVANTAGE = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 2, 1, 1, 0, 2])
ADVANTAGES = torch.tensor([[1.5, -0.7, 0.2], [-1.1, 0.0, 0.9]])
GAIN = torch.tensor([1.5, 0.2, -0.7, 0.0, -1.1, 0.9])  # of each row


@dataclass
class Case:
    """Six transitions that a rollout made, and the velocities of the models at their states, in float64."""

    before: torch.Tensor
    after: torch.Tensor
    rollout_velocity: torch.Tensor
    old_velocity: torch.Tensor
    velocity: torch.Tensor
    rows: Any


def drawn(seed):
    return torch.randn(ROWS, 1, T, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def constants():
    sigma, following, level = (torch.tensor(each, dtype=torch.float64) for each in zip(*STEPS, strict=True))
    dt = sigma - following
    return sigma, dt, level * dt.sqrt()


def mean(x, velocity):
    """Eq. 5."""
    sigma, dt, std = (each[:, None, None, None] for each in constants())
    return x - dt * velocity - std**2 / (2 * sigma) * (x + (1 - sigma) * velocity)


def case(drift=0.0, moved=0.0):
    """`drift` is how far the old model's training forward is from its rollout's, `moved` how far theta has gone."""
    sigma, dt, std = constants()
    before, rollout = drawn(0), drawn(1)
    noise = drawn(2)
    after = mean(before, rollout) + std[:, None, None, None] * noise
    old = rollout + drift * drawn(3)
    velocity = old + moved * (drawn(4) - TOWARDS[:, None, None, None] * noise)
    rows = TransitionRows(
        real=ROWS,
        prompt_r=PROMPT,
        step_r=torch.arange(ROWS),
        latents_rbS=before.float(),
        sigma_before_r=sigma.float(),
        rollout_velocity_rbS=rollout.float(),
        conditioning=None,
        advantage_r=ADVANTAGE,
        slope_r=-(dt + std**2 * (1 - sigma) / (2 * sigma)).float(),
        std_r=std.float(),
        noise_r1S=noise.float(),
    )
    return Case(before, after, rollout, old, velocity, rows)


def density(case, velocity):
    return Normal(mean(case.before, velocity), constants()[2][:, None, None, None])


def written_out(case, settings, old_velocity):
    """Loss, log-ratios [r], gradient by velocity, KL [r], all in float64."""
    velocity = case.velocity.clone().requires_grad_()
    new, old = density(case, velocity), density(case, old_velocity)
    log_ratio = (new.log_prob(case.after) - old.log_prob(case.after)).mean((1, 2, 3))
    ratio = log_ratio.exp()
    low, high = settings.clip_range if isinstance(settings.clip_range, tuple) else (settings.clip_range,) * 2
    objective = torch.minimum(GAIN * ratio, GAIN * ratio.clamp(1 - low, 1 + high))
    divergence = kl_divergence(old, new).mean((1, 2, 3))
    loss = (settings.kl_coef * divergence - objective).mean()
    (gradient,) = torch.autograd.grad(loss, velocity)
    return loss.detach(), log_ratio.detach(), gradient, divergence.detach()


def ours(case, settings, old_velocity):
    velocity = case.velocity.float().requires_grad_()
    old = None if old_velocity is None else old_velocity.float()
    terms = GaussianPolicy(settings).terms(case.rows, velocity, old, ADVANTAGES)
    (gradient,) = torch.autograd.grad(terms.loss, velocity)
    return terms, gradient


def assert_same(terms, gradient, expected):
    loss, log_ratio, exact, divergence = expected
    assert terms.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(terms.log_ratio[:, 0].double(), log_ratio, rtol=1e-4, atol=1e-7)
    assert (gradient.double() - exact).norm() < 1e-4 * exact.norm()
    norms = exact.flatten(1).norm(dim=1)
    torch.testing.assert_close(terms.velocity_grad_norm_rb[:, 0].double(), norms, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(terms.figures["kl"].double(), divergence, rtol=1e-4, atol=1e-9)


SETTINGS = replace(Algorithm.of("flow_grpo"), clip_range=10.0)


def test_at_theta_old_the_ratio_is_one_and_the_gradient_that_of_the_log_probability():
    made = case()
    terms, gradient = ours(made, SETTINGS, None)
    assert (terms.log_ratio == 0).all()
    assert_same(terms, gradient, written_out(made, SETTINGS, made.old_velocity))
    assert terms.figures["rollout_mismatch"].abs().max() < 1e-6
    assert terms.figures["mismatch_log_ratio"].abs().max() < 1e-6


@pytest.mark.parametrize("kl_coef", [0.0, 0.7])
@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_a_moved_theta_against_the_rollouts_policy_and_the_training_forwards(drift, kl_coef):
    """`exact` takes the old mean where the training forward has it; `after` stands where the rollout drew it."""
    made, settings = case(drift=drift, moved=0.3), replace(SETTINGS, kl_coef=kl_coef)
    assert_same(*ours(made, settings, made.old_velocity), written_out(made, settings, made.old_velocity))
    cached = replace(settings, old_policy="cached")
    assert_same(*ours(made, cached, None), written_out(made, cached, made.rollout_velocity))
    assert_same(*ours(made, cached, made.old_velocity), written_out(made, cached, made.rollout_velocity))


@pytest.mark.parametrize("clip_range", [0.02, (0.01, 0.3), (0.3, 0.01)])
def test_clip_on_both_sides_for_both_signs(clip_range):
    made, settings = case(moved=0.4), replace(SETTINGS, clip_range=clip_range, kl_coef=0.2)
    expected = written_out(made, settings, made.old_velocity)
    terms, gradient = ours(made, settings, made.old_velocity)
    assert_same(terms, gradient, expected)
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range,) * 2
    ratio = expected[1].exp()
    outside = (ratio < 1 - low) | (ratio > 1 + high)
    assert terms.figures["clip_fraction"].tolist() == outside.double().tolist()
    masked = ((ratio > 1 + high) & (GAIN > 0)) | ((ratio < 1 - low) & (GAIN < 0))
    assert 0 < masked.sum() < outside.sum(), "a bound masks one sign of A and not the other"
    alone, _ = ours(made, replace(settings, kl_coef=0.0), made.old_velocity)
    assert torch.equal(alone.velocity_grad_norm_rb[:, 0] == 0, masked | (GAIN == 0))


def test_far_ratios_are_clamped_and_lose_their_gradient():
    made = case(moved=60.0)
    terms, gradient = ours(made, replace(SETTINGS, clip_range=(0.5, 1e30)), made.old_velocity)
    clamped = terms.log_ratio[:, 0].abs() > 20
    assert clamped.any()
    assert terms.figures["clamp_fraction"].tolist() == clamped.double().tolist()
    assert (gradient[clamped] == 0).all()
    assert (terms.velocity_grad_norm_rb[clamped] == 0).all()
    assert terms.loss.isfinite()


@pytest.mark.parametrize("old_policy", ["exact", "cached"])
def test_mismatch_is_between_rollout_and_training_forward(old_policy):
    made = case(drift=0.5)
    terms, _ = ours(made, replace(SETTINGS, old_policy=old_policy), None)
    away = (made.velocity - made.rollout_velocity).flatten(1).norm(dim=1) / made.rollout_velocity.flatten(1).norm(dim=1)
    torch.testing.assert_close(terms.figures["rollout_mismatch"].double(), away, rtol=1e-5, atol=0)
    here, there = density(made, made.velocity), density(made, made.rollout_velocity)
    log_ratio = (here.log_prob(made.after) - there.log_prob(made.after)).mean((1, 2, 3))
    torch.testing.assert_close(terms.figures["mismatch_log_ratio"].double(), log_ratio.abs(), rtol=1e-4, atol=1e-7)
    assert (terms.log_ratio != 0).any() == (old_policy == "cached")


def test_tether_is_flow_grpos_divergence():
    """arXiv 2505.05470: dt / 2 (sigma_t (1 - t) / (2 t) + 1 / sigma_t)^2 |v - v_ref|^2, here with the mean over D."""
    made, base = case(), drawn(7)
    sigma, dt, level = (torch.tensor(each, dtype=torch.float64) for each in zip(*STEPS, strict=True))
    dt = sigma - dt
    factor = dt / 2 * (level * (1 - sigma) / (2 * sigma) + 1 / level) ** 2
    velocity = made.velocity.clone().requires_grad_()
    expected = (factor * (velocity - base).square().mean((1, 2, 3))).mean()
    (exact,) = torch.autograd.grad(expected, velocity)
    ours = made.velocity.float().requires_grad_()
    tether = GaussianPolicy(SETTINGS).tether(made.rows, ours, base.float())
    (gradient,) = torch.autograd.grad(tether, ours)
    assert tether.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-8)
    divergence = kl_divergence(density(made, made.velocity), density(made, base)).mean()
    assert tether.item() == pytest.approx(divergence.item(), rel=1e-5)
