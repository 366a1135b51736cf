"""Two gloo ranks against one process: the same prompts must give the same numbers. How they are launched, and end."""

import json
import math
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from safetensors.torch import load_file
from torch import Tensor

from ngrpo_train.parallel.processes import refuse_foreign_launch

from ..runs import (
    TOLERANCE,
    TWO_PROMPTS,
    Run,
    accelerate_launch,
    assert_close,
    assert_close_figures,
    assert_same_run,
    figures,
    finish,
    observed,
    on_ranks,
    saved,
    script,
    steps_kept,
    torchrun,
    validations,
)

FLAT = {"prompts.source": "two.txt", "rewards.redness.path": "runs:redness_of_circles"}
B_UPDATES = {"algorithm.updates-per-iteration": "2", "parallel.update-batch": "1", "checkpoint.every": "2"}
CASES = {
    "full": {
        "algorithm.sigma": "1",  # a wide spread of rewards, against the byte of a picture that is rounded otherwise
        "algorithm.explore.candidates": "8",
        "algorithm.explore.num-inference-steps": "2",
        "model.ema": "0.5",
        "train.steps": "4",
        "evaluation.validation": "two.txt",
        "evaluation.every": "2",
        "evaluation.test": "two.txt",
        "log.trackers": "tensorboard",
        "log.export": "True",
    },
    "full-B_updates-one_group_flat": FLAT | B_UPDATES,
    "lora-B_updates-one_group_flat": FLAT
    | B_UPDATES
    | {"model.tuning": "lora", "model.lora-rank": "4", "algorithm.reference-coef": "0.1"},
    "lora-nf4": {"model.tuning": "lora", "model.lora-rank": "4", "model.base-dtype": "nf4", "algorithm.sigma": "1"},
    "dance_grpo": FLAT
    | B_UPDATES
    | {"algorithm.name": "dance_grpo", "algorithm.eta": "0.9", "algorithm.clip-range": "0.01"},
}
WITH_UPDATES = [case for case in CASES if "B_updates" in case]
PLAIN = {"evaluation.validation": "", "evaluation.test": "", "log.trackers": "", "log.export": "False"}
ONE_EACH = {"prompts.per-rank": "1"}  # on two ranks


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """CASES, with the path of a file that holds two prompts."""
    prompts = tmp_path_factory.mktemp("prompts") / "two.txt"
    prompts.write_text("\n".join(TWO_PROMPTS))
    cases: dict[str, dict[str, str]] = json.loads(json.dumps(CASES).replace("two.txt", str(prompts)))
    return cases


