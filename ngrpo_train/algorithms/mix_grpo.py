"""MixGRPO and MixGRPO-Flash (arXiv 2507.21802): steps are random and trained in a sliding window, the ODE's outside."""

from __future__ import annotations

from typing import ClassVar

import torch

from ngrpo_train.algorithms.stochastic import StochasticGRPO, Walk
from ngrpo_train.recipe.algorithms import MixGRPO as MixSettings
from ngrpo_train.recipe.algorithms import MixGRPOFlash as FlashSettings
from ngrpo_train.sampling.sde import NoiseLevel
from ngrpo_train.sampling.solvers import flow_sigmas


class MixGRPO(StochasticGRPO):
    """MixGRPO: the noise is Flow-GRPO's; all steps of the window are trained."""

    level: ClassVar[NoiseLevel] = "flow"
    settings: MixSettings

    def walk(self, iteration: int) -> Walk:
        steps = self.settings.window(self.N, iteration)
        return Walk(self.sigmas, self.stds(self.sigmas, steps), steps, len(steps))


class MixGRPOFlash(MixGRPO):
    """MixGRPO-Flash: after the window, DPM-Solver++(2M) takes fewer steps, evenly spaced before the shift.

    The solver starts anew after the window. Its first step is of first order, because the step before is random, and
    cannot be extrapolated.
    """

    settings: FlashSettings

    def walk(self, iteration: int) -> Walk:
        steps, after = self.settings.window(self.N, iteration), self.settings.steps_after_window(self.N, iteration)
        left = flow_sigmas(after, self.sampling.shift, start=1 - steps.stop / self.N)
        sigmas = torch.cat([self.sigmas[: steps.stop], left])
        return Walk(sigmas, self.stds(sigmas, steps), steps, len(steps), second_order_from=steps.stop)
