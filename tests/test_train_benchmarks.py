"""The training benchmarks: that they measure what training does, survive a failing case, and compare like with like."""

import dataclasses
import gc
import json
import os
import subprocess
import weakref
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import train_parts, train_rows, train_scorers, train_step, train_table
from benchmarks.train_recipes import as_measured, full_size, score, settings_of, table_3, tiny, with_depth
from benchmarks.train_rows import Case, Row, Session, Skip
from ngrpo_train.algorithms.neighbor import LeapingPolicy
from ngrpo_train.models.sizes import KNOWN, find_architecture
from ngrpo_train.plan.settle import settle_memory
from ngrpo_train.prompts import Prompt, PromptCursor
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.parsing import RecipeFlags, parse
from ngrpo_train.recipe.sections import Model, Recipe, Reward
from ngrpo_train.rewards import Rewards, find_scorer, shipped
from ngrpo_train.run.stopwatch import Stopwatch
from ngrpo_train.run.trainer import Trainer
from ngrpo_train.update.policy import update

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scorers have their own loaders again after a test that has replaced them."""
    for name in shipped.NAMES:
        monkeypatch.setattr(import_module(f"{shipped.__name__}.{name}"), "REWARD", shipped.find(name))


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(CPU, tmp_path / "rows.csv")


def statuses(rows: list[Row]) -> dict[str, str]:
    """The status of each case: that of its last row."""
    return {row.case: row.status for row in rows}


def metrics(rows: list[Row], case: str) -> dict[str, float | None]:
    return {row.metric: row.value for row in rows if row.case == case and row.status == "ok"}


# -- Recipes -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_had_is_made_up_and_said() -> None:
    recipe = Recipe(rewards={"hpsv2": Reward(), "shapes_judge": Reward(log_only=True)})
    measured, notes = as_measured(recipe)
    check(measured)
    assert measured.model.name_or_path == "random:flux-dev"
    assert list(measured.rewards) == ["shapes_judge", "made_up"]
    assert notes == ["random weights", "prompts of the shapes world", "without the reward hpsv2", "a made-up reward"]
    assert as_measured(measured) == (measured, [])


def test_scorers_get_random_weights_and_no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ngrpo_train.rewards.weights.hf_hub_download", lambda *_, **__: pytest.fail("a download"))
    rewards = {
        "hpsv2_1": Reward(path=train_scorers.TINY, dtype="bfloat16"),
        "image_reward": Reward(path=train_scorers.TINY),
        "pickscore": Reward(remote="http://127.0.0.1:9"),  # nobody answers
        "aesthetic": Reward(processor="somebody/another-clip"),
        "clip": Reward(path="benchmarks.train_recipes:score"),
    }
    recipe, notes = as_measured(replace(full_size(), rewards=rewards))
    assert notes == [
        "random weights of the scorers hpsv2_1, image_reward",
        "without the reward pickscore",
        "without the reward aesthetic",
    ]
    kept = ("hpsv2_1", "image_reward", "clip")
    assert recipe.rewards == {name: rewards[name] for name in kept}
    images, prompts = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8), ["a red circle"] * 4
    for name in kept:
        scores = find_scorer(name, recipe.rewards[name], CPU)(images, prompts)
        assert scores.sort().values.diff().min() > 0.01, "no group may be flat"


def test_one_by_one_is_the_same_score() -> None:
    """On pictures that need no resizing, which PIL does differently."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    prompts = ["a red circle", "a large circle", "a red circle"]
    for name, side in (("hpsv2_1", 28), ("pickscore", 28), ("image_reward", 32)):
        scorer = train_scorers.random_scorer(name, Reward(path=train_scorers.TINY), CPU)
        for weight in scorer.parameters():
            if weight.ndim > 1:  # small ones make all scores alike
                weight.mul_(5)
        images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=generator)
        together = scorer(images, prompts)
        tolerance = 1e-3 * together.std().item()
        for others in (scorer(images.flip(0), prompts), scorer(images, [prompts[1], prompts[0], prompts[1]])):
            assert (others - together).abs().max() > 100 * tolerance
        alone = train_scorers.one_by_one(scorer, images, prompts)
        torch.testing.assert_close(alone, together, rtol=0, atol=tolerance)


