"""What only a GPU shows of training: agreement with the CPU, no waiting for the device, nothing compiled twice."""

import math
from pathlib import Path

import pytest
import torch

from ngrpo_train.algorithms import make_algorithm
from ngrpo_train.commands.train import TrainCommand
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import PromptCursor, load_prompts
from ngrpo_train.recipe.parsing import find_recipe, parse, read_recipe
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.rewards import Rewards
from ngrpo_train.run import loop
from ngrpo_train.update.optimizer import make_optimizer

from ..runs import Run, figures, observed

pytestmark = pytest.mark.gpu
ON_GPU = {"parallel.device": "cuda", "parallel.compile": "off", "parallel.attention": "native"}
IN_BFLOAT16 = ON_GPU | {"parallel.compute-dtype": "bfloat16"}
RECOMPUTED = {"model.gradient-checkpointing": "full"}


def test_a_gpu_trains_as_the_cpu_does(tmp_path: Path) -> None:
    assert Run(tmp_path / "cpu").make() == 0
    assert Run(tmp_path / "gpu", ON_GPU).make() == 0
    torch.testing.assert_close(
        observed(tmp_path / "gpu")["rewards"][0], observed(tmp_path / "cpu")["rewards"][0], rtol=0, atol=2e-3
    )
    mine, theirs = figures(tmp_path / "cpu")[0], figures(tmp_path / "gpu")[0]
    for name in ("update/grad_norm", "group/diversity", "policy/policy_entropy"):
        assert theirs[name] == pytest.approx(mine[name], rel=0.05), name


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel.compile": "on", "parallel.attention": "auto"},
        {"parallel.compile": "on", "model.gradient-checkpointing": "selective"},
        {"parallel.master-dtype": "bfloat16", "optimizer.name": "adamw_8bit"},
        {"model.tuning": "lora", "model.lora-rank": "4"},
        {"model.tuning": "lora", "model.base-dtype": "float8", "parallel.compile": "off"},
        {"model.tuning": "lora", "model.base-dtype": "nf4", "parallel.compile": "on", **RECOMPUTED},
        {"parallel.offload": "True"},
        {"parallel.text-encoders": "offload"},
        {"parallel.rollout-dtype": "float8", "parallel.compile": "on"},
    ],
    ids=lambda changes: "-".join(changes.values()),
)
def test_every_way_to_train_runs_and_compiles_once(
    tmp_path: Path, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if changes.get("parallel.rollout-dtype") == "float8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 products")
    # Sample pictures are never drawn in float8: after a float8 rollout, the first ones would compile a forward.
    monkeypatch.setattr(loop, "_draw", lambda *_: None)
    run = tmp_path / "run"
    assert Run(run, IN_BFLOAT16 | changes | {"parallel.update-batch": "2"}).make() == 0
    rows = figures(run)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert not any(row["update/skipped_steps"] for row in rows)
    assert [row["compile/graphs"] for row in rows[1:]] == [0.0] * (len(rows) - 1)


@pytest.mark.parametrize("algorithm", ["neighbor", "mix_grpo_flash", "branch_grpo"])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_the_host_waits_for_the_device_once_between_rollout_and_update(compute_dtype: str, algorithm: str) -> None:
    """For the rewards: neither the rollout nor the update reads anything back."""
    flags = ["--parallel.device", "cuda", "--parallel.compile", "off", "--parallel.sharding", "none"]
    flags += ["--parallel.compute-dtype", compute_dtype, "--parallel.keep-gathered", "never"]
    flags += ["--algorithm.name", algorithm]
    command = parse(TrainCommand, read_recipe(find_recipe("shapes_cpu")), flags, prog="", name="shapes_cpu")
    recipe = command.recipe
    with processes.joined(recipe.parallel) as launch:
        _iterate_twice(recipe, launch.device)


def _iterate_twice(recipe: Recipe, device: torch.device) -> None:
    flux = FlowModel(recipe.model, recipe.sampling, recipe.parallel, device)
    optimizer = make_optimizer(list(flux.trainable.values()), recipe.optimizer)
    rewards = Rewards(recipe.rewards)
    algorithm = make_algorithm(recipe)
    cursor = PromptCursor.of(recipe, load_prompts(recipe.prompts.source), 0, 1)
    for step in range(2):  # the first may allocate, and ask libraries what they have
        prompts = cursor.next()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            groups = algorithm.explore(flux, prompts, step)
            images = flux.decode(groups.final_PGS.flatten(0, 1))
            torch.cuda.set_sync_debug_mode("default")
            advantages_PG = algorithm.advantages(rewards(images, prompts), step)
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            stats = algorithm.update(flux, optimizer, groups, advantages_PG)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert stats is not None
