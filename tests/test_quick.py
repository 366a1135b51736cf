"""A quarter of an hour on a GPU: the schedule of its parts, what a cut leaves behind, that every part can be run."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from benchmarks import quick, train_parts, train_rows, train_step, train_table
from benchmarks.schedule import READY, Part, run
from benchmarks.train_parts import Parts
from benchmarks.train_recipes import full_size, tiny, with_depth
from benchmarks.train_rows import Case, Session
from ngrpo_train.models.sizes import find_architecture, transformer_on
from ngrpo_train.run.trainer import Trainer

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


class Journal:
    """A directory in which parts made of shell scripts write what they do."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.out = directory, directory / "out"
        self.out.mkdir()

    def part(self, name: str, script: str = "", seconds: float = 20, **options: Any) -> Part:
        script = f"cd {self.directory}; note() {{ echo {name} $1 >>journal; }}; note begins; {script}\nnote ends"
        return Part(name=name, commands=[["sh", "-c", script]], seconds=seconds, **options)

    @property
    def lines(self) -> list[str]:
        return (self.directory / "journal").read_text().splitlines()

    @property
    def began(self) -> list[str]:
        return [line.partition(" ")[0] for line in self.lines if line.endswith("begins")]

    def statuses(self) -> list[list[str]]:
        return [line.split(",")[:2] for line in (self.out / "quick.csv").read_text().splitlines()[1:]]


def after(file: str) -> str:
    return f"until [ -s {file} ]; do sleep 0.05; done"


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


# -- The schedule ------------------------------------------------------------------------------------------------------


def test_what_times_is_alone_and_what_compiles_is_not(journal: Journal) -> None:
    target = f"{after('filler')}; echo {READY}; read line; kill -0 $(cat filler) && note crowded; note times"
    filler = "[ -e filler ] && exit 0; echo $$ >filler; exec sleep 60"
    parts = [
        journal.part("tests", after("journal"), times=False),
        journal.part("target", target, holds=True),
        journal.part("next"),
        journal.part("filler", filler, times=False),
    ]
    assert run(parts, journal.out, 60)
    assert sorted(journal.began[:2]) == ["target", "tests"]
    assert journal.began[2:] == ["filler", "next", "filler"]
    order = [
        journal.lines.index(line)
        for line in ("tests ends", "filler begins", "target times", "target ends", "next begins")
    ]
    assert order == sorted(order)
    assert "target crowded" not in journal.lines
    done = ["tests", "done"], ["filler", "gave way"], ["target", "done"], ["next", "done"], ["filler", "done"]
    assert journal.statuses() == [*done]
    assert f"    target | {READY}" in (journal.out / "quick.log").read_text().splitlines()