def test_depth_is_of_random_weights_only() -> None:
    recipe, _ = as_measured(full_size(), "2,3")
    architecture = find_architecture(recipe.model.name_or_path)
    assert architecture.transformer == {**KNOWN["flux-dev"].transformer, "num_layers": 2, "num_single_layers": 3}
    assert find_architecture(with_depth("random:flux-dev", 2, 3)) is architecture
    with pytest.raises(ValueError, match="has its own number of blocks"):
        as_measured(replace(recipe, model=Model(name_or_path="shapes")), "2,3")
    with pytest.raises(ValueError, match="DOUBLE,SINGLE"):
        as_measured(full_size(), "2")


def test_the_made_up_reward_is_never_flat() -> None:
    alike = torch.full((12, 3, 8, 8), 128, dtype=torch.uint8)
    rewards = score(alike, [""] * 12)
    assert rewards.sort().values.diff().min() > 0.01
    brighter = alike.clone()
    brighter[3] = 255
    assert (score(brighter, [""] * 12) - rewards).nonzero().tolist() == [[3]]


@pytest.mark.parametrize("name", ["full", "tiny", "MixGRPO-Flash*"])
def test_settings_repeat_a_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)  # it is among the settings, and no flag
    recipes = {"full": full_size(), "tiny": tiny(on_gpu=False)}
    recipe = recipes.get(name) or table_3(full_size())[name][1]

    @dataclasses.dataclass
    class Command:
        recipe: RecipeFlags = dataclasses.field(default_factory=Recipe)

    again = parse(Command, {}, settings_of(recipe).split(), prog="").recipe
    assert replace(again, rewards=recipe.rewards) == recipe


# -- A session ---------------------------------------------------------------------------------------------------------


