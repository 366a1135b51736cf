"""Which solver steps an algorithm makes random, which it trains, and what that asks of the transformer."""

# N solver steps, G candidates, B of them trained, K trained steps; an edge is a branch's way through one step.

from __future__ import annotations

import math
from dataclasses import dataclass

from ngrpo_train.recipe.sections import Recipe


def trainable_steps(recipe: Recipe) -> range:
    """Solver steps that may be trained: `algorithm.step_range`, and with an SDE never the last, which is the ODE's.

    Noise of the last step would stay in the picture.
    """
    first, last = (round(end * recipe.sampling.num_inference_steps) for end in recipe.algorithm.step_range)
    return range(first, last if recipe.algorithm.is_neighbor else min(last, recipe.sampling.num_inference_steps - 1))


def num_train_steps(recipe: Recipe) -> int:
    """K of `neighbor`, `flow_grpo` and `dance_grpo`: the recipe's, or where that is 0 what the authors train."""
    algorithm, most = recipe.algorithm, len(trainable_steps(recipe))
    if algorithm.num_train_steps or algorithm.is_neighbor:
        return algorithm.num_train_steps
    if algorithm.name == "dance_grpo":
        return min(most, max(1, int(0.6 * (recipe.sampling.num_inference_steps - 1))))
    return most


def window(recipe: Recipe, iteration: int) -> range:
    """MixGRPO's window (arXiv 2507.21802): it starts at the noisy end, moves on, and stays where it cannot."""
    algorithm, steps = recipe.algorithm, trainable_steps(recipe)
    moves = 0 if algorithm.window_frozen else iteration // algorithm.window_every
    start = steps.start + min(moves, len(steps) - algorithm.window_size)
    return range(start, start + algorithm.window_size)


def steps_after_window(recipe: Recipe, iteration: int) -> int:
    """Of MixGRPO-Flash, whose DPM-Solver++ takes a share of the steps that were left; at least one."""
    left = recipe.sampling.num_inference_steps - window(recipe, iteration).stop
    return max(1, math.floor(recipe.algorithm.compression * left + 1e-9))  # 0.2 of 20 is 4


def branch_steps(recipe: Recipe) -> tuple[int, ...]:
    """Solver steps at which BranchGRPO's tree splits; by default as its authors have them, 0, 3, 6, 9 of 20."""
    algorithm, N = recipe.algorithm, recipe.sampling.num_inference_steps
    if algorithm.branch_steps:
        return algorithm.branch_steps
    splits = int(math.log2(algorithm.num_generations))
    return tuple(max(i, 3 * i * N // 20) for i in range(splits))  # of few steps, one after the other


def branches(recipe: Recipe, step: int) -> int:
    """Of BranchGRPO's tree, the edges through a solver step."""
    return int(2 ** sum(split <= step for split in branch_steps(recipe)))


def tree_steps(recipe: Recipe, iteration: int) -> tuple[int, ...]:
    """Solver steps that BranchGRPO trains: all that may be from the first split on, which is where branches differ,
    but for those that depth pruning leaves out just now."""
    algorithm, steps = recipe.algorithm, trainable_steps(recipe)
    steps = range(max(steps.start, branch_steps(recipe)[0]), steps.stop)
    start = steps.stop - algorithm.depth_pruning - iteration // algorithm.depth_pruning_every
    start = max(start, min(branch_steps(recipe)[-1] + 1, steps.stop - algorithm.depth_pruning))
    return tuple(step for step in steps if not start <= step < start + algorithm.depth_pruning)


@dataclass(frozen=True, slots=True)
class Workload:
    """What one prompt asks of the transformer in one iteration."""

    generations: int
    """G."""
    rollout: int
    """Forwards of the rollout."""
    num_train_steps: int
    """K."""
    states: int
    """Forward-backwards: states that are trained, over all optimizer steps. B * K, but for a tree."""
    updates: int
    """Optimizer steps."""
    old_policy: int
    """Forwards before the first optimizer step, for the old policy of the states that are trained after it."""

    @staticmethod
    def of(recipe: Recipe, iteration: int = 0) -> Workload:
        algorithm, N = recipe.algorithm, recipe.sampling.num_inference_steps
        G = algorithm.num_generations
        rollout = G * N
        if algorithm.name == "branch_grpo":
            splits, trained = branch_steps(recipe), tree_steps(recipe, iteration)
            rollout = sum(2 ** sum(split < step for split in splits) for step in range(N))
            pruned = algorithm.width_pruning != "none"
            states = sum(branches(recipe, s) // (2 if pruned and s > splits[-1] else 1) for s in trained)
            K = len(trained)
        elif algorithm.name in ("mix_grpo", "mix_grpo_flash"):
            K, states = algorithm.window_size, G * algorithm.window_size
            if algorithm.name == "mix_grpo_flash":
                rollout = G * (window(recipe, iteration).stop + steps_after_window(recipe, iteration))
        else:
            K = num_train_steps(recipe)
            states = K * (algorithm.num_anchors if algorithm.is_neighbor else G)
        updates = algorithm.updates_per_iteration
        later = states - -(-states // updates) if algorithm.old_policy == "exact" else 0  # the first step has the most
        return Workload(G, rollout, K, states, updates, later)

    @property
    def num_anchors(self) -> float:
        """B: candidates trained per step; of a tree, on average."""
        return self.states / self.num_train_steps

    @property
    def nfe_old(self) -> float:
        """Evaluations of the old policy per picture, as in the paper's Table 3."""
        return self.rollout / self.generations

    @property
    def nfe_theta(self) -> float:
        """Evaluations of the trained policy per picture, B / G * K: the paper's Table 3."""
        return self.states / self.generations
