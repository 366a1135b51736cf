"""MixGRPO and MixGRPO-Flash (arXiv 2507.21802): random and trained inside a sliding window, the ODE's outside."""

from __future__ import annotations

from typing import ClassVar

import torch

from ngrpo_train.algorithms.stochastic import StochasticGRPO, Walk
from ngrpo_train.recipe.algorithms import MixGRPO as MixSettings
from ngrpo_train.recipe.algorithms import MixGRPOFlash as FlashSettings
from ngrpo_train.sampling.sde import NoiseLevel
from ngrpo_train.sampling.solvers import flow_sigmas


class MixGRPO(StochasticGRPO):
    """The noise is Flow-GRPO's; all steps of the window are trained."""

    level: ClassVar[NoiseLevel] = "flow"
    settings: MixSettings

    def walk(self, iteration: int) -> Walk:
        steps = self.settings.window(self.N, iteration)
        return Walk(self.sigmas, self.stds(self.sigmas, steps), steps, len(steps))


class MixGRPOFlash(MixGRPO):
    """After the window DPM-Solver++(2M) takes fewer steps, evenly spaced before the shift; it starts anew there.

    Its first step is of first order: the step before is random, and so nothing to extrapolate from.
    """

    settings: FlashSettings

    def walk(self, iteration: int) -> Walk:
        steps, after = self.settings.window(self.N, iteration), self.settings.steps_after_window(self.N, iteration)
        left = flow_sigmas(after, self.sampling.shift, start=1 - steps.stop / self.N)
        sigmas = torch.cat([self.sigmas[: steps.stop], left])
        return Walk(sigmas, self.stds(sigmas, steps), steps, len(steps), second_order_from=steps.stop)
