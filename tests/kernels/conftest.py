"""The backends that tests run on, one after another. Triton's kernels run in its interpreter, on CPU tensors."""

import os
from typing import Any

import pytest
import torch

from ngrpo_kernels import _registry


def _interpret_faster() -> None:
    """Let Triton's interpreter prepare itself once for each module of functions that kernels call.

    Whenever one kernel's function calls another, it looks through all of triton.language for what it must replace, and
    finds it replaced: 40 % of the time of a loss.
    """
    from triton.runtime import interpreter

    call, prepared = interpreter.InterpretedFunction.__call__, set[int]()

    def prepared_once(self: Any, *arguments: Any, **named: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in prepared:
            prepared.add(module)
            return call(self, *arguments, **named)
        try:
            return self.rewrite()(*arguments, **named)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = prepared_once


if os.environ.get("TRITON_INTERPRET") == "1":
    _interpret_faster()


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
