"""The Neighbor GRPO loss and its parts, and the log-ratio of SDE-based GRPO, for any trainer (arXiv 2511.16955).

`ngrpo_kernels.reference` holds every op in plain PyTorch, equation by equation.
"""

from ngrpo_kernels._registry import available_backends
from ngrpo_kernels.advantages import quasi_norm_advantages
from ngrpo_kernels.distances import pairwise_sqdist
from ngrpo_kernels.gaussian import gaussian_log_ratio
from ngrpo_kernels.leaping import leaping_log_ratio
from ngrpo_kernels.objective import LossOutput, neighbor_grpo_loss, neighbor_grpo_loss_from_velocity
from ngrpo_kernels.reference import GaussianRatio

__all__ = [
    "GaussianRatio",
    "LossOutput",
    "available_backends",
    "gaussian_log_ratio",
    "leaping_log_ratio",
    "neighbor_grpo_loss",
    "neighbor_grpo_loss_from_velocity",
    "pairwise_sqdist",
    "quasi_norm_advantages",
]
