"""MixGRPO and MixGRPO-Flash (arXiv 2507.21802): random and trained inside a sliding window, the ODE's outside."""

from __future__ import annotations

from typing import ClassVar

import torch

from ngrpo_train.algorithms.stochastic import StochasticGRPO, Walk
from ngrpo_train.recipe.workload import steps_after_window, window
from ngrpo_train.sampling.sde import NoiseLevel
from ngrpo_train.sampling.solvers import flow_sigmas


class MixGRPO(StochasticGRPO):
    """The noise is Flow-GRPO's; all steps of the window are trained."""

    level: ClassVar[NoiseLevel] = "flow"

    def walk(self, iteration: int) -> Walk:
        steps = window(self.recipe, iteration)
        return Walk(self.sigmas, self.stds(self.sigmas, steps), steps, len(steps))


class MixGRPOFlash(MixGRPO):
    """After the window DPM-Solver++(2M) takes fewer steps, evenly spaced before the shift; it starts anew there.

    Its first step is of first order: the step before is random, and so nothing to extrapolate from.
    """

    def walk(self, iteration: int) -> Walk:
        steps, sampling = window(self.recipe, iteration), self.recipe.sampling
        after = steps_after_window(self.recipe, iteration)
        left = 1 - steps.stop / sampling.num_inference_steps
        sigmas = torch.cat([self.sigmas[: steps.stop], flow_sigmas(after, sampling.shift, start=left)])
        return Walk(sigmas, self.stds(sigmas, steps), steps, len(steps), second_order_from=steps.stop)
