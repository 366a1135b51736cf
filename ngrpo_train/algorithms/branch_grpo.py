"""BranchGRPO (arXiv 2509.06040): walks that share their beginnings as a tree, with an advantage for every edge."""

# P prompts, G leaves, R rewards, n branches alive. An edge is one branch's way through one solver step. Where
# a step has n edges, edge e leads to the leaves e * G / n to (e + 1) * G / n - 1. X edges of all trained steps, in the
# order of the steps.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from ngrpo_train.algorithms.advantages import group_rewards, standardised
from ngrpo_train.algorithms.stochastic import StochasticGRPO, Transitions, draw_noise, step_constants
from ngrpo_train.draws import NOISE, stream
from ngrpo_train.models.model import Conditioning, FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.algorithms import BranchGRPO as BranchSettings
from ngrpo_train.rewards import Scores
from ngrpo_train.sampling.sde import NoiseLevel, sde_step
from ngrpo_train.sampling.solvers import euler_step


class BranchGRPO(StochasticGRPO):
    """BranchGRPO: every step but the last is random, with DanceGRPO's noise; at a split, every branch becomes two.

    The reward of an edge is the mean over its leaves. The paper's other choice, weights by path probability, would give
    the same and is left out: siblings' log-probabilities, as means over D, differ by about 1 / sqrt(2 D), so their
    softmax is uniform.
    """

    level: ClassVar[NoiseLevel] = "constant"
    settings: BranchSettings

    @torch.no_grad()
    def _explore(self, model: FlowModel, prompts: list[Prompt], step: int) -> Transitions:
        draws = [{"seed": self.seed, "step": step, "slot": prompt.slot} for prompt in prompts]
        trained, splits = self.settings.tree_steps(self.N, step), self.settings.splits(self.N)
        last = self.N - 1
        stds = self.stds(self.sigmas, range(last))
        conditioning = model.encode(prompts)
        of_prompt = torch.arange(len(prompts), device=model.device)
        order_PX = torch.stack(
            [torch.randperm(sum(self._edges(trained)), generator=stream(**draw, purpose="order")) for draw in draws]
        )  # the order in which optimizer steps take the edges, so that each step gets edges of all depths
        x_PnS = draw_noise(model, draws, 1, NOISE)
        kept: dict[str, list[Tensor]] = {"latents": [], "noise": [], "velocity": []}
        for index in range(last + 1):
            sigma, following = float(self.sigmas[index]), float(self.sigmas[index + 1])
            P, n = x_PnS.shape[:2]
            rows = conditioning.rows(of_prompt.repeat_interleave(n))
            flat = x_PnS.flatten(0, 1)
            velocity = model.sampling_velocity(
                flat, torch.full((P * n,), sigma, device=flat.device), rows, explore=True
            )
            velocity_PnS = velocity.view_as(x_PnS)
            if index == last:
                x_PnS, _ = euler_step(x_PnS, velocity_PnS, self.sigmas, index)
                break
            if index in splits:
                x_PnS, velocity_PnS = (both.repeat_interleave(2, dim=1) for both in (x_PnS, velocity_PnS))
                noise = sibling_noise(model, draws, n, self.settings.branch_spread, index)
            else:
                noise = draw_noise(model, draws, n, f"{NOISE}/{index}")
            if index in trained:
                for name, value in (("latents", x_PnS), ("noise", noise), ("velocity", velocity_PnS)):
                    kept[name].append(value.float())
            x_PnS = sde_step(x_PnS, velocity_PnS, noise, sigma, following, stds[index])
        return self._transitions(conditioning, trained, kept, x_PnS, order_PX)

    def _transitions(
        self,
        conditioning: Conditioning,
        trained: Sequence[int],
        kept: Mapping[str, Sequence[Tensor]],
        final_PGS: Tensor,
        order_PX: Tensor,
    ) -> Transitions:
        edges = torch.tensor(self._edges(trained))
        step_PX = torch.tensor(trained).repeat_interleave(edges).expand(len(final_PGS), -1)
        stds = self.stds(self.sigmas, trained)
        return Transitions(
            conditioning=conditioning,
            step_PM=step_PX,
            advantage_PM=torch.arange(step_PX.shape[1]).expand(len(final_PGS), -1),
            **step_constants(self.sigmas, stds, step_PX, final_PGS.device),
            latents_PMS=torch.cat(list(kept["latents"]), dim=1),
            noise_PMS=torch.cat(list(kept["noise"]), dim=1),
            velocity_PMS=torch.cat(list(kept["velocity"]), dim=1),
            final_PGS=final_PGS,
        ).take(order_PX)

    def advantages(self, scores: Scores, step: int) -> Tensor:
        """Advantages of all ranks' edges, [P, X] on the CPU, from leaf rewards, fused and standardised step by step."""
        rewards_RPG, weights = group_rewards(self.settings, scores, seed=self.seed, step=step)
        # Nearer to the root, means over leaves spread less. So `min_reward_std` is compared with the leaves' spread.
        flat_RP1 = rewards_RPG.std(2, keepdim=True) < self.settings.min_reward_std
        rewards_RPG = torch.where(flat_RP1, rewards_RPG[:, :, :1], rewards_RPG)
        of_spread = replace(self.settings, min_reward_std=0.0)
        edges = self._edges(self.settings.tree_steps(self.N, step))
        return torch.cat([standardised(fused(rewards_RPG, n), weights, of_spread) for n in edges], dim=1)

    def trained(self, groups: Transitions, advantages: Tensor) -> Transitions:
        if self.settings.width_pruning == "none":
            return groups
        local_PX = advantages.chunk(processes.world_size())[processes.rank()]
        return groups.take(self._unpruned(groups, local_PX))

    def _unpruned(self, groups: Transitions, advantages_PX: Tensor) -> Tensor:
        """Indices of the transitions that width pruning keeps, int64 [P, M'] on the CPU, in the order of `groups`."""
        trained = groups.step_PM[0].unique()
        starts = [0, *accumulate(self._edges(trained.tolist()))][:-1]
        first_edge = dict(zip(trained.tolist(), starts, strict=True))
        split = self.settings.splits(self.N)[-1]
        keep_PM = groups.step_PM <= split
        if leaf_steps := [step for step in trained.tolist() if step > split]:
            G = self.settings.num_generations
            start = first_edge[leaf_steps[0]]  # every step after the last split has the leaves' own advantages
            leaf_PG = kept_leaves(advantages_PX[:, start : start + G], self.settings.width_pruning)
            start_of = torch.tensor([first_edge.get(step, 0) for step in range(int(trained[-1]) + 1)])
            leaf_PM = (groups.advantage_PM - start_of[groups.step_PM]).clamp(max=G - 1)
            keep_PM = keep_PM | leaf_PG.gather(1, leaf_PM)
        return keep_PM.nonzero()[:, 1].view(len(keep_PM), -1)

    def _edges(self, steps: Sequence[int]) -> list[int]:
        """The number of edges through each of these steps."""
        return [self.settings.branches(self.N, step) for step in steps]


