"""Flow-GRPO (arXiv 2505.05470): walks of an SDE with noise eta sqrt(sigma / (1 - sigma)), each from its own start."""

from __future__ import annotations

from typing import ClassVar

from ngrpo_train.algorithms.stochastic import StochasticGRPO
from ngrpo_train.recipe.algorithms import FlowGRPO as FlowSettings
from ngrpo_train.sampling.sde import NoiseLevel


class FlowGRPO(StochasticGRPO):
    """Flow-GRPO. By default, all random steps are trained. `algorithm.reference_coef` weighs its KL to the base."""

    level: ClassVar[NoiseLevel] = "flow"
    shares_noise: ClassVar[bool] = False
    settings: FlowSettings

    @property
    def batch_std(self) -> bool:
        return self.settings.advantage_std == "batch"
