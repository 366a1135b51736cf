"""Each algorithm's update against Eq. 4 in float64, through the model; on two ranks; and a run that is resumed."""

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal

from ngrpo_train.algorithms import make_algorithm, stochastic
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.algorithms import Algorithm
from ngrpo_train.recipe.sections import Optimizer, Prompts, Recipe, Reward, Sampling
from ngrpo_train.update.policy import update

from ..oracles import Spy, advantages_of, assert_same_vector
from ..runs import Run, assert_same_run, figures

P, G, N = 3, 4, 5
TEXTS = ["a large red circle", "a dog", "two cats on a mat", "a tree"]
PROMPTS = [Prompt(text, slot) for slot, text in enumerate(TEXTS[:P])]
SETTINGS = {
    "flow_grpo": {},
    "dance_grpo": {"num_train_steps": 2},
    "mix_grpo": {"window_size": 2},
    "mix_grpo_flash": {"window_size": 2},
    "branch_grpo": {"branch_steps": (0, 2), "width_pruning": "parent_top1"},
}
each_algorithm = pytest.mark.parametrize("name", SETTINGS)
ETA = {"flow_grpo": 0.9, "dance_grpo": 0.3, "mix_grpo": 0.7, "mix_grpo_flash": 0.7, "branch_grpo": 0.3}
NO_CLIPPING = 1e30  # of the gradient
# Of the ratio, so that a second optimizer step has some on either side of a bound.
CLIP = {"flow_grpo": 1e-3, "dance_grpo": 1e-3, "mix_grpo": 5e-4, "mix_grpo_flash": 5e-4, "branch_grpo": 5e-3}


def algorithm_of(name, **settings):
    own = {"num_generations": G, "step_range": (0.0, 1.0), "updates_per_iteration": 1} | SETTINGS[name] | settings
    recipe = Recipe(
        prompts=Prompts(per_rank=P),
        sampling=Sampling(num_inference_steps=N),
        algorithm=replace(Algorithm.of(name), **own),
        rewards={"shapes_verifier": Reward()},
        optimizer=Optimizer(max_grad_norm=NO_CLIPPING),
    )
    return make_algorithm(recipe)


@pytest.fixture
def flux(tiny_dev, load_flux):
    return load_flux(tiny_dev, num_inference_steps=N)


# --- the gradient


def model_in_float64(flux):
    """A copy of the weights as they are now, and its velocity at the transitions of all prompts [P * M, T, C]."""
    transformer = copy.deepcopy(flux.transformer).double().eval()

    def velocity(groups):
        sigma = groups.sigma_before_PM.flatten().double()
        rows = torch.arange(len(groups.step_PM)).repeat_interleave(groups.rows_per_prompt)
        return transformer(
            hidden_states=groups.latents_PMS.flatten(0, 1).double(),
            timestep=sigma,
            guidance=torch.full_like(sigma, flux.sampling.guidance_scale),
            encoder_hidden_states=groups.conditioning.prompt_embeds[rows].double(),
            pooled_projections=groups.conditioning.pooled[rows].double(),
            txt_ids=groups.conditioning.txt_ids,
            img_ids=flux.adapter._img_ids,
        ).sample

    return transformer, velocity


def policy_at(groups, velocity, stds, sigmas):
    """N(mean, std^2 I) of Eq. 5 at every transition."""
    step = groups.step_PM.flatten()
    sigma, following, std = (
        torch.tensor(each, dtype=torch.float64)[step][:, None, None] for each in (sigmas[:-1], sigmas[1:], stds)
    )
    x = groups.latents_PMS.flatten(0, 1).double()
    mean = x - (sigma - following) * velocity - std**2 / (2 * sigma) * (x + (1 - sigma) * velocity)
    return Normal(mean, std)


