"""The update against Eqs. 8 to 10 written out in float64 and differentiated by autograd through the model."""

import copy
from dataclasses import replace

import pytest
import torch

from ngrpo_train.algorithms import make_algorithm
from ngrpo_train.algorithms.neighbor import LeapingPolicy
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.algorithms import Neighbor
from ngrpo_train.recipe.sections import Prompts, Recipe, Reward, Sampling
from ngrpo_train.rewards import Scores
from ngrpo_train.update.policy import update

from ..oracles import Spy, advantages_of, assert_same_gradient

P, G, B, K, STEPS = 3, 4, 2, 2, 5
PROMPTS = [Prompt(text, i) for i, text in enumerate(["a large red circle", "a dog", "two cats on a mat"])]
NO_CLIPPING = float("inf")


def algorithm_of(**settings):
    recipe = Recipe(
        prompts=Prompts(per_rank=P),
        sampling=Sampling(num_inference_steps=STEPS),
        algorithm=Neighbor(num_generations=G, num_anchors=B, num_train_steps=K, step_range=(0.0, 0.8), **settings),
        rewards={"shapes_verifier": Reward()},
    )
    return make_algorithm(recipe)


def gradients(flux, algorithm, groups, advantages, **changes):
    """The gradients of each optimizer step of one update, by parameter name, and the update's statistics."""
    spy = Spy(flux, changes.pop("lr", 0.0))
    settings = replace(algorithm.settings, **changes)
    stats = update(flux, spy, groups, advantages, LeapingPolicy(settings), settings, NO_CLIPPING)
    return spy.seen, stats


# --- the gradient


def old_points(groups, old_policy, theta_points):
    """Where the old policy's anchors stand, [P, K, B, D], for theta = theta_old."""
    dt = (groups.sigma_before_PK - groups.sigma_after_PK).double()[:, :, None, None]
    if old_policy == "exact":
        return theta_points.detach()
    if old_policy == "cached":
        return groups.latents_PKBS.flatten(3).double() - dt * groups.velocity_PKBS.flatten(3).double()
    every = groups.candidates_PKGS.flatten(3).double()
    return torch.stack([every[p][:, groups.anchor_PB[p]] for p in range(P)])


def model_in_float64(flux):
    """(transformer, velocity function) with the weights of `flux`, for K x B anchors of one prompt."""
    transformer = copy.deepcopy(flux.transformer).double().eval()

    def velocity(groups, p, k):
        conditioning = groups.conditioning
        rows = torch.full((B,), p)
        return transformer(
            hidden_states=groups.latents_PKBS[p, k].double(),
            timestep=groups.sigma_before_PK[p, k].double().expand(B),
            guidance=torch.full((B,), flux.sampling.guidance_scale).double(),
            encoder_hidden_states=conditioning.prompt_embeds[rows].double(),
            pooled_projections=conditioning.pooled[rows].double(),
            txt_ids=conditioning.txt_ids,
            img_ids=flux.adapter._img_ids,
        ).sample.flatten(1)

    return transformer, velocity