def test_a_bad_case_takes_no_other_along(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    held: list[weakref.ref[Tensor]] = []

    def out_of_memory(case: Case) -> None:
        tensor = torch.ones(4)
        held.append(weakref.ref(tensor))
        case.add("before", "s", 1.0)
        torch.empty(1 << 60)

    def broken(case: Case) -> None:
        raise KeyError("a bug")

    def skipped(case: Case) -> None:
        raise Skip("not here")

    gc.disable()
    try:  # the next case finds what this one held free, without any help
        ended = [
            session.case("part", name, measure)
            for name, measure in [
                ("large", out_of_memory),
                ("after", lambda case: case.add("freed", "count", held[0]() is None)),
                ("broken", broken),
                ("skipped", skipped),
                ("last", lambda case: case.add("time", "s", 3.0, 1.0, 2.0)),
            ]
        ]
    finally:
        gc.enable()
    assert ended == [False, True, False, False, True]
    assert session.failed
    assert session.out is not None
    rows = train_rows.read(session.out)
    assert statuses(rows) == {
        "large": "out of memory",
        "after": "ok",
        "broken": "failed",
        "skipped": "skipped",
        "last": "ok",
    }
    assert metrics(rows, "large") == {"before": 1}
    assert metrics(rows, "after") == {"freed": 1}
    assert [row.note for row in rows if row.case in ("broken", "skipped")] == ["KeyError: 'a bug'", "not here"]
    (last,) = [row for row in rows if row.case == "last"]
    assert (last.value, last.low, last.high, last.samples) == (2, 1, 3, 3)
    assert last.torch == torch.__version__
    assert "KeyError" in capsys.readouterr().err


def test_of_a_case_measured_again_the_latest_rows_count(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.out is not None

    def measured(begun: str, *names: str) -> None:
        case = Case(session, "part", "case", begun=begun)
        for name in names:
            case.add(name, "s", 1.0)

    measured("2026-11-21T10:00:00+00:00", "old", "both")
    measured("2026-11-21T11:00:00+00:00", "both", "new")
    assert [row.metric for row in train_rows.read(session.out)] == ["both", "new"]
    assert train_rows.read(session.out.with_name("none.csv")) == []
    session.out.write_text("op,provider\n")
    with pytest.raises(ValueError, match="other columns"):
        measured("2026-11-21T12:00:00+00:00", "new")


def test_only_what_is_asked_for_is_measured(session: Session) -> None:
    session.only = ("batch 4",)
    for name, always in (("batch 1", False), ("batch 4", False), ("building", True)):
        session.case("part", name, lambda case: case.add("time", "s", 1.0), always=always)
    assert list(statuses(session.rows)) == ["batch 4", "building"]


# -- An iteration ------------------------------------------------------------------------------------------------------


def test_train_step_measures_what_training_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    flags = ["--prompts.per-rank", "1", "--sampling.num-inference-steps", "4", "--algorithm.num-train-steps", "2"]
    assert train_step.main(["shapes_cpu", *flags, "--iterations", "2", "--runs", "2", "--out", str(path)]) == 0
    rows = train_rows.read(path)
    found = {row.metric: row for row in rows}
    assert {row.part for row in rows} == {"step"}
    assert [found[name].samples for name in ("iteration", "rollout", "decode", "reward", "update")] == [4] * 5
    # Of minima this holds under any load; medians may be of different iterations.
    stages = sum(found[name].low or 0 for name in ("rollout", "decode", "reward", "update"))
    assert 0 < stages <= (found["iteration"].low or 0)
    assert (found["grad_norm"].value or 0) > 0
    assert found["skipped_steps"].value == found["graphs_later"].value == 0
    assert found["runs_ratio"].samples == 1
    assert len(found) == len(rows), "of the rows that an iteration adds, the last ones count"
    assert "--sampling.num-inference-steps=4" in found["iteration"].settings
    assert "iteration 4" in capsys.readouterr().out


def test_train_step_takes_scorers_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    flags = ["--prompts.per-rank", "1", "--sampling.num-inference-steps", "4", "--algorithm.num-train-steps", "2"]
    rewards = ["--rewards", "pickscore", "--rewards.pickscore.path", train_scorers.TINY]
    assert train_step.main(["shapes_cpu", *flags, *rewards, "--iterations", "1", "--out", str(path)]) == 0
    found = {row.metric: row for row in train_rows.read(path)}
    assert found["iteration"].note == "random weights of the scorers pickscore"
    assert 0 < (found["reward"].value or 0) < (found["iteration"].value or 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "no recipe 'nothing'"),
        (["shapes_cpu", "--depth", "1,1"], "has its own number of blocks"),
    ],
)
def test_train_step_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "replaced, by, reason",
    [
        ("benchmarks.train_recipes.score", lambda images, prompts: torch.zeros(len(images)), "nothing was updated"),
        (
            "ngrpo_train.update.policy.guarded_step",
            lambda *_: (torch.zeros(()), torch.ones(())),
            "gradient was not finite",
        ),
    ],
)
def test_an_iteration_that_updates_nothing_is_no_result(
    session: Session, monkeypatch: pytest.MonkeyPatch, replaced: str, by: Any, reason: str
) -> None:
    monkeypatch.setattr(replaced, by)
    recipe = tiny(on_gpu=False)
    assert not session.case("part", "case", lambda case: train_step.measure(case, recipe, iterations=1, warmup=0))
    assert session.rows[-1].status == "failed"
    assert reason in session.rows[-1].note


# -- The parts ---------------------------------------------------------------------------------------------------------