def written_out(flux, groups, advantages, algorithm, old_model=None):
    """Gradient of the loss of these transitions at the model's weights, against the weights of `old_model`."""
    sigmas = algorithm.sigmas.double().tolist()
    eta, constant = ETA[algorithm.settings.name], algorithm.settings.name in ("dance_grpo", "branch_grpo")
    levels = [eta if constant else eta * (s / (1 - (t if s == 1 else s))) ** 0.5 for s, t in pairwise(sigmas)]
    stds = [level * (s - t) ** 0.5 for level, (s, t) in zip(levels, pairwise(sigmas), strict=True)]
    transformer, velocity = model_in_float64(flux)
    new = policy_at(groups, velocity(groups), stds, sigmas)
    with torch.no_grad():
        explored = policy_at(groups, groups.velocity_PMS.flatten(0, 1).double(), stds, sigmas)
        sample = explored.mean + explored.stddev * groups.noise_PMS.flatten(0, 1).double()
        old = policy_at(groups, (old_model or velocity)(groups), stds, sigmas)
    log_ratio = (new.log_prob(sample) - old.log_prob(sample)).mean((1, 2))
    ratio, low_high = log_ratio.exp(), algorithm.settings.clip_range
    gain = advantages.gather(1, groups.advantage_PM).flatten().double()
    objective = torch.minimum(gain * ratio, gain * ratio.clamp(1 - low_high, 1 + low_high))
    (-objective.mean()).backward()
    return torch.cat([p.grad.flatten() for p in transformer.parameters() if p.requires_grad]), log_ratio.detach()


def trained_blocks(algorithm, flux, groups, advantages, monkeypatch):
    """What each optimizer step trains, pruned where the algorithm prunes."""
    with monkeypatch.context() as patch:
        patch.setattr(stochastic, "update", lambda flux, optimizer, groups, *rest: groups)
        kept = algorithm.update(flux, None, groups, advantages)
    return kept.blocks(algorithm.settings.updates_per_iteration)


@pytest.mark.parametrize("updates", [1, 2])
@each_algorithm
def test_gradient_of_every_optimizer_step_is_that_of_eq_4(flux, name, updates, monkeypatch):
    """At theta_old, ratio 1, and then at a theta that has moved; a flat group counts in the mean and adds nothing."""
    algorithm = algorithm_of(name, updates_per_iteration=updates, clip_range=CLIP[name])
    groups, advantages = algorithm.explore(flux, PROMPTS, 0), advantages_of(algorithm, P, G, flat=[1])
    blocks = trained_blocks(algorithm, flux, groups, advantages, monkeypatch)
    _, old = model_in_float64(flux)
    first, log_ratio = written_out(flux, blocks[0], advantages, algorithm)
    assert (log_ratio == 0).all()
    rate = 0.005 / first.norm().item()
    spy = Spy(flux, rate)
    stats = algorithm.update(flux, spy, groups, advantages)
    assert len(spy.seen) == updates
    found = spy.vectors()
    assert_same_vector(found[0], first)
    assert stats.first.ratio_min == stats.first.ratio_max == 1
    assert stats.last.rows == 2 * blocks[-1].rows_per_prompt
    if updates == 2:
        with torch.no_grad():  # back to where the second optimizer step stood
            for parameter, gradient in zip(flux.trainable.values(), split_as(flux, found[1]), strict=True):
                parameter.add_(rate * gradient)
        second, log_ratio = written_out(flux, blocks[1], advantages, algorithm, old)
        assert_same_vector(found[1], second, 1e-3)
        ratio = log_ratio.view(P, -1)[[0, 2]].exp()
        assert 0 < ((ratio - 1).abs() > CLIP[name]).sum() < ratio.numel()
        assert stats.last.ratio_max.item() == pytest.approx(ratio.max().item(), rel=1e-5)
        assert stats.last.ratio_min.item() == pytest.approx(ratio.min().item(), rel=1e-5)


def split_as(flux, vector):
    sizes = [parameter.numel() for parameter in flux.trainable.values()]
    each = zip(vector.float().split(sizes), flux.trainable.values(), strict=True)
    return [part.view_as(parameter) for part, parameter in each]


