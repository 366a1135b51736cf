"""Flow-GRPO (arXiv 2505.05470): walks of an SDE with noise eta sqrt(sigma / (1 - sigma)), each from its start."""

from __future__ import annotations

from typing import ClassVar

from ngrpo_train.algorithms.stochastic import StochasticGRPO
from ngrpo_train.sampling.sde import NoiseLevel


class FlowGRPO(StochasticGRPO):
    """By default all random steps are trained. Its KL to the untrained model is `algorithm.reference_coef`."""

    level: ClassVar[NoiseLevel] = "flow"
    shares_noise: ClassVar[bool] = False
