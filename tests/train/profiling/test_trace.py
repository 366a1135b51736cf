"""Traces made by hand, of a GPU and of a CPU, against what one works out on paper. Times in them are microseconds."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ngrpo_train.profiling import trace as tracing
from ngrpo_train.profiling.trace import (
    COMMUNICATION,
    COPIES,
    LOSS,
    LOSS_KERNELS,
    OPTIMIZER,
    Event,
    Trace,
    group_of,
    parse,
    read,
)

STAGES = ("rollout", "update")
KERNELS = Path(__file__).parents[3] / "ngrpo_kernels" / "_triton"


def us(start: float, stop: float) -> tuple[int, int]:
    return round(1000 * start), round(1000 * stop)


def row(category: str, name: str, start: float, stop: float, thread: int = 1, **args: Any) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": stop - start,
        "pid": 0,
        "tid": thread,
        "args": args,
    }


def span(name: str, start: float, stop: float, thread: int = 1) -> dict[str, Any]:
    return row("user_annotation", name, start, stop, thread)


def of(*rows: dict[str, Any], on_gpu: bool) -> Trace:
    return Trace.of(parse({"traceEvents": list(rows)}), STAGES, on_gpu=on_gpu)


def microseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(1e6 * value, 3) for name, value in seconds.items() if value}


# --- intervals


@pytest.mark.parametrize(
    "intervals, covered",
    [
        ([], []),
        ([(3, 5), (0, 2)], [(0, 2), (3, 5)]),
        ([(0, 2), (2, 4)], [(0, 4)]),
        ([(0, 9), (2, 4), (8, 10)], [(0, 10)]),
        ([(1, 1), (5, 4), (2, 3)], [(2, 3)]),  # empty ones cover nothing
    ],
)
def test_union(intervals, covered):
    assert tracing.union(intervals) == covered


@pytest.mark.parametrize(
    "these, those, left",
    [
        ([], [(0, 1)], []),
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(2, 3), (5, 7)], [(0, 2), (3, 5), (7, 10)]),
        ([(0, 10)], [(-5, 2), (9, 12)], [(2, 9)]),
        ([(0, 2), (4, 6), (8, 10)], [(1, 9)], [(0, 1), (9, 10)]),  # one hole over several
        ([(0, 2), (4, 6)], [(2, 4)], [(0, 2), (4, 6)]),  # touching is not covering
    ],
)
def test_difference(these, those, left):
    assert tracing.difference(these, those) == left
    assert tracing.total(these) == tracing.total(left) + tracing.total(tracing.intersection(these, those))


# --- files


def test_a_trace_file_is_read_in_nanoseconds_since_its_first_event(tmp_path):
    late = 4386085782195.071  # as kineto writes it: microseconds of months, in whole nanoseconds
    rows = [
        row("kernel", "b", late + 0.003, late + 0.004, thread=7, correlation=3),
        row("cpu_op", "a", late, late),
        {"ph": "M", "name": "process_name"},
        {"ph": "i", "name": "an instant", "ts": 1},
    ]
    rows[0]["dur"] = 0.001
    expected = [
        Event("b", "kernel", 3, 4, ("0", "7"), 3),
        Event("a", "cpu_op", 0, 0, ("0", "1")),
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": rows}))
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": rows}, file)
    assert read(tmp_path / "trace.json") == read(tmp_path / "trace.json.gz") == expected


@pytest.mark.parametrize(
    "name, content",
    [
        ("trace.json", b""),
        ("trace.json", b'{"traceEvents": ['),
        ("trace.json", b"[]"),
        ("trace.json", b'{"traceEvents": {}}'),
        ("trace.json", b'{"traceEvents": [{"ph": "X", "name": "a", "ts": 1}]}'),
        ("trace.json", b'{"traceEvents": [{"ph": "X", "name": "a", "ts": "1", "dur": 1}]}'),
        ("trace.json", b"\xff\xfe"),
        ("trace.json.gz", b"not gzipped"),
        ("trace.json.gz", gzip.compress(b'{"traceEvents": []}', mtime=0)[:-6]),
    ],
)
def test_a_file_that_is_no_trace(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="not a trace"):
        read(tmp_path / name)


def test_a_missing_file_is_no_trace(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json is not a trace: .*No such file"):
        read(tmp_path / "nowhere.json")


def test_a_negative_duration_counts_as_none():
    assert parse({"traceEvents": [row("cpu_op", "a", 5, 3)]}) == [Event("a", "cpu_op", 0, 0, ("0", "1"))]


# --- a GPU


GPU = (
    span("iteration", 0, 100),
    span("rollout", 0, 40),
    span("rollout.forward", 5, 30),
    span("update", 50, 90),
    span("update.optimizer", 80, 85),
    row("cuda_runtime", "cudaLaunchKernel", 6, 7, correlation=1),
    row("cuda_driver", "cuLaunchKernelEx", 10, 11, correlation=2),
    row("cuda_runtime", "cudaLaunchKernel", 20, 21, correlation=3),
    row("cuda_runtime", "cudaLaunchKernel", 55, 56, correlation=4),
    row("cuda_runtime", "cudaLaunchKernel", 81, 82, correlation=5),
    row("cuda_runtime", "cudaStreamSynchronize", 62, 74),
    row("kernel", "nvjet_hsh_128x256", 10, 30, thread=7, correlation=1),
    row("kernel", "ncclDevKernel_AllGather_RING_LL", 20, 45, thread=9, correlation=2),  # 20 to 30 is hidden
    row("kernel", "flash_fwd_kernel", 40, 52, thread=7, correlation=3),  # launched in the rollout, 40 to 45 beside nccl
    row("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 56, 60, thread=7, correlation=4),
    row("kernel", "vectorized_elementwise_kernel", 82, 86, thread=7, correlation=5),  # of the optimizer
    row("kernel", "sums_kernel", 90, 90, thread=7, correlation=99),  # no time, and no launch in the trace
    row("kernel", "nvjet_hsh_128x256", 200, 300, thread=7, correlation=98),  # after the iteration
    row("gpu_user_annotation", "rollout", 10, 52, thread=7),
)


def test_communication_is_exposed_where_nothing_computes():
    trace = of(*GPU, on_gpu=True)
    assert microseconds(trace.timeline()) == {"computing": 36.0, "communicating": 10.0, "copying": 4.0, "idle": 50.0}
    assert trace.communication() == pytest.approx(25e-6)
    assert sum(trace.timeline().values()) == pytest.approx(trace.seconds) == pytest.approx(100e-6)


def test_hidden_communication_is_not_exposed():
    rows = [row for row in GPU if row["cat"] != "kernel" or "nccl" not in row["name"]]
    trace = of(*rows, row("kernel", "ncclDevKernel_ReduceScatter", 12, 28, thread=9), on_gpu=True)
    assert trace.timeline()["communicating"] == 0
    assert trace.communication() == pytest.approx(16e-6)


def test_a_copy_hides_no_communication():
    rows = [
        span("iteration", 0, 10),
        row("kernel", "ncclKernel_AllReduce", 2, 8, thread=9),
        row("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 4, 9, thread=7),
    ]
    assert microseconds(of(*rows, on_gpu=True).timeline()) == {"communicating": 6.0, "copying": 1.0, "idle": 3.0}


def test_work_belongs_to_the_stage_that_launched_it():
    sums = {each.name: each for each in of(*GPU, on_gpu=True).by_group()}
    assert {name: microseconds(dict(each.by_stage)) for name, each in sums.items()} == {
        COMMUNICATION: {"rollout": 25.0},
        "matrix products": {"rollout": 20.0},
        "attention": {"rollout": 12.0},
        COPIES: {"update": 4.0},
        OPTIMIZER: {"update": 4.0},
        LOSS: {},
    }
    assert {name: each.count for name, each in sums.items()} == dict.fromkeys(sums, 1)
    assert dict(sums[LOSS].by_stage) == {"elsewhere": 0.0}


def test_gaps_say_where_the_host_was_and_what_it_did():
    trace = of(*GPU, on_gpu=True)
    assert [(round(1e6 * gap.start), round(1e6 * gap.seconds), gap.where, gap.call) for gap in trace.gaps(3)] == [
        (60, 22, "update", "cudaStreamSynchronize"),
        (86, 14, "elsewhere", ""),
        (0, 10, "rollout.forward", ""),
    ]
    assert microseconds(trace.idle_by_stage()) == {"rollout": 10.0, "update": 26.0, "elsewhere": 14.0}


def test_of_nested_calls_the_innermost_that_lasts_is_named():
    rows = [
        span("iteration", 0, 100),
        row("cpu_op", "aten::item", 1, 99),
        row("cpu_op", "aten::_local_scalar_dense", 2, 98),
        row("cuda_runtime", "cudaStreamSynchronize", 30, 95),
        row("cuda_runtime", "cudaMemcpyAsync", 3, 20),
        row("kernel", "k", 97, 98, thread=7),
    ]
    assert of(*rows, on_gpu=True).gaps(1)[0].call == "cudaStreamSynchronize"


def test_several_iterations_and_what_lies_between():
    rows = [
        span("iteration", 0, 10),
        span("iteration", 20, 30),
        *(row("kernel", "gemm", start, start + 5, thread=7) for start in (2, 12, 22)),
    ]
    trace = of(*rows, on_gpu=True)
    assert microseconds(trace.timeline()) == {"computing": 10.0, "idle": 10.0}
    assert [each.count for each in trace.by_name()] == [2]


# --- a CPU


CPU = (
    span("iteration", 0, 100),
    span("rollout", 0, 40),
    row("cpu_op", "aten::linear", 10, 30),
    row("cpu_op", "aten::t", 10, 12),
    row("cpu_op", "aten::addmm", 12, 30),
    row("cpu_op", "aten::view", 30, 31),
    span("update", 50, 100),
    span("update.backward", 50, 80),
    row("cpu_op", "autograd::engine::evaluate_function: MulBackward0", 50, 60),
    row("cpu_op", "aten::mul", 52, 58),
    span("gloo:all_reduce", 55, 70, thread=2),
    row("cpu_op", "aten::copy_", 56, 57, thread=2),  # gloo's own
    span("update.optimizer", 80, 90),
    row("cpu_op", "aten::add_", 81, 84),
)


def test_an_operator_counts_without_what_it_calls():
    trace = of(*CPU, on_gpu=False)
    assert {each.name: round(1e6 * each.seconds) for each in trace.by_name()} == {
        "aten::addmm": 18,
        "gloo:all_reduce": 15,
        "aten::mul": 6,
        "autograd::engine::evaluate_function: MulBackward0": 4,
        "aten::add_": 3,
        "aten::t": 2,
        "aten::view": 1,
        "aten::linear": 0,
    }
    assert {each.name: round(1e6 * each.seconds) for each in trace.by_group()} == {
        "matrix products": 18,
        COMMUNICATION: 15,
        "bookkeeping": 7,
        "norms, pointwise": 6,
        OPTIMIZER: 3,
    }


def test_what_an_optimizer_uses_too_is_there_twice():
    trace = of(*CPU, row("cpu_op", "aten::add_", 90, 95), on_gpu=False)
    adds = [(each.group, round(1e6 * each.seconds)) for each in trace.by_name() if each.name == "aten::add_"]
    assert adds == [("norms, pointwise", 5), (OPTIMIZER, 3)]


def test_a_cpus_time():
    timeline = microseconds(of(*CPU, on_gpu=False).timeline())
    # linear, mul and add_ compute; of gloo's 15, mul hides 3; around mul, autograd keeps its books for 2 before gloo.
    assert timeline == {"computing": 29.0, "communicating": 12.0, "bookkeeping": 3.0, "idle": 56.0}


# --- groups


@pytest.mark.parametrize(
    "name, group",
    [
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", COMMUNICATION),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("fmha_cutlassB_bf16_aligned_128x64_k65536_sm80", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<GemmUniversal>>", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
        ("triton_tem_fused_addmm_view_7", "matrix products"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_add_mul_3", "norms, pointwise"),
        ("triton_red_fused_native_layer_norm_0", "norms, pointwise"),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16>", "convolutions"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", COPIES),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", COPIES),
        ("Memset (Device)", COPIES),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "norms, pointwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", OPTIMIZER),
        ("sums_kernel", LOSS),
        ("void somebody::sums_kernel<float>", "other"),
    ],
)
def test_groups_of_kernels(name, group):
    assert group_of(name, on_gpu=True) == group


@pytest.mark.parametrize(
    "name, group",
    [
        ("gloo:all_gather", COMMUNICATION),
        ("c10d::_reduce_scatter_base_", COMMUNICATION),
        ("ngrpo_cpp::objective", LOSS),
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::resolve_conj", "bookkeeping"),
        ("aten::gelu_backward", "norms, pointwise"),
        ("aten::index_select", "norms, pointwise"),
        ("aten::select", "bookkeeping"),
        ("aten::_to_copy", COPIES),
        ("fsdp::all_gather_copy_in", COPIES),
        ("aten::empty_strided", "bookkeeping"),
        ("AddmmBackward0", "bookkeeping"),
        ("## Call CompiledFxGraph abc ##", "norms, pointwise"),
    ],
)
def test_groups_of_operators(name, group):
    assert group_of(name, on_gpu=False) == group


def test_every_kernel_of_the_loss_is_known():
    defined = [
        name
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"@triton\.jit[^\n]*\n(?:@[^\n]*\n)*def (\w+_kernel)\(", path.read_text("utf-8"))
    ]
    assert sorted(defined) == sorted(LOSS_KERNELS)


# --- traces that say nothing


@pytest.mark.parametrize(
    "rows, on_gpu, complaint",
    [
        ([], True, "the trace has no range called 'iteration'"),
        ([row("kernel", "gemm", 0, 1)], True, "the trace has no range called 'iteration'"),
        (
            [span("iteration", 0, 1), row("cpu_op", "aten::mm", 0, 1)],
            True,
            "the trace has no kernels in its iterations",
        ),
        ([span("iteration", 0, 1), row("kernel", "gemm", 0, 1)], False, "the trace has no operators in its iterations"),
        ([span("iteration", 0, 1), row("kernel", "gemm", 5, 6)], True, "the trace has no kernels in its iterations"),
    ],
)
def test_a_trace_without_iterations_or_work(rows, on_gpu, complaint):
    with pytest.raises(ValueError, match=f"^{complaint}$"):
        of(*rows, on_gpu=on_gpu)
