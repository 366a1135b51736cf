"""The Triton backend, for any GPU that Triton compiles for. For tests, TRITON_INTERPRET=1, set before triton is
imported, runs it on the CPU, slowly.

A file and its kernel share a name. `objective` is two kernels, in sums.py and finish.py; both weighted sums are one, in
weighted.py; gaussian.py has one forward and one backward; maths.py and tensors.py are shared. Settings such as
`kl_coef` are rounded to float32, for any latents.
"""

from ngrpo_kernels._library import define_backend, from_fields
from ngrpo_kernels._triton.advantages import launch_quasi_norm_advantages
from ngrpo_kernels._triton.distances import launch_pairwise_sqdist
from ngrpo_kernels._triton.gaussian import launch_gaussian_log_ratio, launch_gaussian_log_ratio_grad
from ngrpo_kernels._triton.objective import launch_objective
from ngrpo_kernels._triton.weighted import launch_weighted_differences, launch_weighted_sum_from
from ngrpo_kernels.reference import Draws, Points, Settings

BACKEND = define_backend(
    "ngrpo_triton",
    {
        "objective": from_fields(launch_objective, Points, Settings),
        "weighted_differences": launch_weighted_differences,
        "pairwise_sqdist": launch_pairwise_sqdist,
        "weighted_sum_from": launch_weighted_sum_from,
        "quasi_norm_advantages": launch_quasi_norm_advantages,
        "gaussian_log_ratio": from_fields(launch_gaussian_log_ratio, Draws),
        "gaussian_log_ratio_grad": from_fields(launch_gaussian_log_ratio_grad, Draws),
    },
)
