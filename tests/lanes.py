"""Lanes: which tests `make check` takes, and in which order and company `make test` runs all of them.

A test's lane follows from what it is made of, and is never set by hand:

- `light` starts no process, trains no run, runs no program, compiles and interprets nothing;
- `ranks` starts several processes that compute together; its few modules take longest, so they come before
- `heavy`, which does one of these, on one core: Triton's interpreter or compiler, torch.compile, a count of a model's
  operators one by one, a run, an experiment, a profile, an example, a benchmark, a server.
"""

import multiprocessing
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

LANES = ("light", "ranks", "heavy")  # in their order

_COMPILERS = {"triton", "inductor", "aot_eager", "aot_eager_decomp_partition"}  # as values of parameters
_COMPILING_MODULES = {"test_triton", "test_compile", "test_planted_bugs"}
_PROGRAM_MODULES = {"test_examples", "test_benchmarks", "test_train_benchmarks"}
_RUN_FIXTURES = [{"ngrpo", "tiny_dev"}, {"tiny_grid"}]  # the command, and a model for it
_HEAVY = {
    "ngrpo_train.__main__.main",
    "tests.train.runs.Run",
    "ngrpo_train.run.trainer.Trainer",
    "ngrpo_train.profiling.measure.profile",
    "ngrpo_train.plan.activations.measuring",
    "ngrpo_train.plan.flops.transformer_flops",
    "ngrpo_train.plan.trace.traced",
    "ngrpo_train.rewards.tesseract.Tesseract",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils.flop_counter.FlopCounterMode",
}
_LAUNCHING = {f"tests.train.runs.{name}" for name in ("on_ranks", "torchrun", "accelerate_launch")}


def lanes_of(items: Sequence[pytest.Item]) -> dict[pytest.Item, str]:
    """The one lane of each of all collected tests."""
    lanes = {item: _lane_of(item) for item in items}
    of_ranks = {item.path for item, lane in lanes.items() if lane == "ranks"}
    # A heavy test stays with the ranks of its module, whose fixtures are then made once.
    return {item: "ranks" if lane == "heavy" and item.path in of_ranks else lane for item, lane in lanes.items()}


def _lane_of(item: pytest.Item) -> str:
    assert isinstance(item, pytest.Function)
    reached = set().union(*map(_reached, _functions_of(item)))
    if "ranks" in reached:
        return "ranks"
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    if (
        "heavy" in reached
        or any(set(item.fixturenames) >= together for together in _RUN_FIXTURES)
        or item.module.__name__.rpartition(".")[2] in _COMPILING_MODULES | _PROGRAM_MODULES
        or "compile" in item.originalname
        or any(value in _COMPILERS for value in parameters if isinstance(value, str))
    ):
        return "heavy"
    return "light"


def _functions_of(item: pytest.Function) -> list[Callable[..., Any]]:
    """The test, and its fixtures, those too that a parameter names.

    Left out are pytest's own, and `ngrpo`, which runs the command: with a model, that is known by the model's fixture.
    """
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    manager = item.session._fixturemanager
    named = [manager.getfixturedefs(value, item) or () for value in parameters if isinstance(value, str)]
    definitions = [*item._fixtureinfo.name2fixturedefs.values(), *named]
    fixtures = [each.func for some in definitions for each in some if each.argname != "ngrpo"]
    return [item.function, *(each for each in fixtures if not each.__module__.startswith("_pytest"))]


@cache
def _reached(function: Callable[..., Any]) -> frozenset[str]:
    """The lanes that a test or fixture asks for by what it names, and what the functions of ours that it names do."""
    lanes: set[str] = set()
    seen: set[int] = set()

    def look_at(value: object) -> None:
        if isinstance(value, ModuleType):
            lanes.update({"heavy"} if value in (subprocess, multiprocessing) else ())
            return
        module = getattr(value, "__module__", None) or ""
        path = f"{module}.{getattr(value, '__qualname__', '')}"
        lanes.update({"ranks"} if path in _LAUNCHING else {"heavy"} if path in _HEAVY else ())
        if id(value) in seen or module.partition(".")[0] not in ("tests", "benchmarks"):
            return
        seen.add(id(value))
        if isinstance(value, type):
            for each in (*vars(value).values(), *value.__bases__):
                look_at(each)
        value = getattr(value, "__wrapped__", value)
        if isinstance(value, FunctionType):
            named = set(_names(value.__code__))
            lanes.update({"heavy"} if "fork" in named else ())
            for name in named & value.__globals__.keys():
                look_at(value.__globals__[name])

    look_at(function)
    return frozenset(lanes)


def _names(code: CodeType) -> Iterator[str]:
    """Every name that a function's code, or code inside it, reads."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