def fused(leaf_rewards_RPG: Tensor, edges: int) -> Tensor:
    """The mean reward of the leaves that each edge of a step leads to, [R, P, edges] from [R, P, G]."""
    return leaf_rewards_RPG.unflatten(2, (edges, -1)).mean(3)


def kept_leaves(advantages_PG: Tensor, pruning: str) -> Tensor:
    """A mask of the leaves that are trained after the last split, bool [P, G]: the same number for every prompt."""
    G = advantages_PG.shape[1]
    if pruning == "parent_top1":
        better = advantages_PG.unflatten(1, (-1, 2)).argmax(2)  # the first of two equals
        return torch.nn.functional.one_hot(better, 2).flatten(1).bool()
    if pruning == "extremes":
        rank = advantages_PG.argsort(dim=1, stable=True).argsort(dim=1)
        return (rank < G // 4) | (rank >= G - G // 4)
    return torch.ones_like(advantages_PG, dtype=torch.bool)


def sibling_noise(
    model: FlowModel, draws: Sequence[dict[str, int]], branches: int, spread: float, index: int
) -> Tensor:
    """Noise of both children of each branch, [P, 2 * branches, *S]: standard normal, siblings correlated.

    It is `(common + spread * own) / sqrt(1 + spread^2)`.
    """
    common = draw_noise(model, draws, branches, f"{NOISE}/{index}/common").repeat_interleave(2, dim=1)
    own = draw_noise(model, draws, 2 * branches, f"{NOISE}/{index}")
    return (common + spread * own) / math.sqrt(1 + spread**2)