def written_out(flux, groups, advantages, settings):
    """Gradient of the loss as the paper prints it, by parameter name, and the log-ratios [P, K, B, G]."""
    transformer, velocity = model_in_float64(flux)
    dt = (groups.sigma_before_PK - groups.sigma_after_PK).double()
    theta = torch.stack(
        [
            torch.stack(
                [groups.latents_PKBS[p, k].flatten(1).double() - dt[p, k] * velocity(groups, p, k) for k in range(K)]
            )
            for p in range(P)
        ]
    )
    candidates = groups.candidates_PKGS.flatten(3).double()
    temperature = candidates.shape[-1] if settings.temperature == "dim" else settings.temperature

    def log_policy(points):
        sqdist = (candidates[:, :, None] - points[:, :, :, None]).square().sum(-1)
        return (-sqdist / temperature).log_softmax(-1)  # Eq. 8

    log_old = log_policy(old_points(groups, settings.old_policy, theta))
    log_ratio = log_policy(theta) - log_old
    ratio = log_ratio.exp()  # Eq. 10
    gain = advantages.double()[:, None, None]
    clipped = ratio.clamp(1 - settings.clip_range, 1 + settings.clip_range)
    objective = torch.minimum(gain * ratio, gain * clipped).sum(-1)  # Eq. 9
    divergence = -(log_old.exp() * log_ratio).sum(-1)
    active = (gain != 0).any(-1)  # a flat group adds nothing at all
    loss = (active * (settings.kl_coef * divergence - objective)).mean()
    loss.backward()
    found = {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}
    return found, loss.item(), log_ratio.detach()


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(
    "old_policy, temperature, clip_range, kl_coef",
    [
        ("exact", 1.0, 1e-4, 0.0),
        ("exact", "dim", 1e-4, 0.3),  # whose divergence has no gradient at theta_old
        ("cached", 1.0, 1e-4, 0.0),
        ("literal", "dim", 0.003, 0.0),
        ("literal", "dim", 0.003, 0.5),
    ],
)
def test_gradient_is_that_of_the_paper(tiny_dev, load_flux, tuning, old_policy, temperature, clip_range, kl_coef):
    algorithm = algorithm_of(old_policy=old_policy, temperature=temperature, clip_range=clip_range, kl_coef=kl_coef)
    flux = moved(load_flux(tiny_dev, tuning=tuning, solver="dpmpp_2m", num_inference_steps=STEPS))
    groups = algorithm.explore(flux, PROMPTS, step=0)
    if old_policy == "cached":  # a rollout by another model, or the ratio would be 1 here as well
        groups = replace(groups, velocity_PKBS=groups.velocity_PKBS * 1.0002)
    advantages = advantages_of(algorithm, P, G, flat=[1])
    expected, loss, log_ratio = written_out(flux, groups, advantages, algorithm.settings)
    [found], stats = gradients(flux, algorithm, groups, advantages)
    assert_same_gradient(found, expected, 1e-4)
    assert stats.loss.item() == pytest.approx(loss, abs=1e-5)
    if old_policy != "exact":
        ratio = log_ratio[[0, 2]].exp()
        assert 0.05 < ((ratio - 1).abs() > clip_range).double().mean() < 0.95
        assert stats.last.ratio_min.item() == pytest.approx(ratio.min().item(), rel=1e-3)
        assert stats.last.ratio_max.item() == pytest.approx(ratio.max().item(), rel=1e-3)


def moved(flux):
    """LoRA begins at zero, where half of its gradients are."""
    if flux.spec.tuning == "lora":
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in flux.trainable.values():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return flux


@pytest.mark.parametrize("batch", [2, 4, 6])
def test_chunks_give_the_same_gradient(tiny_dev, load_flux, batch):
    algorithm = algorithm_of(old_policy="literal", temperature="dim", kl_coef=0.1)
    advantages = advantages_of(algorithm, P, G, flat=[0])
    results = []
    for update_batch in (0, batch):
        flux = load_flux(tiny_dev, num_inference_steps=STEPS, update_batch=update_batch)
        if not results:
            groups = algorithm.explore(flux, PROMPTS, step=0)
        results.append(gradients(flux, algorithm, groups, advantages))
    ([whole], stats), ([chunked], chunked_stats) = results
    assert_same_gradient(chunked, whole, 1e-5)
    torch.testing.assert_close(chunked_stats.loss, stats.loss)
    torch.testing.assert_close(chunked_stats.grad_norm, stats.grad_norm)
    for name in ("velocity_grad_norm_by_step", "rows_by_step", "ratio_max", "ratio_min", "rows"):
        torch.testing.assert_close(getattr(chunked_stats.last, name), getattr(stats.last, name), rtol=1e-4, atol=1e-6)
    for name, total in stats.last.sums.items():
        torch.testing.assert_close(chunked_stats.last.sums[name], total, rtol=1e-3, atol=1e-4)


# --- old policies


def log_ratio_extremes(flux, algorithm, groups, advantages, old_policy):
    _, stats = gradients(flux, algorithm, groups, advantages, old_policy=old_policy)
    return torch.stack([stats.last.ratio_min, stats.last.ratio_max]).log()


def test_old_policies_agree_after_an_euler_rollout(tiny_dev, load_flux):
    """One Euler step of the old model is then how the candidates came about, by whatever name."""
    flux = load_flux(tiny_dev, solver="euler", num_inference_steps=STEPS)
    algorithm = algorithm_of(temperature="dim", clip_range=0.1)
    groups, advantages = algorithm.explore(flux, PROMPTS, step=0), advantages_of(algorithm, P, G)
    [exact], _ = gradients(flux, algorithm, groups, advantages)
    for old_policy in ("cached", "literal"):
        [other], _ = gradients(flux, algorithm, groups, advantages, old_policy=old_policy)
        assert_same_gradient(other, exact, 1e-4)
        assert log_ratio_extremes(flux, algorithm, groups, advantages, old_policy).abs().max() < 1e-4


