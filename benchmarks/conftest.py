"""Options and fixtures of `pytest benchmarks --benchmark-only`, in addition to pytest-benchmark's own.

All providers of a setting are measured together, taking turns; then each test reports one of them. pytest-benchmark can
measure neither in turns nor on the device. So it reads a clock that the finished measurements move forward.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import measure, rows, suite
from benchmarks.providers import MODES, PROVIDERS, Op, Setting


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ngrpo", "benchmarks of ngrpo_kernels")
    group.addoption("--results", type=Path, help="CSV that the rows are appended to; none by default")
    group.addoption("--seconds", type=float, default=3.0, help="about how long to time one mode of one setting")
    group.addoption("--settings", default="", help="names, separated by ';' (default: all that suit the device)")
    group.addoption("--providers", default="", help="names, separated by ',' (default: all)")


def pytest_configure(config: pytest.Config) -> None:
    measure.keep_freed_memory()
    unknown = set(_chosen_providers(config)) - set(PROVIDERS)
    if unknown:
        raise pytest.UsageError(f"--providers: {', '.join(sorted(unknown))} unknown; there are {', '.join(PROVIDERS)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize the tests. `measured` runs once per setting, so the tests of a setting must follow each other."""
    if "measured" in metafunc.fixturenames:
        settings: tuple[Setting, ...] = metafunc.module.SETTINGS
        wanted = [name for name in metafunc.config.getoption("settings").split(";") if name]
        chosen = [s for s in settings if (s.name in wanted if wanted else s.when != "when asked for")]
        metafunc.parametrize("measured", chosen, ids=lambda s: s.name, indirect=True, scope="module")
        metafunc.parametrize("mode", MODES)
        metafunc.parametrize("provider", _chosen_providers(metafunc.config) or PROVIDERS)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, device: torch.device) -> Iterator[dict[tuple[str, str], suite.Measured]]:
    op: Op[Any] = request.module.OP
    setting: Setting = request.param
    if setting.when == "on a GPU" and device.type != "cuda":
        pytest.skip("needs a GPU")
    option = request.config.getoption
    yield suite.run(op, setting, device, option("seconds"), _chosen_providers(request.config))
    if device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def report(
    request: pytest.FixtureRequest,
    benchmark: BenchmarkFixture,
    measured: dict[tuple[str, str], suite.Measured],
    mode: str,
    provider: str,
) -> Callable[[], None]:
    """A function that hands the measurements of one provider to pytest-benchmark and to the CSV."""

    def hand_over() -> None:
        if (provider, mode) not in measured:
            pytest.skip(f"there is no {provider} here")
        found = measured[provider, mode]
        if found.skipped:
            pytest.skip(found.skipped)
        assert not found.wrong, found.wrong
        first = found.rows[0]
        benchmark.group = f"{first.op}, {first.setting}, {mode}"
        benchmark.extra_info.update({row.metric: [row.p20, row.p50, row.p80, row.unit] for row in found.rows})
        benchmark.extra_info.update(asdict(first))
        samples = iter(found.seconds)
        benchmark.pedantic(lambda: suite.advance_clock(next(samples)), rounds=len(found.seconds))
        path = request.config.getoption("results")
        if path is not None:
            rows.append(path, found.rows)

    return hand_over


def _chosen_providers(config: pytest.Config) -> list[str]:
    return [name for name in config.getoption("providers").split(",") if name]
