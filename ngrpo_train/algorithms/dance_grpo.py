"""DanceGRPO (arXiv 2505.07818): walks of an SDE with noise of constant strength eta, all from one starting noise."""

from __future__ import annotations

from typing import ClassVar

from ngrpo_train.algorithms.stochastic import StochasticGRPO
from ngrpo_train.sampling.sde import NoiseLevel


class DanceGRPO(StochasticGRPO):
    """DanceGRPO. By default, int(0.6 (N - 1)) of the random steps are trained, drawn for each prompt."""

    level: ClassVar[NoiseLevel] = "constant"