def test_literal_is_biased_after_a_multistep_rollout(tiny_dev, load_flux):
    flux = load_flux(tiny_dev, solver="dpmpp_2m", num_inference_steps=STEPS)
    algorithm = algorithm_of(clip_range=0.1)
    groups, advantages = algorithm.explore(flux, PROMPTS, step=0), advantages_of(algorithm, P, G)
    assert (log_ratio_extremes(flux, algorithm, groups, advantages, "exact") == 0).all()
    assert log_ratio_extremes(flux, algorithm, groups, advantages, "cached").abs().max() < 1e-2
    assert log_ratio_extremes(flux, algorithm, groups, advantages, "literal").abs().max() > 1


def test_later_updates_use_the_policy_before_the_first(tiny_dev, load_flux):
    """`exact` with B updates: block u holds anchor u, and its old policy is theta_old's, though theta has moved."""
    flux = load_flux(tiny_dev, num_inference_steps=STEPS)
    algorithm = algorithm_of(temperature="dim", clip_range=0.5, updates_per_iteration=B)
    groups, advantages = algorithm.explore(flux, PROMPTS, step=0), advantages_of(algorithm, P, G)
    start = {name: parameter.detach().clone() for name, parameter in flux.trainable.items()}
    (first, second), stats = gradients(flux, algorithm, groups, advantages, lr=2e-3)
    assert stats.first.ratio_min == stats.first.ratio_max == 1
    assert stats.last.ratio_max > 1.0001

    def anchor(block):
        return replace(
            groups,
            anchor_PB=groups.anchor_PB[:, block : block + 1],
            latents_PKBS=groups.latents_PKBS[:, :, block : block + 1],
            velocity_PKBS=groups.velocity_PKBS[:, :, block : block + 1],
        )

    single = {"num_anchors": 1, "updates_per_iteration": 1}
    restore(flux, start)
    [expected], _ = gradients(flux, algorithm, anchor(0), advantages, **single, lr=2e-3)
    assert_same_gradient(first, expected, 1e-5)
    # The second block alone, from the moved weights, with theta_old's velocities as the cached ones.
    with torch.no_grad():
        moved_weights = {name: parameter.clone() for name, parameter in flux.trainable.items()}
        restore(flux, start)
        velocity = torch.stack(
            [
                torch.stack(
                    [
                        flux.velocity(
                            groups.latents_PKBS[p, k, 1:],
                            groups.sigma_before_PK[p, k][None],
                            groups.conditioning.rows(torch.tensor([p])),
                        )
                        for k in range(K)
                    ]
                )
                for p in range(P)
            ]
        )
        restore(flux, moved_weights)
    later = replace(anchor(1), velocity_PKBS=velocity)
    [expected], _ = gradients(flux, algorithm, later, advantages, **single, old_policy="cached")
    assert_same_gradient(second, expected, 1e-3)


def restore(flux, weights):
    with torch.no_grad():
        for name, parameter in flux.trainable.items():
            parameter.copy_(weights[name])


def test_mismatch_is_between_rollout_and_training_forward(tiny_dev, load_flux):
    flux = load_flux(tiny_dev, num_inference_steps=STEPS)
    algorithm = algorithm_of(temperature="dim", updates_per_iteration=B)
    groups, advantages = algorithm.explore(flux, PROMPTS, step=0), advantages_of(algorithm, P, G, flat=[2])
    _, stats = gradients(flux, algorithm, groups, advantages, lr=1.0)
    assert stats.first.sums["rollout_mismatch"] / stats.first.rows < 1e-5
    assert stats.first.sums["mismatch_log_ratio_std"] / stats.first.rows < 1e-5
    off = replace(groups, velocity_PKBS=groups.velocity_PKBS / 1.01)
    flux = load_flux(tiny_dev, num_inference_steps=STEPS)
    _, stats = gradients(flux, algorithm, off, advantages)
    assert stats.first.rows == 2 * K
    assert (stats.first.sums["rollout_mismatch"] / stats.first.rows).item() == pytest.approx(0.01, rel=1e-3)
    assert stats.first.sums["mismatch_log_ratio_std"] / stats.first.rows > 1e-4


# --- groups without signal


