"""The Triton backend: a file for each op. Written for any GPU that Triton compiles for; TRITON_INTERPRET=1, set before
triton is imported, runs it on the CPU, slowly, to test it.
"""

from ngrpo_kernels._library import Backend
from ngrpo_kernels._triton.advantages import quasi_norm_advantages
from ngrpo_kernels._triton.distances import pairwise_sqdist, pairwise_sqdist_grad_anchors
from ngrpo_kernels._triton.objective import leaping_log_ratio, objective
from ngrpo_kernels._triton.weighted import weighted_differences

BACKEND = Backend(
    pairwise_sqdist=pairwise_sqdist,
    pairwise_sqdist_grad_anchors=pairwise_sqdist_grad_anchors,
    leaping_log_ratio=leaping_log_ratio,
    objective=objective,
    weighted_differences=weighted_differences,
    quasi_norm_advantages=quasi_norm_advantages,
)
