"""The CSV of an experiment, what is made of it, and what the tuning takes from it: by hand-worked rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from ngrpo_train.experiments.figures import curves, draw_figures, final, gradient_by_step, over_time
from ngrpo_train.experiments.grid import CONTROL, Grid, Variant
from ngrpo_train.experiments.results import BASE_MODEL, Row, is_column, read_rows, write_rows
from ngrpo_train.experiments.summary import Summary
from ngrpo_train.experiments.tuning import Best, best_trials, find_tuning

GRID = Grid(
    name="mine",
    title="Mine",
    question="Why?",
    claim="Because.",
    timed=True,
    columns=("G", "policy/clip_fraction"),
    figures=("curves", "final", "gradient_by_step", "update/grad_norm", "policy/clip_fraction"),
    paper_table="Table 9",
    variants=(
        Variant(name="a", paper={"CLIP": 0.366}),
        Variant(name="a" + CONTROL, is_control=True),
        Variant(name="b", paper={"B": "adapt"}),
        Variant(name="not made"),
    ),
)


def row(variant: str, seed: int | None, split: str, step: int, **values: float) -> Row:
    values = {name.replace("__", "/"): value for name, value in values.items()}
    return Row(
        experiment="mine",
        base="tiny",
        variant=variant,
        seed=seed,
        control=variant.endswith(CONTROL),
        split=split,
        step=step,
        run=f"{variant}{seed}",
        hardware="x86_64 CPU, 2 threads",
        torch="2.13.0",
        date="2026-01-01",
        values=values,
    )


def end(variant: str, seed: int, reward: float, other: float, s: float) -> Row:
    values = {"reward": reward, "out_of_domain": other, "s_per_iteration": s, "nfe_old": 8.0, "nfe_theta": 4 / 3}
    return row(variant, seed, "test", 4, **values, G=12.0, velocity_grad_norm__step_10=2.0 * seed + 1)


ROWS = [
    row(BASE_MODEL, None, "test", 0, reward=0.5, out_of_domain=0.25),
    row("a", 0, "validation", 0, reward=0.4, nfe_rollout=0, nfe_update=0, train_s=0),
    row("a", 0, "validation", 4, reward=0.5, nfe_rollout=90, nfe_update=10, train_s=2, update__grad_norm=3.0),
    end("a", 0, 0.75, 0.5, 2.0),
    end("a" + CONTROL, 0, 0.5, 0.25, 2.0),
    end("b", 0, 0.625, 0.5, 3.0),
    row("a", 1, "validation", 0, reward=0.4, nfe_rollout=0, nfe_update=0, train_s=0),
    row("a", 1, "validation", 4, reward=0.7, nfe_rollout=90, nfe_update=10, train_s=4, update__grad_norm=5.0),
    end("a", 1, 0.85, 0.6, 2.0),
    end("a" + CONTROL, 1, 0.7, 0.25, 2.0),
]


# --- the CSV


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    odd = replace(
        row('x, "y"', 3, "validation", 8, score__judge=0.5, reward=float("inf")),
        settings=json.dumps({"algorithm": {"name": "neighbor"}}),
        family="x",
        ngrpo="0.1",
    )
    path = tmp_path / "deep" / "mine.csv"
    write_rows(path, [*ROWS, odd])
    assert read_rows(path)[:1] + read_rows(path)[-1:] == [ROWS[0], odd]
    assert [each.control for each in read_rows(path)] == [CONTROL in each.variant for each in [*ROWS, odd]]
    assert [each.name for each in path.parent.iterdir()] == ["mine.csv"]


def test_the_csv_is_tidy(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    write_rows(path, [*ROWS, row("b", 1, "validation", 1, velocity_grad_norm__step_9=1.0, reward=2 / 3)])
    lines = path.read_text().splitlines()
    assert len(lines) == len(ROWS) + 2
    names = lines[0].split(",")
    assert names[:8] == ["experiment", "base", "variant", "family", "seed", "control", "split", "step"]
    assert names.index("velocity_grad_norm/step_9") < names.index("velocity_grad_norm/step_10")
    assert ",0.666667," in lines[-1]
    assert lines[-1].startswith("mine,tiny,b,,1,false,validation,1,0.666667,,")
    assert lines[1].startswith("mine,tiny,base model,,,false,test,0,0.5,,0.25,")


def test_another_csv_is_refused_and_none_is_empty(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.csv") == []
    (tmp_path / "other.csv").write_text("variant,seed\na,1\n")
    with pytest.raises(ValueError, match=r"other\.csv is no CSV of an experiment: it has no column 'experiment'"):
        read_rows(tmp_path / "other.csv")


def test_columns_by_name() -> None:
    assert all(map(is_column, ("reward", "G", "score/clip", "velocity_grad_norm/step_3", "update/grad_norm")))
    assert not is_column("rewards")


# --- the table


def test_the_table_has_these_numbers() -> None:
    summary = Summary.of(GRID, ROWS, {"x": Best("x 1", {}, 0.5, 6)})
    table = {cells[0]: dict(zip(summary.header, cells, strict=True)) for cells in summary.cells}
    assert list(table) == [BASE_MODEL, "a", "a" + CONTROL, "b"]
    assert table["a"] == {
        "variant": "a",
        "seeds": "2",
        "reward": "0.800 ± 0.071",  # 0.75, 0.85: 0.1 / sqrt(2)
        "reward, change": "+0.300",
        "out of domain": "0.550 ± 0.071",
        "out of domain, change": "+0.300",
        "against its control": "+0.200 ± 0.071",  # 0.25, 0.15
        "time, relative": "1.00",
        "NFE_old": "8",
        "NFE_theta": "1.333",
        "G": "12",
        "Table 9: CLIP": "0.366",
        "Table 9: B": "",
    }
    assert (table["b"]["reward"], table["b"]["seeds"], table["b"]["time, relative"]) == ("0.625", "1", "1.50")
    assert (table["b"]["against its control"], table["b"]["Table 9: B"]) == ("", "adapt")
    assert table["a" + CONTROL]["reward, change"] == "+0.100"
    base = {title: cell for title, cell in table[BASE_MODEL].items() if cell}
    assert base == {"variant": BASE_MODEL, "reward": "0.500", "out of domain": "0.250"}
    assert "best by validation reward of 6 trials for each: x: x 1" in summary.notes[2]
    assert summary.notes[3] == "4 iterations of tiny; x86_64 CPU, 2 threads, torch 2.13.0, 2026-01-01."


def test_single_scores_are_shown_with_their_spread_and_the_base_models() -> None:
    scored = [replace(each, values=each.values | {"score/clip": each.values["reward"] / 2}) for each in ROWS]
    summary = Summary.of(replace(GRID, columns=("score/clip",)), scored, {})
    shown = {cells[0]: cells[summary.header.index("clip")] for cells in summary.cells}
    assert (shown[BASE_MODEL], shown["a"], shown["b"]) == ("0.250", "0.400 ± 0.035", "0.312")


def test_seconds_as_they_are_only_from_a_gpu() -> None:
    on_gpu = [replace(each, hardware="NVIDIA H200") for each in ROWS]
    summary = Summary.of(GRID, on_gpu, {})
    assert [cells[summary.header.index("s / iteration")] for cells in summary.cells] == ["", "2.00", "2.00", "3.00"]
    assert "s / iteration" not in Summary.of(GRID, ROWS, {}).header
    untimed = replace(GRID, timed=False)
    assert Summary.of(untimed, on_gpu, {}).header == summary.header
    assert "time, relative" not in Summary.of(untimed, ROWS, {}).header
    assert [len(curves(untimed, rows).axes) for rows in (on_gpu, ROWS)] == [3, 2]


def test_a_loss_against_the_control_has_one_sign() -> None:
    swapped = [replace(each, variant={"a": "a" + CONTROL, "a" + CONTROL: "a"}.get(each.variant, "b")) for each in ROWS]
    summary = Summary.of(GRID, swapped, {})
    assert summary.cells[0][summary.header.index("against its control")] == "-0.200 ± 0.071"


def test_variants_are_compared_with_one_of_them() -> None:
    """Paired by seed, -0.25 and -0.15: a standard error of 0.05, times 12.706 for one degree of freedom."""
    summary = Summary.of(replace(GRID, against="a"), ROWS, {})
    compared = {cells[0]: cells[summary.header.index("against a")] for cells in summary.cells}
    assert compared == {BASE_MODEL: "", "a": "", "a" + CONTROL: "-0.200 (-0.835 to +0.435)", "b": "-0.125"}
    assert any(note.startswith("Differences from a are paired by seed") for note in summary.notes)


def test_the_page(tmp_path: Path) -> None:
    summary = Summary.of(GRID, ROWS, {})
    lines = summary.markdown(GRID, ["mine_final.png"]).splitlines()
    assert lines[:5] == ["# Mine", "", "Why?", "", "The paper: Because."]
    assert {line.count("|") for line in lines if line.startswith("|")} == {len(summary.header) + 1}
    assert "![mine_final.png](mine_final.png)" in lines


# --- figures


def test_curves_are_means_with_a_band_over_seeds() -> None:
    iterations, evaluations, time = curves(GRID, ROWS).axes
    assert time.get_xlabel() == "time, in iterations of a"  # 2 s each
    *_, seconds = curves(GRID, [replace(each, hardware="NVIDIA H200") for each in ROWS]).axes
    assert seconds.get_xlabel() == "seconds of training"
    for panel, x in ((iterations, [0, 4]), (evaluations, [0, 100]), (time, [0, 1.5]), (seconds, [0, 3])):
        (line,) = [line for line in panel.lines if line.get_label() == "a" and len(line.get_xdata())]
        np.testing.assert_allclose(line.get_xdata(), x)
        np.testing.assert_allclose(line.get_ydata(), [0.4, 0.6])
    band = iterations.collections[0].get_paths()[0].vertices
    low, high = 0.6 - 0.02**0.5, 0.6 + 0.02**0.5
    assert band[:, 1].min() == pytest.approx(min(0.4, low))
    assert band[:, 1].max() == pytest.approx(high)


def test_controls_are_dashed_in_their_variants_colour() -> None:
    a, control, b = gradient_by_step(GRID, ROWS).axes[0].lines
    assert [line.get_linestyle() for line in (a, control, b)] == ["-", "--", "-"]
    assert a.get_color() == control.get_color() != b.get_color()
    assert (a.get_xdata().tolist(), a.get_ydata().tolist()) == ([10], [2.0])  # of the seeds' 1 and 3


def test_what_is_compared_fills_the_panel_though_its_control_falls() -> None:
    made = {"nfe_rollout": 90, "nfe_update": 10, "train_s": 2}
    control = [row("a" + CONTROL, seed, "validation", 4, reward=-9.0 + seed, **made) for seed in (0, 1)]
    panel = curves(GRID, [*ROWS, *control]).axes[0]
    low, high = panel.get_ylim()
    assert 0.2 < low < 0.4 < 0.6 < high < 0.7  # the variant's means
    (line,) = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert list(line.get_ydata()) == [-8.5]
    bands = [path.vertices[:, 1].min() for each in panel.collections for path in each.get_paths()]
    assert min(bands) > 0


def test_a_column_over_time() -> None:
    lines = over_time(GRID, ROWS, "update/grad_norm").axes[0].lines
    assert [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in lines] == [
        ([4], [4.0]),
        ([], []),
        ([], []),
    ]


def test_final_scores_are_points_and_a_mean() -> None:
    reward, other = final(GRID, ROWS).axes
    assert [tick.get_text() for tick in reward.get_yticklabels()] == ["a", "a" + CONTROL, "b"]
    assert reward.collections[0].get_offsets().tolist() == [[0.75, 0], [0.85, 0]]
    assert reward.lines[0].get_xdata().tolist() == [pytest.approx(0.8)] * 2
    assert other.lines[-1].get_xdata() == [0.25, 0.25]
    assert reward.get_xlabel() == "reward (test)"


def test_figures_are_files_where_there_is_something_to_draw(tmp_path: Path) -> None:
    names = draw_figures(GRID, ROWS, tmp_path)
    assert names == ["mine_curves.png", "mine_final.png", "mine_gradient_by_step.png", "mine_update_grad_norm.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert matplotlib.image.imread(tmp_path / "mine_final.png").std() > 0.01


# --- tuning


def trials(tmp_path: Path, *changes: Row) -> Path:
    """Two families of two trials: of x the second is best at the end, of y the first by its mean over two seeds."""

    def trial(family: str, name: str, seed: int, *rewards: float) -> list[Row]:
        settings = json.dumps({"algorithm": {"name": name}})
        rows = [row(f"{family}, {name}", seed, "validation", 5 * i, reward=r) for i, r in enumerate(rewards)]
        rows.append(row(f"{family}, {name}", seed, "test", 10, reward=1.0))
        return [replace(each, family=family, settings=settings) for each in rows]

    rows = [replace(row("x, never validated", 7, "validation", 0, reward=9.0), family="x")]
    rows += trial("x", "one", 7, 0.1, 0.9, 0.4) + trial("x", "two", 7, 0.1, 0.2, 0.5)
    rows += trial("y", "one", 7, 0.1, 0.9) + trial("y", "two", 7, 0.1, 0.6)
    rows += trial("y", "one", 8, 0.1, 0.4) + trial("y", "two", 8, 0.1, 0.6)
    write_rows(tmp_path / "tuning.csv", [*rows, *changes])
    return tmp_path / "tuning.csv"


def test_the_best_trial_is_that_of_the_last_validation(tmp_path: Path) -> None:
    path = trials(tmp_path)
    assert best_trials(path, "tiny", ["x", "y"]) == {
        "x": Best("x, two", {"algorithm": {"name": "two"}}, 0.5, 2),
        "y": Best("y, one", {"algorithm": {"name": "one"}}, pytest.approx(0.65), 2),
    }
    summary = Summary.of(GRID, read_rows(path), {})
    found = {cells[0]: cells[summary.header.index("best of")] for cells in summary.cells}
    assert found == {"x, one": "", "x, two": "x", "y, one": "y", "y, two": ""}
    assert "best of" not in Summary.of(GRID, ROWS, {}).header


@pytest.mark.parametrize(
    "change, base, families, message",
    [
        ({}, "tiny", ["z"], "has no trial of the family 'z'"),
        ({}, "flux", ["x"], "made with the recipe tiny, not flux: run ngrpo experiment tuning --base flux"),
        ({"variant": "x, three", "seed": 7, "step": 10}, "tiny", ["x", "y"], "unequal numbers of trials.*x 3, y 2"),
        ({"variant": "x, three", "seed": 7}, "tiny", ["x"], "trials of x of unequal numbers of iterations"),
        ({"variant": "x, two", "seed": 9}, "tiny", ["x"], "trials of x with unequal seeds"),
    ],
)
def test_tuning_that_favours_one_is_refused(
    change: dict[str, Any], base: str, families: list[str], message: str, tmp_path: Path
) -> None:
    extra = [replace(row("", 0, "validation", 1, reward=0.0), family="x", **change)] if change else []
    with pytest.raises(ValueError, match=message):
        best_trials(trials(tmp_path, *extra), base, families)


def test_where_trials_are_looked_for(tmp_path: Path) -> None:
    out, mine = tmp_path / "experiments" / "convergence", tmp_path / "mine.csv"
    beside = tmp_path / "experiments" / "tuning" / "tuning.csv"
    with pytest.raises(ValueError, match=r"--tuning = '.*mine\.csv' is not a file"):
        find_tuning(str(mine), None, out)
    beside.parent.mkdir(parents=True)
    for path in (mine, beside):
        path.write_text("")
    assert find_tuning("", None, out) == beside
    assert find_tuning("", mine, out) == mine
    assert find_tuning(str(beside), mine, out) == beside