@pytest.fixture(scope="module")
def two(recipes: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case as two ranks make it, and "full" once more, stopped after two iterations and resumed."""
    directory = tmp_path_factory.mktemp("two")
    runs = [Run(directory / name, recipe | ONE_EACH) for name, recipe in recipes.items()]
    stopped = recipes["full"] | ONE_EACH | PLAIN
    runs.append(Run(directory / "stopped", stopped | {"train.steps": "2"}))
    runs.append(Run(directory / "stopped", stopped, resume="latest"))
    on_ranks(2, runs)
    return directory


@pytest.fixture(scope="module")
def one(recipes: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case as one process makes it."""
    directory = tmp_path_factory.mktemp("one")
    for name, recipe in recipes.items():
        assert Run(directory / name, recipe).make() == 0
    return directory


# --- the same numbers


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_process_does(one: Path, two: Path, case: str) -> None:
    mine, theirs = observed(one / case), observed(two / case)
    for name in ("rewards", "advantages"):
        assert torch.equal(theirs[name], observed(two / case, rank=1)[name])  # both ranks know all of them
        assert mine[name].shape[-2:] == (2, 4)
        torch.testing.assert_close(theirs[name], mine[name], rtol=0, atol=TOLERANCE[name])
    assert_close_figures(figures(two / case), figures(one / case), mine["gains"])
    assert_close_figures(validations(two / case), validations(one / case))
    assert_close(two / case, one / case)


@pytest.mark.parametrize("case", WITH_UPDATES)
def test_with_several_updates_the_compared_loss_is_no_accident(two: Path, case: str) -> None:
    rows = figures(two / case)
    assert max(abs(row["update/loss"]) for row in rows) > 1e-4
    assert max(row["policy/ratio_max"] - row["policy/ratio_min"] for row in rows) > 1e-2


@pytest.mark.parametrize("case", WITH_UPDATES)
def test_the_flat_group_was_on_one_rank_alone(two: Path, case: str) -> None:
    active_SP = (observed(two / case)["advantages"] != 0).any(2)
    assert (active_SP.sum(1) == 1).all()
    assert (active_SP.sum(0) > 0).all()  # on one, and in another iteration on the other


def test_ranks_trained_steps_that_the_other_did_not(two: Path) -> None:
    # Else the comparison could not have shown whether ranks agree on the figures that they exchange.
    trained = [sum(name.startswith("velocity_grad_norm/") for name in row) for row in figures(two / "full")]
    assert min(trained) < 3
    assert max(trained) == 3


@pytest.mark.parametrize("processes", ["one", "two"])
def test_the_end_of_a_run_uses_the_averages(processes: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(processes) / "full"
    exported = load_file(run / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    averages = {name.removeprefix("ema."): t for name, t in saved(run, 4).items() if name.startswith("ema.")}
    assert exported.keys() == averages.keys()
    assert all(torch.equal(exported[name], averages[name]) for name in exported)
    after = json.loads((run / "after.json").read_text())
    last = validations(run)[-1]  # of the same prompts and noise
    for name, scores in zip(after["test"]["names"], after["test"]["scores"], strict=True):
        assert sum(scores) / len(scores) == pytest.approx(last[f"validation/{name}"], abs=1e-6)
    assert list(run.rglob("events.out.tfevents.*"))


def test_bfloat16_arithmetic_trains_float32_weights(
    recipes: dict[str, dict[str, str]], one: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changes = {"parallel.compute-dtype": "bfloat16", "train.steps": "2"}
    assert Run(run, recipes["full"] | PLAIN | changes).make() == 0
    assert not dist.is_initialized()  # the group of its mesh of one is gone
    for coarse, fine in zip(figures(run), figures(one / "full")[:2], strict=True):
        assert all(math.isfinite(value) for value in coarse.values())
        assert coarse["reward/redness"] == pytest.approx(fine["reward/redness"], rel=0.02)
        assert coarse["update/grad_norm"] == pytest.approx(fine["update/grad_norm"], rel=0.3)
    before, after = saved(run, 1), saved(run, 2)
    assert {value.dtype for value in after.values() if isinstance(value, Tensor)} == {torch.float32}
    weights = [name for name in after if name.startswith("model.") and name.endswith("weight")]
    moved = torch.cat([(after[name] != before[name]).flatten() for name in weights])
    assert moved.float().mean() > 0.9  # by 1e-4 each, most of which bfloat16 would round away


# --- ends and beginnings


def test_two_iterations_and_two_more_are_four(two: Path) -> None:
    assert_same_run(two / "stopped", two / "full")


def test_one_process_goes_on_where_two_stopped(
    recipes: dict[str, dict[str, str]], one: Path, two: Path, tmp_path: Path
) -> None:
    checkpoint = Path("checkpoints", "step_000002")
    shutil.copytree(two / "full" / checkpoint, tmp_path / "run" / checkpoint)
    third = recipes["full"] | PLAIN | {"train.steps": "3"}
    assert Run(tmp_path / "run", third, resume="latest").make() == 0
    assert_close_figures(figures(tmp_path / "run"), figures(one / "full")[2:3], observed(one / "full")["gains"][2:3])
    assert_close(tmp_path / "run", one / "full")


def test_a_killed_rank_ends_the_run_and_sigterm_saves_it(
    recipes: dict[str, dict[str, str]], two: Path, tmp_path: Path
) -> None:
    run, recipe = tmp_path / "run", recipes["full"] | ONE_EACH | PLAIN

    with script(Run(run, recipe, kill_in_save_of_step=3)) as arguments:
        launched = torchrun(*arguments)
        output = finish(launched)
    ended = time.time()
    assert launched.returncode == 1, output
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9", output), output
    assert steps_kept(run) == ["step_000001", "step_000002", "step_000003.partial"]
    # The launcher ended it, not the collective that waits for the dead rank, which gives up after 180 seconds.
    assert ended - (run / "checkpoints" / "step_000003.partial").stat().st_mtime < 120

    endless = Run(run, recipe | {"train.steps": "1000", "checkpoint.every": "1000"}, resume="latest")
    launched = accelerate_launch("-m", "ngrpo_train", *endless.arguments())
    try:
        while len(figures(run)) < 4:
            assert launched.poll() is None, launched.communicate()[0]
            time.sleep(0.05)
        launched.send_signal(signal.SIGTERM)
    finally:
        output = finish(launched)
    assert launched.returncode != 0
    assert "2 processes" in output
    assert "SIGTERM: saved" in output
    made = len(figures(run))
    assert steps_kept(run) == ["step_000001", "step_000002", f"step_{made:06d}"]
    assert figures(run)[:4] == figures(two / "full")


def test_without_a_launcher_too_a_killed_rank_ends_the_run(
    recipes: dict[str, dict[str, str]], two: Path, tmp_path: Path
) -> None:
    recipe = recipes["full"] | ONE_EACH | PLAIN | {"train.steps": "3"}
    output, _ = on_ranks(2, [Run(tmp_path / "run", recipe, kill_in_step=2)], codes=[1, -signal.SIGKILL])
    killed_after = (tmp_path / "run" / "checkpoints" / "step_000002").stat().st_mtime
    assert time.time() - killed_after < 120  # the timeout is 180 seconds
    assert re.search(r"rank 0 of 2 ends: a collective failed,\s+so another process died", output), output
    assert steps_kept(tmp_path / "run") == ["step_000001", "step_000002"]
    on_ranks(2, [Run(tmp_path / "run", recipe, resume="latest")])
    assert_same_run(tmp_path / "run", two / "full", steps=3)


# --- launchers


def environment_of(*arguments: str) -> dict[str, str]:
    """What `accelerate launch` would set for its processes."""
    arguments = (*arguments, "--num_machines=1", "train.py")
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(args)[1]
    if args.multi_gpu or args.use_fsdp or args.use_megatron_lm:
        return prepare_multi_gpu_env(args) | {"WORLD_SIZE": "2"}  # torchrun's part
    return prepare_simple_launcher_cmd_env(args)[1]


@pytest.fixture(autouse=True)
def _no_configuration_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", "/nonexistent")


@pytest.mark.parametrize(
    "arguments",
    [["--multi_gpu", "--num_processes=2"], ["--cpu", "--num_processes=1"], ["--num_processes=1"]],
    ids=" ".join,
)
def test_a_plain_accelerate_launch_is_accepted(arguments: list[str]) -> None:
    refuse_foreign_launch(environment_of(*arguments))


@pytest.mark.parametrize(
    "arguments, recipe_field",
    [
        (["--use_fsdp", "--fsdp_version=2"], "parallel.sharding"),
        (["--use_deepspeed", "--zero_stage=3"], "parallel.sharding"),
        (["--use_megatron_lm"], "parallel.sharding"),
        (["--multi_gpu", "--mixed_precision=bf16"], "parallel.compute_dtype"),
        (["--cpu", "--mixed_precision=fp16"], "parallel.compute_dtype"),
        (["--multi_gpu", "--dynamo_backend=inductor"], "parallel"),
        (["--cpu"], "parallel.device"),  # which starts one process
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_recipe_decides_is_refused(arguments: list[str], recipe_field: str) -> None:
    with pytest.raises(ValueError, match=recipe_field.replace(".", r"\.")):
        refuse_foreign_launch(environment_of(*arguments, "--num_processes=2"))
