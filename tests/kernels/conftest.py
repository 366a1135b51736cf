"""The backends that tests run on, one after another. Triton's kernels run in its interpreter, on CPU tensors."""

import pytest
import torch

from ngrpo_kernels import _registry


def _skip_without(name: str) -> None:
    problem = _registry._why_not(name, "cpu")
    if problem is not None:
        pytest.skip(f"no {name} backend here: {problem}" + " (see test_gpu.py)" * torch.cuda.is_available())


@pytest.fixture(params=["cpp", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """What `backend=` names: each that is not the reference itself."""
    _skip_without(request.param)
    return request.param


@pytest.fixture(params=["reference", "cpp", "triton"])
def auto_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `backend="auto"` stands for."""
    name: str = request.param
    _skip_without(name)
    monkeypatch.setattr(_registry, "_first_choice", lambda device: name)
    torch.compiler.reset()  # what was compiled with another choice
    return name
