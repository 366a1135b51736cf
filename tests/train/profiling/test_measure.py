"""The profiler on real iterations of small models: what it names, that its numbers add up, what it leaves behind."""

import copy
import io
import json
import re
import shlex
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ngrpo_train.profiling import measure as profiling
from ngrpo_train.profiling.measure import Iteration, profile
from ngrpo_train.profiling.nsight import nsight_commands
from ngrpo_train.profiling.ranges import Ranges
from ngrpo_train.profiling.tables import Profile
from ngrpo_train.profiling.trace import Event, Trace, read
from ngrpo_train.recipe import parsing
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.run.stopwatch import Stopwatch

STAGES = ["rollout", "decode", "reward", "update"]


def changed(recipe: Recipe, **fields: Any) -> Recipe:
    """By the names of fields, section and field joined by two underscores."""
    for name, value in fields.items():
        section, _, field = name.partition("__")
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{field: value})})
    return recipe


@pytest.fixture
def tiny(tiny_recipe: Path) -> Recipe:
    """4 solver steps, 1 double and 2 single blocks; 8 rows of 2 prompts, all trained at once."""
    return parsing.resolve(parsing.read_recipe(tiny_recipe), name="tiny")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of two iterations of the shapes recipe, made smaller."""
    recipe = parsing.resolve(parsing.read_recipe(parsing.find_recipe("shapes_cpu")), name="shapes_cpu")
    recipe = changed(recipe, prompts__per_rank=1, algorithm__num_generations=4, algorithm__num_train_steps=2, **APART)
    out = tmp_path_factory.mktemp("profiles") / "shapes"
    assert profile(recipe, out, iterations=2, warmup=2) == 0
    return out


def ranges_of(out: Path) -> list[Event]:
    return [
        event
        for event in read(out / "trace.json.gz")
        if event.category == "user_annotation" and event.name.partition(".")[0] in ["iteration", *STAGES]
    ]


def assert_nested(ranges: list[Event]) -> None:
    """Every range lies in the one that it is named after."""
    around: list[Event] = []
    for event in sorted(ranges, key=lambda e: (e.start, -e.stop)):
        while around and around[-1].stop <= event.start:
            around.pop()
        if around:
            assert event.stop <= around[-1].stop
        parents = [outer.name for outer in around]
        assert parents == (["iteration"] if event.name != "iteration" else []) + [
            event.name[:end] for end, letter in enumerate(event.name) if letter == "."
        ]
        around.append(event)


# --- numbers


def test_numbers_add_up(shapes):
    numbers = json.loads((shapes / "profile.json").read_text())
    seconds = numbers["seconds"]
    whole = seconds["iteration"]
    assert sum(seconds[stage] for stage in [*STAGES, "elsewhere"]) == pytest.approx(whole)
    assert 0 <= seconds["elsewhere"] < 0.1 * whole
    parts = [seconds[f"update.{part}"] for part in ("forward", "backward", "optimizer")]
    assert all(part > 0 for part in parts)
    assert sum(parts) < seconds["update"]

    trace = Trace.of(read(shapes / "trace.json.gz"), STAGES, on_gpu=False)
    assert trace.seconds / 2 == pytest.approx(whole, rel=0.02)  # the stopwatch's
    assert sum(numbers["timeline"].values()) == pytest.approx(trace.seconds / 2)
    assert sum(numbers["idle"].values()) == pytest.approx(numbers["timeline"]["idle"])
    work = sum(each["seconds"] for each in numbers["work"])
    assert sum(each["seconds"] for each in numbers["groups"]) == pytest.approx(work)
    assert all(sum(each["by_stage"].values()) == pytest.approx(each["seconds"]) for each in numbers["groups"])
    assert work + numbers["timeline"]["idle"] == pytest.approx(trace.seconds / 2)  # one thread worked
    gaps = [gap["seconds"] for gap in numbers["gaps"]]
    assert gaps == sorted(gaps, reverse=True)
    assert sum(gaps) <= 2 * numbers["timeline"]["idle"]


def test_operators_are_counted_as_torch_counts_them(tmp_path):
    x = torch.ones(64, 64, requires_grad=True)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as recorded, torch.profiler.record_function("iteration"):
        (torch.nn.functional.linear(x, x).softmax(0) * x).backward(torch.ones_like(x))
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    ours = {each.name: each for each in Trace.of(read(tmp_path / "trace.json"), [], on_gpu=False).by_name()}
    theirs = {each.key: each for each in recorded.key_averages() if each.key != "iteration"}
    assert {name: each.count for name, each in ours.items()} == {name: each.count for name, each in theirs.items()}
    assert {name: 1e6 * each.seconds for name, each in ours.items()} == pytest.approx(
        {name: each.self_cpu_time_total for name, each in theirs.items()}, abs=0.01
    )


def test_the_tables(shapes):
    text = (shapes / "profile.txt").read_text()
    assert text.startswith("shapes (full), one process on CPU")
    for expected in ("mean of 2 iterations, after 2", "GiB at its peak", "without a tracer"):
        assert expected in text
    for expected in (*STAGES, "backward", "idle", "matrix products", "attention", "aten::addmm"):
        assert f" {expected} " in text
    assert "compiled" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_what_it_leaves_behind(shapes):
    assert sorted(path.name for path in shapes.iterdir()) == [
        "profile.json",
        "profile.txt",
        "recipe.toml",
        "trace.json.gz",
    ]
    profiled = parsing.resolve(parsing.read_recipe(shapes / "recipe.toml"), name="profiled")
    assert profiled.algorithm.num_generations == 4
    assert profiled.parallel.attention == "native"


# --- ranges


APART = {"parallel__retain": "off"}
CASES = {
    "full": APART,
    "retained": {"parallel__update_batch": 2},  # each row by itself
    "lora, recomputed": APART | {"model__tuning": "lora", "model__gradient_checkpointing": "full"},
    "sharded, in two batches": {"parallel__sharding": "full", "parallel__update_batch": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_stages_passes_and_blocks_have_ranges(tiny, case):
    assert profile(changed(tiny, **CASES[case]), Path("out"), iterations=1, warmup=0) == 0
    ranges = ranges_of(Path("out"))
    assert_nested(ranges)
    batches = 2 if "batches" in case else 1
    calls = {"rollout.forward": 4, "update.forward": batches, "update.backward": batches}
    if case == "retained":
        batches = 4
        calls = {"rollout.forward": 4 + batches, "update.backward": batches}
    expected = dict.fromkeys(["iteration", *STAGES, "update.optimizer"], 1) | calls | {"reward": 2}  # begun, and read
    for name, count in calls.items():
        expected |= dict.fromkeys([f"{name}.double 0", f"{name}.single 0", f"{name}.single 1"], count)
    assert Counter(event.name for event in ranges) == expected
    backward = [e.name.rpartition(".")[2] for e in sorted(ranges, key=lambda e: e.start) if "backward." in e.name]
    assert backward == ["single 1", "single 0", "double 0"] * batches


def test_what_fsdp_does_for_a_block_is_in_its_range(tiny):
    """The wait for its weights, forward and backward; and what ends a backward pass is part of that."""
    assert profile(changed(tiny, parallel__sharding="full"), Path("out"), iterations=1, warmup=0) == 0
    events, ranges = read(Path("out") / profiling.TRACE), ranges_of(Path("out"))
    found = Counter()
    for event in events:
        if match := re.fullmatch(
            r"FSDP::(pre_\w+ward|root_post_\w+)(?: \((single_)?transformer_blocks\.(\d)\))?", event.name
        ):
            around = max((r.name for r in ranges if r.start <= event.start and event.stop <= r.stop), key=len)
            found[match[1], f"{'single' if match[2] else 'double'} {match[3]}" if match[3] else "", around] += 1
    blocks = ["double 0", "single 0", "single 1"]
    expected = {
        ("pre_forward", block, f"{stage}.forward.{block}"): n
        for block in blocks
        for stage, n in (("rollout", 4), ("update", 1))
    }
    expected |= {("pre_backward", block, f"update.backward.{block}"): 1 for block in blocks}
    expected |= {("root_post_backward_callback", "", "update.backward.double 0"): 1}
    assert {key: count for key, count in found.items() if key[1] or "post" in key[0]} == expected


def test_hooks_go_with_the_profile(load_flux, tiny_dev):
    flux = load_flux(tiny_dev)
    flux._float8 = types.SimpleNamespace(model=copy.deepcopy(flux.transformer))
    optimizer = torch.optim.SGD(flux.transformer.parameters())

    def hooks() -> int:
        modules = [*flux.transformer.modules(), *flux._float8.model.modules()]
        of_modules = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
        return of_modules + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)

    with Ranges(Stopwatch(flux.device), torch.profiler.record_function).inside(flux, optimizer):
        assert hooks() == 2 * (2 * (1 + 3) + 1)  # before and after: both models and their blocks, and a step
    assert hooks() == 0


# --- for Nsight


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Pushes and pops of a package that stands in for nvtx."""
    seen: list[tuple[str, str]] = []

    @contextmanager
    def annotate(name: str) -> Iterator[None]:
        seen.append(("push", name))
        yield
        seen.append(("pop", name))

    monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(annotate=annotate))
    return seen


