"""BranchGRPO's tree on a tiny FLUX, its advantages and its pruning, against trees worked by hand."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ngrpo_train.algorithms import make_algorithm, stochastic
from ngrpo_train.algorithms.branch_grpo import fused, kept_leaves, sibling_noise
from ngrpo_train.draws import stream
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.algorithms import Algorithm
from ngrpo_train.recipe.sections import Prompts, Recipe, Reward, Sampling
from ngrpo_train.rewards import Scores

N, G, SHIFT, SPLITS = 6, 8, 3.0, (0, 2, 3)
EDGES = [2, 2, 4, 8, 8]  # of the steps 0 to 4; step 5 is the ODE's
PROMPTS = [Prompt("a large red circle on a blue background", 0), Prompt("a dog", 1)]


def algorithm_of(per_rank=2, **settings):
    tree = {"num_generations": G, "branch_steps": SPLITS, "step_range": (0.0, 1.0)}
    recipe = Recipe(
        prompts=Prompts(per_rank=per_rank),
        sampling=Sampling(num_inference_steps=N, shift=SHIFT),
        algorithm=replace(Algorithm.of("branch_grpo"), **tree | settings),
        rewards={"shapes_verifier": Reward()},
    )
    return make_algorithm(recipe)


@pytest.fixture(scope="module")
def flux(tiny_dev, load_flux):
    return load_flux(tiny_dev)


# --- the tree


def noise_of(prompt, iteration, count, purpose, flux):
    return torch.randn(count, *flux.latent_shape, generator=stream(0, iteration, prompt.slot, purpose))


@torch.no_grad()
def grown(flux, prompt, iteration, spread):
    """For each step, the state before, the velocity there and the noise of its edges [edges]; and the leaves' ends."""
    times = [1 - i / N for i in range(N + 1)]
    sigmas = [SHIFT * t / (1 + (SHIFT - 1) * t) for t in times]
    x, steps = noise_of(prompt, iteration, 1, "noise", flux), []
    for i in range(N):
        s, t = sigmas[i], sigmas[i + 1]
        conditioning = flux.encode([prompt.text]).rows(torch.zeros(len(x), dtype=torch.int64))
        v = flux.velocity(x, torch.full((len(x),), s), conditioning)
        if i == N - 1:
            return steps, x - (s - t) * v
        if i in SPLITS:
            parents = [e // 2 for e in range(2 * len(x))]
            common = noise_of(prompt, iteration, len(x), f"noise/{i}/common", flux)
            own = noise_of(prompt, iteration, 2 * len(x), f"noise/{i}", flux)
            noise = (common[parents] + spread * own) / math.sqrt(1 + spread**2)
            x, v = x[parents], v[parents]
        else:
            noise = noise_of(prompt, iteration, len(x), f"noise/{i}", flux)
        steps.append((x, v, noise))
        std = 0.3 * math.sqrt(s - t)
        x = x - (s - t) * v - std**2 / (2 * s) * (x + (1 - s) * v) + std * noise
    raise AssertionError


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()


def place(index, trained=range(N - 1)):
    """(step, edge) of an advantage."""
    for step in trained:
        if index < EDGES[step]:
            return step, index
        index -= EDGES[step]
    raise AssertionError


@pytest.mark.parametrize("spread", [4.0, 0.5])
@pytest.mark.parametrize("per_rank", [1, 2])
def test_grows_the_tree_that_is_written_out(flux, per_rank, spread):
    groups = algorithm_of(per_rank, branch_spread=spread).explore(flux, PROMPTS, 7)
    assert groups.step_PM.shape == (2, sum(EDGES))
    for p, prompt in enumerate(PROMPTS):
        steps, final = grown(flux, prompt, 7, spread)
        assert [len(x) for x, _, _ in steps] == EDGES
        assert_close(groups.final_PGS[p], final)
        assert groups.advantage_PM[p].sort().values.tolist() == list(range(sum(EDGES)))
        for m, (step, index) in enumerate(
            zip(groups.step_PM[p].tolist(), groups.advantage_PM[p].tolist(), strict=True)
        ):
            assert place(index)[0] == step
            x, v, noise = (each[place(index)[1]] for each in steps[step])
            assert_close(groups.latents_PMS[p, m], x)
            assert_close(groups.velocity_PMS[p, m], v)
            torch.testing.assert_close(groups.noise_PMS[p, m], noise)


def test_siblings_share_what_was_before_their_split(flux):
    groups = algorithm_of().explore(flux, PROMPTS[:1], 0)
    by_edge = {place(index): m for m, index in enumerate(groups.advantage_PM[0].tolist())}
    for step, edges in enumerate(EDGES):
        before = torch.stack([groups.latents_PMS[0, by_edge[step, e]] for e in range(edges)])
        distances = torch.cdist(before.flatten(1), before.flatten(1))
        alike = (distances < 1e-3).int()
        family = 2 if step in SPLITS else 1
        assert torch.equal(alike, torch.block_diag(*[torch.ones(family, family)] * (edges // family)).int())


def test_a_tree_depends_on_iteration_prompt_and_nothing_else(flux):
    both = algorithm_of().explore(flux, PROMPTS, 0)
    alone = algorithm_of().explore(flux, PROMPTS[1:], 0)
    assert torch.equal(alone.advantage_PM[0], both.advantage_PM[1])
    assert torch.equal(alone.noise_PMS[0], both.noise_PMS[1])
    assert not torch.equal(both.advantage_PM[0], both.advantage_PM[1])
    other = algorithm_of().explore(flux, PROMPTS[1:], 1)
    assert not torch.equal(other.advantage_PM, alone.advantage_PM)
    assert (other.final_PGS - alone.final_PGS).abs().max() > 0.1


@pytest.mark.parametrize("spread", [0.5, 1.0, 4.0])
def test_siblings_noises_are_normal_and_correlate_by_the_spread(spread):
    branches, D = 4, 40_000
    flux = SimpleNamespace(latent_shape=(D // 4, 4), device=torch.device("cpu"))
    noise = sibling_noise(flux, [{"seed": 0, "step": 0, "slot": 0}], branches, spread, 3)[0].flatten(1).double()
    expected = torch.block_diag(*[torch.full((2, 2), 1 / (1 + spread**2))] * branches).double().fill_diagonal_(1)
    assert (noise @ noise.T / D - expected).abs().max() < 5 * math.sqrt(2 / D)
    assert noise.pow(4).mean().item() == pytest.approx(3, abs=5 * math.sqrt(96 / D / 8))


# --- advantages


def test_leaf_rewards_are_fused_by_their_mean():
    rewards = torch.tensor([[[1.0, 3, 2, 8], [0, 4, 4, 4]]])
    assert torch.equal(fused(rewards, 4), rewards)
    assert torch.equal(fused(rewards, 2), torch.tensor([[[2.0, 5], [2, 4]]]))
    assert torch.equal(fused(rewards, 1), torch.tensor([[[3.5], [3]]]))


TREE_OF_FOUR = {"num_generations": 4, "branch_steps": (0, 2)}  # edges 2, 2, 4, 4, 4


def scores_of(*rewards, weights=(1.0,)):
    names = tuple("ab"[: len(rewards)])
    return Scores(names, names, weights, torch.tensor(rewards))


def test_advantages_are_standardised_depth_by_depth():
    """Leaves 1, 3, 2, 8: edges of the first steps have 2 and 5, which are one half of sqrt 2 from their mean."""
    algorithm = algorithm_of(**TREE_OF_FOUR)
    advantages = algorithm.advantages(scores_of([[1.0, 3, 2, 8], [5, 5, 5, 5]]), 0)
    half, std = math.sqrt(0.5), math.sqrt(29 / 3)
    leaves = [-2.5 / std, -0.5 / std, -1.5 / std, 4.5 / std]
    torch.testing.assert_close(advantages[0], torch.tensor([-half, half] * 2 + leaves * 3))
    assert (advantages[1] == 0).all()


def test_whether_a_group_spreads_is_said_of_its_leaves():
    """Leaves 1, 3, 2, 8 have a standard deviation of 3.1, their halves' means 2 and 5 one of 2.1."""
    scores = scores_of([[1.0, 3, 2, 8], [1.0, 2, 1, 2]])
    whole = algorithm_of(**TREE_OF_FOUR).advantages(scores, 0)
    kept = algorithm_of(min_reward_std=2.5, **TREE_OF_FOUR).advantages(scores, 0)
    assert torch.equal(kept[0], whole[0])
    assert (kept[1] == 0).all()
    assert (algorithm_of(min_reward_std=3.2, **TREE_OF_FOUR).advantages(scores, 0) == 0).all()


def test_several_rewards_are_fused_and_standardised_one_by_one():
    scores = scores_of([[1.0, 3, 2, 8]], [[10.0, 10, 10, 40]], weights=(2.0, -1.0))
    advantages = algorithm_of(**TREE_OF_FOUR).advantages(scores, 0)
    half = math.sqrt(0.5)
    torch.testing.assert_close(advantages[0, :4], torch.tensor([-2 * half + half, 2 * half - half] * 2))
    a, b = ((each - each.mean()) / each.std() for each in torch.tensor([[1.0, 3, 2, 8], [10, 10, 10, 40]]))
    torch.testing.assert_close(advantages[0, 4:], (2 * a - b).repeat(3))


def test_only_trained_steps_have_advantages():
    scores = scores_of([[1.0, 3, 2, 8]])
    whole = algorithm_of(**TREE_OF_FOUR).advantages(scores, 0)
    pruned = algorithm_of(depth_pruning=1, depth_pruning_every=2, **TREE_OF_FOUR)
    assert whole.shape == (1, 2 + 2 + 4 + 4 + 4)
    assert torch.equal(pruned.advantages(scores, 0), whole[:, :12])
    half = algorithm_of(step_range=(1 / 6, 0.5), **TREE_OF_FOUR)
    assert torch.equal(half.advantages(scores, 0), whole[:, 2:8])


def test_before_the_first_split_nothing_is_trained(flux):
    """There is one branch, and nothing to compare it with."""
    algorithm = algorithm_of(num_generations=4, branch_steps=(1, 2))
    groups = algorithm.explore(flux, PROMPTS[:1], 0)
    assert sorted(set(groups.step_PM[0].tolist())) == [1, 2, 3, 4]
    assert algorithm.advantages(scores_of([[1.0, 3, 2, 8]]), 0).shape == (1, 2 + 4 + 4 + 4)


# --- pruning


def test_which_leaves_are_kept():
    advantages = torch.tensor([[0.1, 0.5, 0.5, 0.5, -1, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]])
    kept = {how: [row.nonzero().flatten().tolist() for row in kept_leaves(advantages, how)] for how in HOW}
    assert kept["none"] == [list(range(8))] * 2
    assert kept["parent_top1"] == [[1, 2, 5, 6], [0, 2, 4, 6]]  # of two equals the first
    assert kept["extremes"] == [[3, 4, 5, 6], [0, 1, 6, 7]]  # -1, 0 and 0.5, 2


HOW = ("none", "parent_top1", "extremes")
KEPT = {  # of the leaves of each prompt, below
    "none": [set(range(8))] * 2,
    "parent_top1": [{1, 2, 5, 7}, {0, 3, 4, 6}],
    "extremes": [{0, 2, 5, 6}, {0, 1, 6, 7}],
}
SCORES = scores_of([[0.0, 4, 6, 3, 3.5, 5, 1, 2], [9.0, 1, 2, 5, 6, 3, 8, 0]])


@pytest.fixture
def trained(flux, monkeypatch):
    """The transitions that an update would train."""
    monkeypatch.setattr(stochastic, "update", lambda flux, optimizer, groups, *rest: groups)

    def of(step, **settings):
        algorithm = algorithm_of(**settings)
        groups = algorithm.explore(flux, PROMPTS, step)
        return groups, algorithm.update(flux, None, groups, algorithm.advantages(SCORES, step))

    return of


@pytest.mark.parametrize("depth_pruning, iteration, steps", [(0, 0, range(5)), (1, 0, range(4))])
@pytest.mark.parametrize("how", HOW)
def test_width_pruning_takes_leaves_out_after_the_last_split(trained, how, depth_pruning, iteration, steps):
    explored, kept = trained(iteration, width_pruning=how, depth_pruning=depth_pruning)
    for p in range(2):
        edges = [place(index, steps) for index in kept.advantage_PM[p].tolist()]
        expected = {(s, e) for s in steps for e in range(EDGES[s]) if s <= SPLITS[-1] or e in KEPT[how][p]}
        assert (len(edges), set(edges)) == (len(expected), expected)
        assert kept.step_PM[p].tolist() == [step for step, _ in edges]
        order = [index for index in explored.advantage_PM[p].tolist() if place(index, steps) in expected]
        assert kept.advantage_PM[p].tolist() == order, "in the order they have"
        where = {index: m for m, index in enumerate(explored.advantage_PM[p].tolist())}
        for m, index in enumerate(kept.advantage_PM[p].tolist()):
            assert torch.equal(kept.noise_PMS[p, m], explored.noise_PMS[p, where[index]])


def test_depth_pruning_moves_with_the_iteration(trained):
    steps = [
        sorted(
            set(
                trained(iteration, branch_steps=(0, 1, 2), depth_pruning=1, depth_pruning_every=2)[1]
                .step_PM[0]
                .tolist()
            )
        )
        for iteration in (0, 1, 2, 4)
    ]
    assert steps == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 4]]


def test_optimizer_steps_share_the_edges(trained):
    _, kept = trained(0)
    blocks = kept.blocks(3)
    assert [block.rows_per_prompt for block in blocks] == [8, 8, 8]
    for p in range(2):
        assert sorted(index for block in blocks for index in block.advantage_PM[p].tolist()) == list(range(24))
    assert [block.rows_per_prompt for block in kept.blocks(5)] == [5, 5, 5, 5, 4]
