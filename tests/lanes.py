"""Lanes: which tests `make check` takes, and in which order and company `make test` runs all of them.

A test's lane follows from what it is made of, and is never set by hand:

- `light` starts no process, trains no run through the command, compiles and interprets nothing;
- `compilers` goes through Triton's interpreter, Triton's compiler, or torch.compile;
- `processes` starts processes or trains runs through the command, and has the cores to itself.
"""

import multiprocessing
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

LANES = ("light", "compilers", "processes")

_COMPILERS = {"triton", "inductor", "aot_eager", "aot_eager_decomp_partition"}  # as values of parameters
_COMPILING_MODULES = {"test_triton", "test_compile", "test_planted_bugs"}
_RUN_FIXTURES = [{"ngrpo", model} for model in ("tiny_dev", "tiny_grid")]  # the command, and a model for it
_TRAINING = {"tests.train.runs.Run", "ngrpo_train.run.trainer.Trainer"}


def lane_of(item: pytest.Item) -> str:
    """The one lane of a test."""
    assert isinstance(item, pytest.Function)
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    module = item.module.__name__.rpartition(".")[2]
    if (
        module in _COMPILING_MODULES
        or "compile" in item.originalname
        or any(value in _COMPILERS for value in parameters if isinstance(value, str))
    ):
        return "compilers"
    fixtures = [
        definition.func
        for definitions in item._fixtureinfo.name2fixturedefs.values()
        for definition in definitions
        if definition.func.__module__ and not definition.func.__module__.startswith("_pytest")
    ]
    names = set(item.fixturenames)
    if any(names >= together for together in _RUN_FIXTURES):
        return "processes"
    return "processes" if any(_starts_or_trains(function) for function in (item.function, *fixtures)) else "light"


@cache
def _starts_or_trains(function: Callable[..., Any]) -> bool:
    """Whether a test or fixture, or a function of ours that it names, names what starts processes or trains a run."""
    seen: set[int] = set()

    def reaches(value: object) -> bool:
        if isinstance(value, ModuleType):
            return value in (subprocess, multiprocessing)
        module = getattr(value, "__module__", None) or ""
        if f"{module}.{getattr(value, '__qualname__', '')}" in _TRAINING:
            return True
        if id(value) in seen or module.partition(".")[0] not in ("tests", "benchmarks"):
            return False
        seen.add(id(value))
        if isinstance(value, type):
            return any(map(reaches, vars(value).values()))
        value = getattr(value, "__wrapped__", value)
        if not isinstance(value, FunctionType):
            return False
        named = set(_names(value.__code__))
        return "fork" in named or any(reaches(value.__globals__[name]) for name in named & value.__globals__.keys())

    return reaches(function)


def _names(code: CodeType) -> Iterator[str]:
    """Every name that a function's code, or code inside it, reads."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