def test_without_a_trace_nvtx_has_the_ranges(ngrpo, tiny_recipe, nvtx):
    code, shown, _ = ngrpo("profile", tiny_recipe, "--iterations=1", "--warmup=0", "--no-trace", "--out=out")
    assert code == 0
    stack = []
    for what, name in nvtx:
        if what == "push":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    names = {name for _, name in nvtx}
    assert {"iteration", *STAGES, "rollout.forward.double 0", "update.backward.single 1", "update.optimizer"} <= names
    assert sorted(path.name for path in Path("out").iterdir()) == ["profile.json", "profile.txt", "recipe.toml"]
    assert shown == Path("out/profile.txt").read_text()
    assert " backward " in shown


def test_without_nvtx_there_is_nothing_for_nsight(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ValueError, match=r'needs? nvtx: pip install "ngrpo\[profile\]"'):
        profile(tiny, Path("out"), trace=False)
    assert not Path("out").exists()


def test_nsight_is_told_of_the_profiled_iterations_alone(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    with profiling._recording(tmp_path, torch.device("cuda"), trace=False, memory=False):
        calls.append("iterations")
    assert calls == ["start", "iterations", "stop"]


def test_command_lines_for_nsight(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["flux_lora", "--prompts.source", "my prompts.txt", "--out", "there"]
    lines = nsight_commands(arguments, Path("there"))
    nsys, ncu = map(shlex.split, lines)
    own = [sys.executable, "-m", "ngrpo_train", "profile", *arguments, "--no-trace"]
    assert nsys[:2] == ["nsys", "profile"]
    assert nsys[-len(own) - 2 :] == [*own, "--out", "there/under_nsys"]
    assert "--capture-range cudaProfilerApi --capture-range-end stop --output there/nsys " in lines[0]
    assert ncu[:3] == ["ncu", "--profile-from-start", "off"]
    assert ncu[-len(own) - 6 :] == [*own, "--iterations", "1", "--warmup", "1", "--out", "there/under_ncu"]
    assert "update.backward.single 0/" in ncu


@pytest.mark.parametrize("nodes", [1, 2])
def test_command_lines_under_torchrun(monkeypatch, nodes):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", str(8 * nodes))
    (nsys,) = nsight_commands(["flux_dpmpp8"], Path("there"))  # collectives do not bear Nsight Compute
    launcher = "-m torch.distributed.run " + ("--nnodes 2 " if nodes == 2 else "") + "--nproc-per-node 8 -m ngrpo_train"
    assert f"{launcher} profile flux_dpmpp8 --no-trace --out there/under_nsys" in nsys


# --- what it says of a GPU, and in warning


def shown(found: Profile) -> str:
    file = io.StringIO()
    for part in found.shown():
        Console(file=file, width=100).print(part)
    return file.getvalue()


def found(**changes: Any) -> Profile:
    seconds = {"rollout": 1.0, "rollout.forward": 0.8, "update": 2.0, "iteration": 4.0}
    defaults = {"title": "", "iterations": 1, "seconds": seconds, "cost": {"memory/peak_gib": 60.0}}
    return Profile(**defaults | {"trace": None, "notes": [], "commands": []} | changes)


def test_stages_and_cost():
    assert found().stages == {"rollout": 1.0, "update": 2.0, "elsewhere": 1.0}
    cost = {"compute/mfu": 0.412, "compute/hfu": 0.5, "memory/peak_gib": 60.0}
    cost |= {"memory/reserved_gib": 70.0, "memory/alloc_retries": 2.0}
    text = shown(found(cost=cost, notes=["a note"], commands=["nsys profile"]))
    assert "MFU 41.2 %, HFU 50.0 %, memory: 60.00 GiB at its peak, 70.00 GiB reserved, 2 retries" in text
    assert "note: a note" in text
    assert "nsys profile" in text


def test_exposed_communication_and_gaps_are_shown():
    host, gpu, nccl = ("1", "1"), ("0", "7"), ("0", "9")
    events = [
        Event("iteration", "user_annotation", 0, 10**9, host),
        Event("rollout", "user_annotation", 0, 10**9, host),
        Event("cudaStreamSynchronize", "cuda_runtime", 6 * 10**8, 10**9, host),
        Event("void at::native::gemm<[bold]>", "kernel", 0, 4 * 10**8, gpu),
        Event("ncclDevKernel_AllGather", "kernel", 2 * 10**8, 6 * 10**8, nccl),
    ]
    text = shown(found(trace=Trace.of(events, ["rollout"], on_gpu=True)))
    assert "Communication took 0.400 s, of which computation hid 50%." in text
    assert "Idle in rollout 0.400 s, elsewhere 0.000 s." in text
    assert "400.00   rollout   cudaStreamSynchronize" in text
    assert " gemm<[bold]>" in text


def iteration(**changes: Any) -> Iteration:
    return replace(Iteration({"iteration": 2.0}, groups=4, trained=4, graphs=0), **changes)


def test_notes():
    def notes(before: list[Iteration], made: list[Iteration], traced: bool = True) -> list[str]:
        return list(profiling._notes(before, made, traced=traced))

    assert notes([iteration()], [iteration()]) == []
    fast = iteration(seconds={"iteration": 1.5})
    assert notes([fast], [iteration()]) == []  # the first iteration compiles: no measure
    assert notes([iteration(), fast], [iteration()], traced=False) == []
    (note,) = notes([iteration(), fast], [iteration()])
    assert note == "the iteration before these took 1.500 s without a tracer, 75% of their mean"
    (note,) = notes([], [iteration(), iteration(graphs=3)])
    assert note.startswith("3 graphs were compiled in these iterations")
    (note,) = notes([], [iteration(trained=1), iteration()])
    assert note.startswith("3 of 8 groups had nothing to train on")


def test_a_trace_that_cannot_be_read_costs_only_its_tables(tmp_path):
    (tmp_path / "trace.json").write_text('{"traceEvents": []}')
    analysed, notes = profiling._analysed(tmp_path / "trace.json", STAGES, torch.device("cuda"))
    assert analysed is None
    (note,) = notes
    assert note.startswith("the trace has no range called 'iteration': does another profiler hold the device?")


# --- bad input


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"iterations": 0}, "--iterations = 0 must be positive"),
        ({"warmup": -1}, "--warmup = -1 must be 0 or more"),
        ({"out": Path("taken")}, "--out = 'taken' exists: give another directory"),
        ({"out": Path("prompts.txt")}, "--out = 'prompts.txt' is not a directory"),
        ({"out": Path("prompts.txt/out")}, "--out = 'prompts.txt/out' cannot be written to: Not a directory"),
        pytest.param(
            {"memory": True},
            "--memory records what is allocated on a GPU, and there is none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_any_work(tiny, monkeypatch, options, complaint):
    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(profiling.Trainer, "make", load)
    Path("taken").mkdir()
    Path("taken/mine").write_text("precious")
    with pytest.raises(ValueError, match="^" + complaint):
        profile(tiny, **{"out": Path("out"), **options})
    assert not Path("out").exists()
    assert Path("taken/mine").read_text() == "precious"


def test_a_recipe_that_cannot_train_cannot_be_profiled(tiny):
    with pytest.raises(ValueError, match=r"algorithm\.sigma = 0 must be in"):
        profile(changed(tiny, algorithm__sigma=0), Path("out"))
    assert not Path("out").exists()