def test_a_failure_stops_no_other_and_comes_last_the_next_time(
    journal: Journal, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = [
        journal.part("bad", "echo what happened >&2; [ -e ok ] || exit 3", holds=True),
        journal.part("good", "touch ok"),
        journal.part("long", seconds=1000),
    ]
    assert not run(parts, journal.out, 30)
    assert journal.began == ["bad", "good"]
    assert journal.statuses() == [["bad", "failed"], ["good", "done"]]
    shown = capfd.readouterr().out
    assert "what happened" in shown
    assert "long: left out" in shown
    assert run([*parts[:2], replace(parts[2], seconds=1)], journal.out, 30)
    assert journal.began[2:] == ["long", "bad"]
    assert run(parts, journal.out, 30)
    assert len(journal.began) == 4
    assert "nothing is left out" in capfd.readouterr().out


def test_parts_are_stopped_by_their_time_and_the_calls(journal: Journal) -> None:
    parts = [
        journal.part("slow", "[ -e ok ] || sleep 60 & wait", seconds=0.2),
        journal.part("cut", "[ -e ok ] || sleep 60", seconds=2),
    ]
    begun = time.monotonic()
    assert not run(parts, journal.out, 3.5)
    assert time.monotonic() - begun < 20
    assert journal.statuses() == [["slow", "out of time"], ["cut", "cut"]]
    (journal.directory / "ok").touch()
    assert run(parts, journal.out, 30)
    assert journal.began[2:] == ["cut", "slow"]


def test_a_call_that_is_killed_is_resumed(journal: Journal) -> None:
    """As by a machine that is taken away."""
    parts = [
        journal.part("one"),
        journal.part("two", "[ -e pid ] && exit 0; echo $$ >pid; exec sleep 60"),
        journal.part("three", "touch rows", done=(journal.directory / "rows").exists),
    ]
    program = "import json, sys; from pathlib import Path; from benchmarks.schedule import Part, run\n"
    program += "run([Part(**each) for each in json.loads(sys.argv[1])], Path(sys.argv[2]), 60)"
    asked = json.dumps([{"name": each.name, "commands": each.commands, "seconds": each.seconds} for each in parts])
    with subprocess.Popen([sys.executable, "-c", program, asked, journal.out], cwd=ROOT) as call:
        pid = journal.directory / "pid"
        while not (pid.exists() and pid.read_text()):
            assert call.poll() is None
            time.sleep(0.02)
        call.kill()
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert journal.statuses() == [["one", "done"]]
    assert run(parts, journal.out, 60)
    assert journal.began == ["one", "two", "two", "three"]
    (journal.out / "quick.csv").unlink()
    assert run(parts, journal.out, 60)
    assert journal.began[4:] == ["one", "two"], "the rows of three are there"


# -- The parts ---------------------------------------------------------------------------------------------------------


class Names(Session):
    """Measures nothing, and keeps the names of its cases."""

    def case(self, part: str, name: str, *_: Any, **__: Any) -> bool:
        if any(wanted in name for wanted in self.only):
            NAMES.append(name)
        return False


NAMES: list[str] = []


def cases_of(parts: Parts) -> list[str]:
    NAMES.clear()
    train_parts.PARTS[parts.part](Names(CPU, only=parts.only or ("",), compiles=True), full_size())
    return [*NAMES]


@pytest.mark.parametrize("small", [False, True])
def test_every_part_can_be_run(tmp_path: Path, small: bool) -> None:
    parts = quick.parts(tmp_path, tiny=small)
    assert len({part.name for part in parts}) == len(parts)
    assert [part.name for part in parts if part.holds] == ["target"]
    for part in parts:
        for python, _, module, *arguments in part.commands:
            assert python == sys.executable
            if module == "pytest":
                assert (ROOT / arguments[0]).exists()
                continue
            asked = tyro.cli(Parts, args=arguments)
            assert asked.tiny == (small or part.name == "smoke")
            assert asked.hold == part.holds
            assert asked.out == (None if part.name == "smoke" else tmp_path / "train_gpu.csv"), "rows of a tiny model"
            assert part.name == "smoke" or cases_of(asked)


def measure(*arguments: str) -> int:
    return train_parts.main(tyro.cli(Parts, args=["iteration", "--only", "1 update", "--brief", "--tiny", *arguments]))


def test_an_iteration_has_its_rows_as_soon_as_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, count = Trainer.iterate, itertools.count()

    def cut(trainer: Trainer) -> Any:
        if next(count) == 3:  # one compiles, one warms up, and one has been timed
            raise KeyboardInterrupt
        return whole(trainer)

    path = tmp_path / "train_gpu.csv"
    monkeypatch.setattr(Trainer, "iterate", cut)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(KeyboardInterrupt):
        measure("--hold", "--out", str(path))
    rows = train_rows.read(path)
    assert {row.metric: row.samples for row in rows}.items() >= {"prompt": 1, "update": 1, "grad_norm": 1}.items()
    shown = capsys.readouterr().out
    assert 0 < shown.index("compiling ") < shown.index(READY) < shown.index("first_iteration ")
    assert quick.has_iteration(path, "iteration", "full, 1 update")
    assert not quick.has_iteration(path, "variants", "full, 1 update")
    assert not quick.has_iteration(path, "iteration", "LoRA")
    with pytest.raises(SystemExit, match="input has ended"):
        measure("--hold")


def test_an_iteration_through_few_blocks_compiles_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    recipe = tiny(on_gpu=False)
    model = replace(recipe.model, name_or_path=with_depth(recipe.model.name_or_path, 3, 3))
    recipe = replace(recipe, model=model, parallel=replace(recipe.parallel, compile="on"))
    session = Session(CPU, brief=True)
    assert session.case("part", "case", lambda case: train_step.measure(case, recipe, iterations=1, warmup=1))
    found = {row.metric: row for row in session.rows}
    # Three for each kind of forward: of all candidates, of anchors with gradients, and of the others beside these.
    assert found["compiling"].note.startswith("9 graphs")
    assert found["graphs_first"].value == found["graphs_later"].value == 0
    assert found["trained_parameters"].value == sum(
        weight.numel() for weight in transformer_on(find_architecture(model.name_or_path)).parameters()
    )


def test_its_rows_fill_the_page(tmp_path: Path) -> None:
    rows = Session(CPU, tmp_path / "train_gpu.csv")

    def made_up(case: Case) -> None:
        case.add("iteration", "s", 30.0, note="decoder not compiled")
        case.add("compiling", "s", 123.0)
        case.add("prompt", "s", 30.0 if case.part == "peer" else 10.0)
        case.add("layer", "ms", 7.0)

    parts = quick.parts(tmp_path)
    commands = [command[3:] for part in parts for command in part.commands if "train_parts" in command[2]]
    asked = [tyro.cli(Parts, args=command) for command in commands if "--out" in command]
    names = [(each.part, name) for each in asked for name in cases_of(each)]
    for part, name in names:
        rows.case(part, name, made_up)
    assert rows.out is not None
    found = train_rows.read(rows.out)
    lines = [*train_table.iterations(found), *train_table.of_part(found, "attention")]
    cells = {cells[1].strip(): cells for cells in (line.split("|") for line in lines if "|" in line)}
    for part, name in names:
        if part == "attention":
            assert "7.00" in cells[name][2]
        elif part != "profile":
            shown = cells[f"as a peer: {name}" if part == "peer" else name]
            assert shown[2].strip() == ("30.00" if part == "peer" else "10.00")
            assert "123" in shown[-4]
            assert shown[-2].strip() == ("1.0" if part == "peer" else "3.0")
