"""Choice of a backend: which ones exist, what each computes with, and which one a call gets.

A backend is a table of the ops in `reference`, with the same names, signatures and meaning. The public functions add
gradients. "triton" computes on GPUs, "cpp" on the CPU, and "reference", plain PyTorch, anywhere.
"""

import importlib.util
import os
import sys
import warnings
from functools import cache

import torch

from ngrpo_kernels import _cpp, reference
from ngrpo_kernels._library import Backend, define_backend

NAMES = ("triton", "cpp", "reference")


def available_backends() -> tuple[str, ...]:
    """Names of the backends that work on this machine, for `backend=`; the one that "auto" chooses comes first.

    "triton" computes on GPUs; on the CPU only in Triton's interpreter, for tests, if TRITON_INTERPRET=1 was set before
    triton was imported. "cpp" computes on the CPU. It needs a C++ compiler and ninja: it is compiled when it is first
    used, and kept in the user's cache. NGRPO_CPP=0 in the environment turns it off. "reference" is plain PyTorch and
    always works.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [name for name in NAMES if name == "reference" or any(_why_not(name, on) is None for on in (device, "cpu"))]
    return tuple(sorted(names, key=lambda name: name != _first_choice(device)))


def pick(backend: str, device: str) -> str:
    """Name of the backend that computes a call with `backend` on tensors of this device type.

    A backend that is asked for by name and cannot be used is an error; "auto" falls back to "reference" with a warning.
    """
    if backend != "auto" and backend not in NAMES:
        names = ", ".join(map(repr, ("auto", *available_backends())))
        raise ValueError(f"backend is {backend!r}; available here: {names}")
    name = _first_choice(device) if backend == "auto" else backend
    problem = _cpp.load() if (name, device) == ("cpp", "cpu") else _why_not(name, device)
    if problem is None:
        return name
    if backend != "auto":
        error = ValueError if _computes_elsewhere(name, device) else RuntimeError
        raise error(f"backend is {name!r}, which cannot be used here: {problem}")
    if not (name == "cpp" and _cpp.is_turned_off()):
        _warn_once(f"ngrpo_kernels computes in plain PyTorch, not with its {name!r} backend: {problem}")
    return "reference"


# What torch.compiler.assume_constant_result does, less its import of the whole compiler, a second: under torch.compile
# the choice is made once, while tracing.
vars(pick)["_dynamo_marked_constant"] = True


def backend_ops(name: str) -> Backend:
    """Ops of the backend called `name`."""
    if name == "triton":
        from ngrpo_kernels import _triton  # imports triton, which takes a while and is not on every platform

        return _triton.BACKEND
    return _CPP if name == "cpp" else _REFERENCE


def _first_choice(device: str) -> str:
    return {"cuda": "triton", "cpu": "cpp"}.get(device, "reference")


def _computes_elsewhere(name: str, device: str) -> bool:
    devices = {"cpp": ("cpu",), "triton": ("cpu", "cuda")}
    return name in devices and device not in devices[name]


def _why_not(name: str, device: str) -> str | None:
    """Reason why a backend cannot compute on a device type, as far as this is known without compiling; or None."""
    if name == "reference":
        return None
    if _computes_elsewhere(name, device):
        return f"it computes on {'the CPU' if name == 'cpp' else 'GPUs'}; the tensors are on {device}"
    if name == "cpp":
        return _cpp.why_not()
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it computes on GPUs; the tensors are on the CPU (TRITON_INTERPRET=1 interprets it there, for tests)"
    return None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=1)


_CPP = define_backend("ngrpo_cpp")
_REFERENCE = Backend(
    pairwise_sqdist=reference.pairwise_sqdist,
    pairwise_sqdist_grad_anchors=reference.pairwise_sqdist_grad_anchors,
    leaping_log_ratio=reference.leaping_log_ratio,
    objective=reference.objective,
    weighted_differences=reference.weighted_differences,
    quasi_norm_advantages=reference.quasi_norm_advantages,
    gaussian_log_ratio=reference.gaussian_log_ratio,
    gaussian_log_ratio_grad=reference.gaussian_log_ratio_grad,
)