MEASURED = {
    "forward": {"eager, batch 1", "eager, batch 2", "eager, batch 4", "eager, with gradient, batch 2"},
    "activations": {"full, eager", "selective, eager", "none, eager"},
    "optimizer": {"adamw_8bit, bfloat16 weights", "adamw, float32 weights, a third of the blocks"},
    "rewards": {
        f"{name}, {way}, {count} pictures"
        for name in train_scorers.PAPER
        for way in ("float32, all at once", "bfloat16, all at once", "one by one, as its package does")
        for count in (4, 16)
    },
    "decode": {"4 at once, eager, channels last", "1 at once, eager, channels first"},
    "iteration": {"full, 1 update", "full, 2 updates"},
    "algorithms": {
        *("DanceGRPO", "MixGRPO", "MixGRPO-Flash*", "BranchGRPO"),
        *("Neighbor, 25 steps", "Neighbor, 16 steps", "Neighbor, 8 steps"),
    },
    "variants": {"LoRA, rank 4", *train_parts.WAYS},
    "sharded": {"plain", "FSDP2, gathered: rollout", "FSDP2, float32 weights"},
    "peer": {"float32 weights under autocast", "bfloat16 weights"},
    "attention": set(),
    "profile": set(),
}


@pytest.mark.parametrize("part", train_parts.PARTS)
def test_every_part_is_rehearsed(part: str, session: Session) -> None:
    train_parts.PARTS[part](session, tiny(on_gpu=False))
    found = statuses(session.rows)
    assert {case for case, status in found.items() if status == "ok"} >= MEASURED[part]
    for row in session.rows:
        assert row.status in ("ok", "skipped"), row
        assert row.status == "ok" or "a CPU" in row.note or "on cpu" in row.note, row
        assert row.value is None or row.value >= 0, row
        assert row.unit != "relative" or (row.value or 0) < 1e-5, row  # velocities, however they are computed
    if part == "profile":
        assert session.out is not None
        found = json.loads((session.out.parent / "train_profile" / "profile.json").read_text())
        assert found["seconds"]["update"] > 0


def test_without_a_gpu_only_a_rehearsal_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_parts.main(train_parts.Parts(part="forward")) == 2


# -- The peers' way ----------------------------------------------------------------------------------------------------


