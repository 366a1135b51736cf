"""Checks and measurements of all providers of one op at one setting, which the pytest-benchmark suites report."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

from benchmarks import measure
from benchmarks.providers import DISTANCES, MODES, AnyInputs, Op, Result, Setting, gradient, is_exact
from benchmarks.rows import Row, provenance

ACCURACY_UNITS = {  # in the order of the columns; each is a row of the mode that first has it
    "loss_error": "absolute",
    "log_ratio_error": "absolute",
    "clip_mismatch": "share",
    "sqdist_error": "relative",
    "grad_error": "relative",
}


@dataclass(slots=True)
class Measured:
    """One provider in one mode: rows for the CSV and samples for pytest-benchmark, or the reason why there are none."""

    rows: list[Row] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    wrong: str = ""
    skipped: str = ""


def run(
    op: Op[Any], setting: Setting, device: torch.device, seconds: float, only: Collection[str] = ()
) -> dict[tuple[str, str], Measured]:
    """Check and measure all providers, or those of `only`, in both modes, by (provider, mode).

    Timing a mode takes about `seconds`. A provider that is wrong or does not fit into memory is not timed.
    """
    inputs = op.make_inputs(setting, device)
    providers = {name: call for name, call in op.providers(device).items() if not only or name in only}
    if any(name.endswith("-compiled") for name in providers):
        torch.compiler.reset()  # code compiled for an earlier setting counts towards the limit on recompiling
    measured = {(name, mode): Measured() for name in providers for mode in MODES}
    truth, errors = op.truth(inputs), {}
    for name, provider in list(providers.items()):
        try:
            result, grad = _warm_result(provider, inputs)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            wrong, skipped = "", f"{name} does not fit into memory"
        else:
            errors[name] = op.errors(inputs, result, grad, truth)
            wrong, skipped = "; ".join(_problems(name, result, grad, errors[name].excess())), ""
            del result, grad
        if wrong or skipped:
            del providers[name]
            for mode in MODES:
                measured[name, mode] = Measured(wrong=wrong, skipped=skipped)
    del truth

    copies = measure.sets_needed(op.min_bytes(inputs, "forward"), device) - 1
    sets = [inputs] + [_copied(inputs) for _ in range(copies)]
    for mode in MODES:
        calls = {name: partial(_call, provider, sets, mode) for name, provider in providers.items()}
        grad_bytes = 0 if mode == "forward" else inputs.moving.nbytes
        peaks = {name: measure.peak_bytes(call, device) - grad_bytes for name, call in calls.items()}
        timings = measure.times(calls, len(sets), device, seconds)
        for name, call in calls.items():
            has_grad_row = mode != "forward"
            accuracy = {
                error: value
                for error, value in errors[name].measured.items()
                if (error == "grad_error") == has_grad_row
            }
            host = measure.host_seconds(call, len(sets), device) if device.type == "cuda" else None
            of_setting = partial(_row, op.name, setting, device, name, mode)
            measured[name, mode].seconds = timings[name].seconds
            measured[name, mode].rows = [
                *_speed_rows(of_setting, timings[name], timings.get("direct"), op.min_bytes(inputs, mode), device),
                *([] if host is None else [of_setting("host_time", "us", [s * 1e6 for s in host], clock="wall")]),
                of_setting("extra_memory", "MiB", [peaks[name] / 2**20], _ratio(peaks[name], peaks.get("direct"))),
                *(of_setting(error, ACCURACY_UNITS[error], [value]) for error, value in accuracy.items()),
            ]
    return measured


def _warm_result(provider: Callable[[Any], Result], inputs: AnyInputs) -> tuple[Result, torch.Tensor]:
    for _ in range(2):  # the first call compiles or builds; the second one's result is checked
        result = provider(inputs)
        grad = gradient(inputs, result)
    return result, grad


def _problems(name: str, result: Result, grad: torch.Tensor, excess: list[str]) -> list[str]:
    finite = all(bool(tensor.isfinite().all()) for tensor in (*result, grad))
    return [*([] if finite else [f"{name} is not finite"]), *(f"{name}: {e}" for e in excess if is_exact(name))]


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # CUDA's, the CPU's


def _copied(inputs: Any) -> Any:
    tensors = (None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in inputs)
    return type(inputs)(*tensors)


def _call(provider: Callable[[Any], Result], sets: list[Any], mode: str, number: int) -> object:
    inputs = sets[number]
    result = provider(inputs)
    return result if mode == "forward" else gradient(inputs, result)


# -- Rows --------------------------------------------------------------------------------------------------------------


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bandwidth of a copy on the device, measured once per session, in bytes per second."""
    return measure.quantiles(measure.copy_bytes_per_second(device))[1]


def _speed_rows(
    row: Callable[..., Row],
    timing: measure.Timing,
    direct: measure.Timing | None,
    min_bytes: int,
    device: torch.device,
) -> list[Row]:
    rates = [min_bytes / second for second in timing.seconds]
    median = measure.quantiles(timing.seconds)[1]
    ratio = None if direct is None else median / measure.quantiles(direct.seconds)[1]
    return [
        row("time", "ms", [second * 1e3 for second in timing.seconds], ratio, timing.clock),
        row("min_bytes", "MB", [min_bytes / 1e6]),
        row("bandwidth", "GB/s", [rate / 1e9 for rate in rates], clock=timing.clock),
        row("copy_share", "share", [rate / copy_bandwidth(device) for rate in rates], clock=timing.clock),
    ]


def _ratio(value: float, direct: float | None) -> float | None:
    return value / direct if direct else None


def _row(
    op: str,
    setting: Setting,
    device: torch.device,
    provider: str,
    mode: str,
    metric: str,
    unit: str,
    values: list[float],
    ratio: float | None = None,
    clock: str = "",
) -> Row:
    p20, p50, p80 = measure.quantiles(values)
    return Row(
        op=op,
        provider=provider,
        mode=mode,
        setting=setting.name,
        P=setting.P,
        B=setting.B,
        G=setting.G,
        D=setting.D,
        # The distances are between states, which are float32 for any dtype of the model.
        moving_dtype=str(torch.float32 if op == DISTANCES.name else setting.velocity_dtype).removeprefix("torch."),
        old_policy="" if op == DISTANCES.name else setting.old,
        metric=metric,
        unit=unit,
        p20=p20 if len(values) > 1 else None,
        p50=p50,
        p80=p80 if len(values) > 1 else None,
        ratio_to_direct=ratio,
        clock=clock,
        samples=len(values),
        **provenance(device),
    )


# -- For pytest-benchmark ----------------------------------------------------------------------------------------------

_now = 0.0


def measured_clock() -> float:
    """Timer of the suites: it stands still until `advance_clock` moves it."""
    return _now


def advance_clock(seconds: float) -> None:
    global _now
    _now += seconds