def test_flat_groups_are_skipped_before_any_forward(tiny_dev, load_flux, monkeypatch):
    flux = load_flux(tiny_dev, num_inference_steps=STEPS)
    algorithm = algorithm_of()
    groups = algorithm.explore(flux, PROMPTS, step=0)
    sizes = []
    velocity = FlowModel.velocity

    def counted(self, x_NS, *rest):
        sizes.append(len(x_NS))
        return velocity(self, x_NS, *rest)

    monkeypatch.setattr(FlowModel, "velocity", counted)
    spy = Spy(flux)
    assert update(flux, spy, groups, torch.zeros(P, G), algorithm.policy, algorithm.settings, 1.0) is None
    assert (sizes, spy.seen) == ([], [])
    gradients(flux, algorithm, groups, advantages_of(algorithm, P, G, flat=[0, 2]))
    assert sizes == [1 * K * B]


@pytest.mark.parametrize("reference_coef", [0.0, 0.5])
def test_ranks_with_fewer_rows_make_as_many_forwards(tiny_dev, load_flux, monkeypatch, reference_coef):
    """A sharded forward is a collective: rank 1 has one active prompt, rank 0 three, in batches of two rows."""
    flux = load_flux(tiny_dev, tuning="lora", num_inference_steps=STEPS, update_batch=2 * B)
    algorithm = algorithm_of(reference_coef=reference_coef)
    groups = algorithm.explore(flux, PROMPTS, step=0)
    advantages = torch.cat([advantages_of(algorithm, P, G), advantages_of(algorithm, P, G, flat=[0, 2])])
    sizes = {0: [], 1: []}
    velocity = FlowModel.velocity

    def counted(self, x_NS, *rest):
        sizes[processes.rank()].append((len(x_NS), torch.is_grad_enabled()))
        return velocity(self, x_NS, *rest)

    monkeypatch.setattr(FlowModel, "velocity", counted)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        found.append(gradients(flux, algorithm, groups, advantages))
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) == 3 * (2 if reference_coef else 1)

    # The rank that fills its batches up counts its own rows only.
    monkeypatch.setattr(processes, "world_size", lambda: 1)
    monkeypatch.setattr(processes, "rank", lambda: 0)
    alone, stats = gradients(flux, algorithm, groups, advantages[P:])
    assert_same_gradient(found[1][0][0], alone[0], 1e-5)
    torch.testing.assert_close(found[1][1].loss, stats.loss)
    assert found[1][1].last.rows == stats.last.rows == K


def test_flat_groups_add_nothing_and_count_in_the_mean(tiny_dev, load_flux):
    flux = load_flux(tiny_dev, num_inference_steps=STEPS)
    algorithm = algorithm_of()
    groups = algorithm.explore(flux, PROMPTS, step=0)
    advantages = advantages_of(algorithm, P, G)
    lone = torch.zeros(P, G)
    parts = []
    for p in range(P):
        only = lone.clone()
        only[p] = advantages[p]
        parts.append(gradients(flux, algorithm, groups, only)[0][0])
    [whole], _ = gradients(flux, algorithm, groups, advantages)
    assert_same_gradient({name: sum(part[name] for part in parts) for name in whole}, whole, 1e-5)


def test_shuffled_rewards_permute_the_advantages_of_each_group(tiny_dev):
    values = torch.rand(1, 5, 12, generator=torch.Generator().manual_seed(0))
    scores = Scores(("shapes_verifier",), ("shapes_verifier",), (1.0,), values)
    kept = algorithm_of().advantages(scores, step=3)
    shuffled = algorithm_of(shuffle_rewards=True).advantages(scores, step=3)
    # another order of the same rewards rounds their mean otherwise
    torch.testing.assert_close(shuffled.sort(1).values, kept.sort(1).values, rtol=1e-5, atol=1e-7)
    orders = (kept[:, None] - shuffled[:, :, None]).abs().argmin(2)
    assert not (orders == torch.arange(12)).all(1).any()
    assert torch.equal(shuffled, algorithm_of(shuffle_rewards=True).advantages(scores, step=3))
    assert not torch.equal(shuffled, algorithm_of(shuffle_rewards=True).advantages(scores, step=4))
    assert len({tuple(order.tolist()) for order in orders}) == 5, "every group has an order of its own"