@each_algorithm
def test_groups_without_signal_take_no_forward(flux, name, monkeypatch):
    algorithm = algorithm_of(name)
    groups = algorithm.explore(flux, PROMPTS, 0)
    [block] = trained_blocks(algorithm, flux, groups, advantages_of(algorithm, P, G), monkeypatch)
    sizes, velocity = [], FlowModel.velocity

    def counted(self, x_NS, *rest):
        sizes.append(len(x_NS))
        return velocity(self, x_NS, *rest)

    monkeypatch.setattr(FlowModel, "velocity", counted)
    spy = Spy(flux)
    assert algorithm.update(flux, spy, groups, advantages_of(algorithm, P, G, flat=[0, 1, 2])) is None
    assert (sizes, spy.seen) == ([], [])
    algorithm.update(flux, spy, groups, advantages_of(algorithm, P, G, flat=[0, 2]))
    assert sizes == [block.rows_per_prompt]


@each_algorithm
def test_batches_and_ranks_change_nothing(tiny_dev, load_flux, name, monkeypatch):
    """Four prompts on one rank, or two on each of two, whose gradients are averaged; in batches of five states."""
    algorithm = algorithm_of(name)
    prompts = [Prompt(text, slot) for slot, text in enumerate(TEXTS)]
    advantages = advantages_of(algorithm, 4, G, flat=[1])
    flux = load_flux(tiny_dev, num_inference_steps=N)
    spy, few = Spy(flux), load_flux(tiny_dev, num_inference_steps=N, update_batch=5)
    stats = algorithm.update(flux, spy, algorithm.explore(flux, prompts, 0), advantages)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        local = algorithm.explore(few, prompts[2 * rank : 2 * rank + 2], 0)
        alone = Spy(few)
        ranks.append((algorithm.update(few, alone, local, advantages), *alone.vectors()))
    assert_same_vector((ranks[0][1] + ranks[1][1]) / 2, spy.vectors()[0])
    torch.testing.assert_close((ranks[0][0].loss + ranks[1][0].loss) / 2, stats.loss, rtol=1e-4, atol=1e-6)
    assert ranks[0][0].last.rows + ranks[1][0].last.rows == stats.last.rows
    for figure in stats.last.sums:
        both = ranks[0][0].last.sums[figure] + ranks[1][0].last.sums[figure]
        torch.testing.assert_close(both, stats.last.sums[figure], rtol=1e-3, atol=1e-4)


def test_later_steps_of_a_tree_weigh_as_they_have_edges(flux, monkeypatch):
    """The mean is over edges: a step of four counts twice as much as one of two."""
    algorithm = algorithm_of("branch_grpo", width_pruning="none")
    groups, advantages = algorithm.explore(flux, PROMPTS, 0), advantages_of(algorithm, P, G)
    [block] = trained_blocks(algorithm, flux, groups, advantages, monkeypatch)
    parts = []
    for step in range(N - 1):
        chosen = (block.step_PM == step).nonzero()[:, 1].view(P, -1)
        spy = Spy(flux)
        update(flux, spy, block.take(chosen), advantages, algorithm.policy, algorithm.settings, NO_CLIPPING)
        parts.append(spy.vectors()[0] * chosen.shape[1])
    spy = Spy(flux)
    algorithm.update(flux, spy, groups, advantages)
    assert block.step_PM[0].bincount().tolist() == [2, 2, 4, 4]
    assert_same_vector(spy.vectors()[0], sum(parts) / 12)


# --- a whole run


@pytest.mark.parametrize(
    "changes, steps",
    [
        (
            {"algorithm.name": "mix_grpo_flash", "algorithm.window-size": "2", "algorithm.window-every": "1"},
            ["01", "12"],
        ),
        ({"algorithm.name": "branch_grpo", "algorithm.width-pruning": "extremes"}, ["012", "012"]),
    ],
    ids=["mix_grpo_flash", "branch_grpo"],
)
def test_a_resumed_run_is_the_straight_one(tmp_path: Path, changes: dict[str, str], steps: list[str]) -> None:
    """Bit for bit, the window included."""
    changes = changes | {"algorithm.updates-per-iteration": "2"}
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert Run(straight, changes | {"train.steps": "2"}).make() == 0
    assert Run(cut, changes | {"train.steps": "1"}).make() == 0
    assert Run(cut, changes | {"train.steps": "2"}, resume="latest").make() == 0
    assert_same_run(cut, straight, steps=2)
    trained = "velocity_grad_norm/step_"
    assert ["".join(sorted(n[-1] for n in row if n.startswith(trained))) for row in figures(straight)] == steps
