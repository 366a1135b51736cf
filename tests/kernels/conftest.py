"""The backends that the tests of the public functions run on, one after another."""

import pytest
import torch

from ngrpo_kernels import _registry


@pytest.fixture(params=["reference", "cpp", "triton"])
def auto_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `backend="auto"` stands for; Triton's kernels run in its interpreter, on CPU tensors."""
    name: str = request.param
    problem = _registry._why_not(name, "cpu")
    if problem is not None:
        pytest.skip(f"no {name} backend here: {problem}" + " (see test_gpu.py)" * torch.cuda.is_available())
    monkeypatch.setattr(_registry, "_first_choice", lambda device: name)
    torch.compiler.reset()  # what was compiled with another choice
    return name