class Keep(torch.optim.SGD):
    """Keeps the gradients that it is given, and moves nothing."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__(parameters.values(), lr=0.0, fused=True)
        self.names, self.seen = list(parameters), {}

    def step(self, closure: Any = None) -> Any:
        self.seen = {n: p.grad.clone() for n, p in zip(self.names, self.param_groups[0]["params"], strict=True)}
        return super().step(closure)


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    one, other = (torch.cat([each[name].double().flatten() for name in expected]) for each in (found, expected))
    return ((one - other).norm() / other.norm()).item()


def test_the_peer_computes_the_same_gradient(tmp_path: Path) -> None:
    """From the same weights, prompt, noise, steps and anchors, through its own rollout, pictures and loss."""
    recipe = tiny(on_gpu=False)
    prompt = "a large red circle on a blue background"
    cursor = PromptCursor.of(recipe, [Prompt(prompt)], 0, 1)
    trainer = Trainer.make(recipe, settle_memory(recipe, CPU), cursor, Rewards(recipe.rewards), CPU, Stopwatch(CPU))
    flux, keep = trainer.model, Keep(trainer.model.trainable)
    groups = trainer.algorithm.explore(flux, [Prompt(prompt, 0)], 0)
    scores = trainer.rewards(flux.decode(groups.final_PGS.flatten(0, 1)), [Prompt(prompt, 0)])
    advantages_PG = trainer.algorithm.advantages(scores, 0)
    policy = LeapingPolicy(recipe.algorithm)
    update(flux, keep, groups, advantages_PG, policy, recipe.algorithm, max_grad_norm=float("inf"))

    architecture = find_architecture(recipe.model.name_or_path)
    peer = train_parts.make_peer(
        recipe, architecture, CPU, torch.float32, tmp_path, Stopwatch(CPU), with_optimizer=False
    )
    peer = replace(peer, conditioning=flux.encode([prompt]), vae=flux.adapter.pipeline.vae, autocast=False)
    draws = next(train_parts._draws(recipe, architecture, CPU))
    assert (peer.iterate(draws, max_grad_norm=float("inf"))) > 0
    theirs = {name: p.grad for name, p in peer.transformer.named_parameters()}
    assert theirs.keys() == keep.seen.keys()
    assert relative_error(theirs, keep.seen) < 1e-4

    others = replace(draws, anchor_B=(draws.anchor_B + 1) % recipe.algorithm.num_generations)
    peer.iterate(others, max_grad_norm=float("inf"))
    assert relative_error({name: p.grad for name, p in peer.transformer.named_parameters()}, keep.seen) > 0.1


# -- The page ----------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_committed_rows(tmp_path: Path) -> None:
    page = tmp_path / "training-cost.md"
    page.write_text(train_table.DOCS.read_text())
    train_table.main(train_table.Table(markdown=page))
    assert page.read_text() == train_table.DOCS.read_text(), "run python -m benchmarks.train_table"
    assert ("45.08" in page.read_text()) == ("another run" in page.read_text())


def test_tables_have_the_medians(session: Session, tmp_path: Path) -> None:
    def measure(case: Case, seconds: float) -> None:
        case.add("prompt", "s", seconds, seconds + 1, seconds + 2)
        case.add("mfu", "share", 0.55)

    session.case("iteration", "full, 1 update", lambda case: measure(case, 8.0))
    session.case("peer", "float32 weights under autocast", lambda case: measure(case, 35.0))
    session.case("iteration", "full, 4 updates", lambda case: torch.empty(1 << 60))
    session.case("forward", "velocities apart: eager", lambda case: case.add("a / b", "relative", 0.00123))
    assert session.out is not None
    rows = train_rows.read(session.out)
    lines = list(train_table.iterations(rows))
    header = next(line for line in lines if line.startswith("|  |")).split(" | ")
    cells = next(line for line in lines if line.startswith("| full, 1 update")).split(" | ")
    assert (cells[header.index("s per prompt")], cells[header.index("MFU")]) == ("9.00", "55%")
    assert cells[-1] == "4.0 |"
    assert any(line.startswith("- full, 4 updates: out of memory") for line in lines)
    assert "| a / b | 1.2e-03 |" in list(train_table.velocities(rows))
    assert list(train_table.of_part(rows, "decode")) == [train_table.NOT_YET]


def test_table_3_has_counts_and_what_was_measured(session: Session) -> None:
    session.case("algorithms", "DanceGRPO", lambda case: case.add("prompt", "s", 66.0))
    session.case("algorithms", "BranchGRPO", lambda case: torch.empty(1 << 60))
    cells = {}
    for line in (lines := list(train_table.algorithms(session.rows))):
        name, *values = [cell.strip() for cell in line.strip("|").split("|")]
        cells[name] = values
    assert cells["DanceGRPO"][:5] == ["12", "12", "14", "25.00", "14.00"]
    assert (cells["DanceGRPO"][7], cells["DanceGRPO"][-1]) == ("66.00", "237.86")
    assert cells["BranchGRPO"][3:5] == ["12.69", "12.62"]
    assert cells["BranchGRPO"][7] == ""
    assert cells["MixGRPO-Flash*"][:5] == ["12", "12", "4", "8.00", "4.00"]
    assert cells["Neighbor, 8 steps"][2:5] == ["4", "8.00", "1.33"]
    assert any(line.startswith("- BranchGRPO: out of memory") for line in lines)


# -- The script --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_gpu_script_runs_every_part(tmp_path: Path, fails: bool) -> None:
    python = tmp_path / "python"
    # Stands in for a Python that has a GPU, and for the commands it is given.
    python.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "ran $PYTORCH_ALLOC_CONF $*"\n'
        f'case "$*" in *updates*) exit {int(fails)};; esac\n'
    )
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    for part in [*train_parts.PARTS, "baselines", "stream"]:
        if part == "attention":  # is measured with the forwards
            continue
        out = tmp_path / part
        command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), f"train-{part}", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == int(fails and part == "iteration"), done.stdout + done.stderr
        log = "".join(path.read_text() for path in out.glob("train-*.log"))
        assert "ran expandable_segments:True -m " in log
        if part in train_parts.PARTS:
            assert f"-m benchmarks.train_parts {part} " in log
        assert f"--out {out}/train_gpu.csv" in log
        assert len(list(out.iterdir())) <= 8
    assert "train_parts attention" in (tmp_path / "forward" / "train-attention.log").read_text()