# --- the guarded step


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step(tiny_dev, load_flux, bad):
    flux = load_flux(tiny_dev, num_inference_steps=STEPS)
    algorithm = algorithm_of()
    groups, advantages = algorithm.explore(flux, PROMPTS, step=0), advantages_of(algorithm, P, G)
    optimizer = torch.optim.AdamW(flux.trainable.values(), lr=1e-3, fused=True)

    def step(groups):
        return update(flux, optimizer, groups, advantages, algorithm.policy, algorithm.settings, 1.0)

    def everything():
        states = optimizer.state_dict()["state"]
        moments = [value.clone() for state in states.values() for value in state.values()]
        return [p.detach().clone() for p in flux.trainable.values()] + moments

    assert step(groups).skipped == 0
    before = everything()
    candidates_PKGS = groups.candidates_PKGS.clone()
    candidates_PKGS[0, 0, 0, 0, 0] = bad
    stats = step(replace(groups, candidates_PKGS=candidates_PKGS))
    assert stats.skipped == 1
    assert stats.grad_norm == 0
    for kept, value in zip(before, everything(), strict=True):
        assert torch.equal(kept, value)
    assert all(parameter.grad is None for parameter in flux.trainable.values())

    assert step(groups).skipped == 0
    assert not all(torch.equal(kept, value) for kept, value in zip(before, everything(), strict=True))


def test_gradients_are_clipped_to_the_norm_and_reported_before(tiny_dev, load_flux):
    flux = load_flux(tiny_dev, num_inference_steps=STEPS)
    algorithm = algorithm_of()
    groups, advantages = algorithm.explore(flux, PROMPTS, step=0), advantages_of(algorithm, P, G)
    norms = []
    for limit in (NO_CLIPPING, 1e-3):
        spy = Spy(flux)
        stats = update(flux, spy, groups, advantages, algorithm.policy, algorithm.settings, limit)
        norms.append(torch.cat([gradient.flatten() for gradient in spy.seen[0].values()]).norm())
        torch.testing.assert_close(stats.grad_norm, norms[0], rtol=1e-4, atol=0)
    assert norms[0] > 1e-3
    assert norms[1].item() == pytest.approx(1e-3, rel=1e-4)


# --- the tether


def test_reference_pulls_towards_the_base(tiny_dev, load_flux):
    """Its gradient is that of coef * mean |v_theta - v_base|^2, over active prompts out of all."""
    flux = moved(load_flux(tiny_dev, tuning="lora", num_inference_steps=STEPS))
    algorithm = algorithm_of()
    groups, advantages = algorithm.explore(flux, PROMPTS, step=0), advantages_of(algorithm, P, G, flat=[0])
    [plain], plain_stats = gradients(flux, algorithm, groups, advantages)
    [tethered], stats = gradients(flux, algorithm, groups, advantages, reference_coef=0.5)
    pull = {name: tethered[name].double() - plain[name].double() for name in plain}

    transformer, velocity = model_in_float64(flux)
    distances = []
    for p in (1, 2):
        for k in range(K):
            theta = velocity(groups, p, k)
            transformer.disable_adapters()
            with torch.no_grad():
                base = velocity(groups, p, k)
            transformer.enable_adapters()
            distances.append((theta - base).square().mean())
    distance = torch.stack(distances).sum() / (P * K)
    (0.5 * distance).backward()
    expected = {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}
    assert_same_gradient(pull, expected, 1e-3)
    assert (stats.loss - plain_stats.loss).item() == pytest.approx(0.5 * distance.item(), rel=1e-4)

    # Following it, at no advantage worth the name, brings the model back to the base.
    spy = Spy(flux, lr=1e-2)
    settings = replace(algorithm.settings, reference_coef=1.0)
    policy, faint = LeapingPolicy(settings), 1e-9 * advantages
    losses = [update(flux, spy, groups, faint, policy, settings, 1.0).loss.item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


# --- what is reported


def test_velocity_gradient_norm_of_each_step(tiny_dev, load_flux):
    """At ratio 1 the gradient of an anchor's term is (2 dt / temperature) sum_i A_i x_i, the same for every anchor."""
    flux = load_flux(tiny_dev, num_inference_steps=STEPS)
    algorithm = algorithm_of(temperature=2.5)
    groups, advantages = algorithm.explore(flux, PROMPTS, step=0), advantages_of(algorithm, P, G, flat=[1])
    _, stats = gradients(flux, algorithm, groups, advantages)
    expected = {step: [] for step in range(STEPS)}
    for p in (0, 2):
        for k, step in enumerate(groups.step_PK[p].tolist()):
            dt = groups.sigma_before_PK[p, k] - groups.sigma_after_PK[p, k]
            pull = torch.einsum("g,gtc->tc", advantages[p].double(), groups.candidates_PKGS[p, k].double())
            expected[step].append(2 * dt / 2.5 * pull.norm())
    assert stats.last.rows_by_step.tolist() == [len(norms) for norms in expected.values()]
    for step, norms in expected.items():
        total = stats.last.velocity_grad_norm_by_step[step].item()
        assert total == pytest.approx(float(sum(norms)), rel=1e-4)
