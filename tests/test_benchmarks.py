"""The benchmarks' own machinery: that it measures what it says, and refuses a wrong result."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, providers, rows, suite, table
from benchmarks.providers import DISTANCES, DRAWS, LOSS, MODES, Op, Result, Setting, gradient
from ngrpo_kernels import available_backends, neighbor_grpo_loss_from_velocity, reference

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = Setting(name="tiny", D=512, P=2, B=2, G=3)
OPS = pytest.mark.parametrize("op", [LOSS, DISTANCES, DRAWS], ids=lambda op: op.name)
OURS: dict[str, Any] = {
    LOSS.name: providers.our_loss,
    DISTANCES.name: providers.our_distances,
    DRAWS.name: providers.our_draws,
}


@pytest.fixture(autouse=True)
def _known_copy_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the tests a copy of half a GiB."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(suite, "copy_bandwidth", lambda device: 1e10)


# -- Truth and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", ["tensor", "detach"])
def test_the_truth_is_the_loss_in_float64(old: Any) -> None:
    inputs = LOSS.make_inputs(replace(TINY, old=old, change=1e-2), CPU)
    truth = LOSS.truth(inputs)
    velocity = inputs.moving.detach().double().requires_grad_()
    output = neighbor_grpo_loss_from_velocity(
        velocity,
        inputs.latents.double(),
        providers.DT,
        inputs.candidates.double(),
        inputs.anchor_index,
        inputs.advantages.double(),
        old_velocity="detach" if inputs.old is None else inputs.old.double(),
        backend="reference",
    )
    torch.testing.assert_close(output.log_ratio, truth.detail, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(output.loss.detach(), truth.value, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(output.loss, velocity)[0], truth.grad, rtol=1e-8, atol=1e-12)


@OPS
@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backend_is_as_exact_as_it_has_to_be(op: Op[Any], backend: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
    call = OURS[op.name](backend)
    inputs = op.make_inputs(replace(TINY, velocity_dtype=dtype), device)
    result = call(inputs)
    assert not op.errors(inputs, result, gradient(inputs, result), op.truth(inputs)).excess()


def test_the_direct_form_is_that_of_the_reference() -> None:
    """Less its KL term, whose coefficient is zero."""
    inputs = LOSS.make_inputs(replace(TINY, change=1e-2, velocity_dtype=torch.float32), CPU)
    assert inputs.old is not None
    anchors, old = (inputs.latents - providers.DT * velocity for velocity in (inputs.moving, inputs.old))
    expected = reference.direct_loss(anchors, old, inputs.candidates, inputs.advantages)
    result = LOSS.providers(CPU)["direct"](inputs)
    torch.testing.assert_close(result.value, expected)
    torch.testing.assert_close(gradient(inputs, result), torch.autograd.grad(expected, inputs.moving)[0])


@pytest.mark.parametrize("old", ["tensor", "detach"])
def test_all_forms_for_draws_mean_the_same(old: Any) -> None:
    """The direct one, from states and a stored log-probability, as far as float32 has it."""
    inputs = DRAWS.make_inputs(replace(TINY, old=old, velocity_dtype=torch.float32, change=0.1), CPU)
    truth = DRAWS.truth(inputs)
    for name in ("direct", "exact-autograd", "exact"):
        result = DRAWS.providers(CPU)[name](inputs)
        within = 1e-6 if name == "direct" else 1e-5 * truth.detail.abs().max().item()
        torch.testing.assert_close(result.detail.double(), truth.detail, rtol=0, atol=within)
        torch.testing.assert_close(gradient(inputs, result).double(), truth.grad, rtol=1e-4, atol=1e-9)


def spoil(call: Callable[[Any], Result], *, by: float) -> Callable[[Any], Result]:
    """The same gradient and loss, and other log-ratios or distances."""

    def spoiled(inputs: Any) -> Result:
        result = call(inputs)
        return Result(result.value, result.detail * (1 + by) + by)

    return spoiled


def scale_gradient(call: Callable[[Any], Result], *, by: float) -> Callable[[Any], Result]:
    def scaled(inputs: Any) -> Result:
        result = call(inputs)
        return Result(result.value.detach() + by * (result.value - result.value.detach()), result.detail)

    return scaled


@OPS
@pytest.mark.parametrize("by", [1e-2, float("nan")])
@pytest.mark.parametrize("damage", [spoil, scale_gradient])
def test_a_wrong_provider_is_not_timed(op: Op[Any], damage: Callable[..., Any], by: float) -> None:
    exact = OURS[op.name]("reference")
    calls = {"exact": exact, "cpp": damage(exact, by=by)}
    measured = suite.run(replace(op, providers=lambda device: calls), TINY, CPU, seconds=0)
    for mode in MODES:
        assert measured["exact", mode].rows
        assert not measured["exact", mode].wrong
        assert measured["cpp", mode].wrong
        assert not measured["cpp", mode].rows


def test_a_provider_without_room_is_left_out() -> None:
    def too_large(inputs: Any) -> Result:
        torch.empty(1 << 60)
        raise AssertionError("there was room")

    calls = {"direct": too_large, "exact": providers.our_loss("reference")}
    measured = suite.run(replace(LOSS, providers=lambda device: calls), TINY, CPU, seconds=0)
    assert "memory" in measured["direct", "forward"].skipped
    (row,) = [row for row in measured["exact", "forward"].rows if row.metric == "time"]
    assert row.ratio_to_direct is None


def test_the_interpreter_is_never_timed() -> None:
    for op in (LOSS, DISTANCES, DRAWS):
        assert "triton" not in op.providers(CPU)
        assert set(op.providers(CPU)) <= set(providers.PROVIDERS)


def test_min_bytes_count_each_tensor_once() -> None:
    row, group = 2 * 2 * 512, 2 * 3 * 512
    inputs = LOSS.make_inputs(TINY, CPU)
    assert LOSS.min_bytes(inputs, "forward") == 4 * group + (2 + 2 + 4) * row
    assert LOSS.min_bytes(inputs, "forward+backward") == 8 * group + (2 + 2 + 4 + 2) * row
    distances = DISTANCES.make_inputs(TINY, CPU)
    assert DISTANCES.min_bytes(distances, "forward") == 4 * (row + group)
    assert DISTANCES.min_bytes(distances, "forward+backward") == 4 * (3 * row + 2 * group)
    draws = DRAWS.make_inputs(TINY, CPU)
    assert DRAWS.min_bytes(draws, "forward") == (2 + 2 + 4 + 4) * row
    assert DRAWS.min_bytes(draws, "forward+backward") == (2 * (2 + 2 + 4 + 4) + 2) * row


# -- Measuring ---------------------------------------------------------------------------------------------------------


def test_calls_and_input_sets_take_turns() -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: partial(lambda name, number: seen.append((name, number)), name) for name in "ab"}
    timings = measure.times(calls, sets=3, device=CPU, seconds=0)
    assert {name: len(timing.seconds) for name, timing in timings.items()} == dict.fromkeys("ab", measure.MIN_ROUNDS)
    numbers = Counter(number for name, number in seen if name == "a")
    assert set(numbers) == {0, 1, 2}
    assert max(numbers.values()) - min(numbers.values()) <= 1
    assert all(seen[i][0] != seen[i + 1][0] for i in range(0, len(seen), 2))


@pytest.mark.parametrize("threads, clock", [(1, "cpu"), (2, "wall")])
def test_time_is_the_call_s(threads: int, clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one thread, less the time in which it does not compute."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def busy(_: int) -> None:
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass

    calls = {"busy": busy, "idle": lambda _: time.sleep(0.02)}
    timings = measure.times(calls, sets=1, device=CPU, seconds=0)
    busy_second, idle_second = (measure.quantiles(timings[name].seconds)[1] for name in calls)
    assert {timing.clock for timing in timings.values()} == {clock}
    assert busy_second >= 0.02
    assert idle_second < 0.01 if clock == "cpu" else idle_second >= 0.02


def test_peak_memory_is_the_most_held_at_once() -> None:
    values = torch.ones(1 << 18)  # 1 MiB

    def call(_: int) -> torch.Tensor:
        doubled = values * 2
        squared = doubled.square()
        del doubled
        return squared + 1  # 2 MiB at once, 3 in all

    assert 2 << 20 <= measure.peak_bytes(call, CPU) < 2.1 * (1 << 20)


def test_input_sets_exceed_the_cache_twice() -> None:
    cache = measure.cache_bytes(CPU)
    assert cache >= 1 << 18
    for size in (1 << 16, cache, 10 * cache):
        sets = measure.sets_needed(size, CPU)
        assert (sets - 1) * size >= 2 * cache > (sets - 2) * size


def test_quantiles() -> None:
    assert measure.quantiles([4.0]) == (4, 4, 4)
    assert measure.quantiles([float(i) for i in range(11)]) == pytest.approx((2, 5, 8))


@pytest.mark.gpu
def test_a_gpu_is_timed_by_graph_and_its_host_apart() -> None:
    device = torch.device("cuda")
    size = 1 << 30
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    calls = {"copy": lambda _: target.copy_(source), "read back": lambda _: target[0].item()}
    with pytest.warns(UserWarning, match="cannot be captured"):
        timings = measure.times(calls, 1, device, seconds=0.1)
    assert timings["copy"].clock == "graph"
    assert timings["read back"].clock == "events"
    device_second = measure.quantiles(timings["copy"].seconds)[1]
    host_second = measure.quantiles(measure.host_seconds(calls["copy"], 1, device))[1]
    assert host_second < device_second
    assert measure.peak_bytes(lambda _: source + 1, device) == size


@pytest.mark.gpu
@OPS
def test_a_gpu_run_has_every_metric(op: Op[Any]) -> None:
    measured = suite.run(op, replace(TINY, D=4096), torch.device("cuda"), seconds=0.1, only=("direct", "exact"))
    for mode in MODES:
        metrics = {row.metric for row in measured["exact", mode].rows}
        assert metrics >= {"time", "host_time", "bandwidth", "copy_share", "extra_memory", "min_bytes"}
        assert {row.clock for row in measured["exact", mode].rows if row.metric == "time"} == {"graph"}


# -- Rows, tables, pictures --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some_rows() -> list[rows.Row]:
    calls = {"direct": LOSS.providers(CPU)["direct"], "exact": providers.our_loss("reference")}
    measured = suite.run(replace(LOSS, providers=lambda device: calls), TINY, CPU, seconds=0)
    return [row for found in measured.values() for row in found.rows]


def test_rows_survive_the_csv(some_rows: list[rows.Row], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows.append(path, some_rows[:3])
    rows.append(path, some_rows[3:])
    back = rows.read([path])
    assert [row.key() for row in back] == [row.key() for row in some_rows]
    for ours, theirs in zip(some_rows, back, strict=True):
        assert theirs.p50 == pytest.approx(ours.p50, rel=1e-5)
        assert (theirs.D, theirs.device, theirs.moving_dtype) == (512, ours.device, "bfloat16")
    assert {row.metric for row in back} >= {"time", "bandwidth", "extra_memory", "log_ratio_error", "grad_error"}
    assert all(row.commit and row.torch and row.date and row.triton for row in back)


def test_a_later_row_replaces(some_rows: list[rows.Row], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows.append(path, some_rows)
    rows.append(path, [replace(some_rows[0], p50=123.0)])
    back = rows.read([path])
    assert len(back) == len(some_rows)
    assert back[0].p50 == 123


def test_a_csv_with_other_columns_is_left_alone(some_rows: list[rows.Row], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("op,provider\n")
    with pytest.raises(ValueError, match="other columns"):
        rows.append(path, some_rows)
    assert path.read_text() == "op,provider\n"


def test_the_table_has_the_medians(some_rows: list[rows.Row]) -> None:
    lines = list(table.markdown(some_rows, absolute=True))
    header, exact = (
        next(line for line in lines if line.startswith(start))
        for start in ("| setting", "| tiny | 2 2 3 | 512 | exact")
    )
    cells = dict(zip(header.split(" | "), exact.split(" | "), strict=True))
    (median,) = [row for row in some_rows if (row.provider, row.mode, row.metric) == ("exact", "forward", "time")]
    assert float(cells["forward, ms"]) == pytest.approx(median.p50, rel=1e-2)
    assert "host, µs" not in cells
    assert not any(", ms" in line for line in table.markdown(some_rows, absolute=False))


def test_the_page_shows_the_committed_rows(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(table.DOCS.read_text())
    table.main(table.Table(markdown=page))
    assert page.read_text() == table.DOCS.read_text(), "run python -m benchmarks.table"


def test_the_picture_is_drawn(some_rows: list[rows.Row], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    path = tmp_path / "rows.csv"
    rows.append(path, some_rows)
    plot.main(plot.Plot(results=(path,), out=tmp_path / "new" / "picture.png"))
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")


# -- The front ends ----------------------------------------------------------------------------------------------------


def test_pytest_benchmark_reports_what_was_measured(tmp_path: Path) -> None:
    results, saved = tmp_path / "rows.csv", tmp_path / "saved.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_distances.py", "--benchmark-only", "-q"]
    options = ["--settings=smoke", "--providers=direct,exact", "--seconds=0.05", f"--results={results}"]
    # Where tests run side by side, what they start must not think that it does too: it would measure nothing.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, *options, f"--benchmark-json={saved}", "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=alone,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    times = {(row.provider, row.mode): row.p50 for row in rows.read([results]) if row.metric == "time"}
    assert set(times) == {(provider, mode) for provider in ("direct", "exact") for mode in MODES}
    for benchmark in json.loads(saved.read_text())["benchmarks"]:
        info = benchmark["extra_info"]
        assert benchmark["stats"]["median"] * 1e3 == pytest.approx(times[info["provider"], info["mode"]], rel=1e-4)
        assert info["commit"]
        assert info["extra_memory"][1] >= 0


def gpu_script(part: str, out: Path, python: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), part, str(out), *more]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": python})


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything")
def test_the_gpu_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = gpu_script("all", tmp_path, sys.executable)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not any(tmp_path.iterdir())
    assert gpu_script("everything", tmp_path, sys.executable).returncode == 2


@pytest.mark.parametrize("part, has_gpu", [("quick", True), ("rehearse", False)])
def test_the_gpu_script_hands_on_what_is_left_of_its_seconds(tmp_path: Path, part: str, has_gpu: bool) -> None:
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && {{ sleep 1; exit {int(not has_gpu)}; }}\necho "ran $*"; exit 1\n')
    python.chmod(0o755)
    done = gpu_script(part, out, str(python), "100")
    assert done.returncode == 1
    ran, *_ = (line.split() for line in done.stdout.splitlines())
    assert ran[:5] == ["ran", "-m", "benchmarks.quick", str(out), "--seconds"]
    assert int(ran[5]) in (range(80, 100) if has_gpu else range(90, 101))
    assert ran[6:] == ([] if has_gpu else ["--tiny"])
    assert {file.name for file in out.iterdir()} == ({"quick.log"} if has_gpu else set())
    assert gpu_script("tests", out, str(python), "100").returncode == 2


@pytest.mark.parametrize("fails", [False, True])
def test_the_gpu_script_keeps_what_a_failed_part_left(tmp_path: Path, fails: bool) -> None:
    python, out = tmp_path / "python", tmp_path / "out"
    # Stands in for a Python that has a GPU, and for the commands it is given.
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "ran $*"\ncase "$*" in *bench_*) exit {int(fails)};; esac\n'
    )
    python.chmod(0o755)
    done = gpu_script("all", out, str(python))
    assert done.returncode == int(fails), done.stdout + done.stderr
    assert "ran -m pytest tests/kernels" in (out / "tests.log").read_text()
    assert f"--results {out}/kernels_gpu.csv" in (out / "kernels.log").read_text()
    assert ("failed: exit status 1" in (out / "kernels.log").read_text()) == fails
    assert "ran -m benchmarks.profile_loss" in (out / "profile.txt").read_text()
    assert (out / "provenance.txt").exists()
    assert len(list(out.iterdir())) <= 6
