"""`ngrpo experiment`: the runs of a grid side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ngrpo_train.experiments.grid import Grid, Variant, find_grid, packaged
from ngrpo_train.experiments.results import Row, read_rows
from ngrpo_train.experiments.tuning import Best, best_trials, find_tuning
from ngrpo_train.parallel.launch import rank_at_launch, world_size_at_launch
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.parsing import RecipeFlags, as_flags, find_recipe, flag_value, overlay, parse, read_recipe
from ngrpo_train.recipe.sections import Recipe

if TYPE_CHECKING:
    from ngrpo_train.experiments.runs import Experiment


@dataclass(frozen=True, kw_only=True)
class ExperimentCommand:
    """Make the runs of a grid one after the other, test each, and compare them in a table and figures.

    NAME is a packaged grid or a TOML file; without it, the packaged grids are listed.

    Finished runs are kept: the command goes on where it stopped, and can be given more seeds or variants.

    A recipe's flags apply to every run; the defaults shown are the base recipe's.
    """

    recipe: RecipeFlags = field(default_factory=Recipe)
    base: Annotated[str, tyro.conf.arg(metavar="RECIPE", help_behavior_hint="")] = ""
    """The recipe that all runs start from; its rewards and sampler judge them. Empty takes the grid's."""
    out: Annotated[str, tyro.conf.arg(metavar="DIRECTORY", help_behavior_hint="")] = ""
    """Directory for runs, CSV, table and figures; empty means "experiments/NAME"."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]", help_behavior_hint="")] = ()
    """Seeds of each variant's runs; empty takes the grid's."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="VARIANT [VARIANT ...]", help_behavior_hint="")] = ()
    """Variants to make, with their controls; empty makes all."""
    steps: int = 0
    """Iterations of every run; 0 takes the grid's."""
    reuse: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CSV [CSV ...]", help_behavior_hint="")] = ()
    """CSVs of other experiments, whose equal runs are reused; refused for grids that show times."""
    tuning: Annotated[str, tyro.conf.arg(metavar="CSV|none", help_behavior_hint="")] = ""
    """CSV of the settings for tuned variants, or "none" for the published settings; empty takes the CSV of the
    experiment `tuning` beside --out, or the one in the source tree."""
    table_only: bool = False
    """Make no runs: write table and figures from the existing CSV."""


def main(arguments: Sequence[str]) -> int:
    """Run `[NAME] [FLAGS]`; returns the exit code. Exits with code 2 on a wrong flag.

    Raises ValueError, before any run, for a grid, recipe, variant, CSV or setting that cannot be used.
    """
    if not arguments:
        print(_listing())
        return 0
    if arguments[0].startswith("-"):
        parse(ExperimentCommand, {}, arguments, prog="ngrpo experiment [NAME]", name="")
        raise ValueError(f"the first argument must name an experiment: {', '.join(packaged())}, or a TOML file")
    asked = _Asked.of(find_grid(arguments[0]), arguments[1:])
    best = asked.best()
    if not asked.command.table_only:
        code = asked.experiment(best).make()
        if code:
            return code
    if rank_at_launch() == 0:
        _report(asked.grid, read_rows(asked.out / f"{asked.grid.name}.csv"), best, asked.out)
    return 0


def _listing() -> str:
    grids = {name: find_grid(name) for name in packaged()}
    width = max(map(len, grids)) + 2
    lines = [f"  {name:{width}}{grid.title} ({len(grid.variants)} variants)" for name, grid in grids.items()]
    return "\n".join(["experiments, by NAME for ngrpo experiment NAME:", *lines])


@dataclass(frozen=True, slots=True)
class _Asked:
    """The request of a command line: grid, base recipe, variants and flags."""

    grid: Grid
    base: str
    below: Mapping[str, Any]  # the base recipe, as TOML has it
    flags: Sequence[str]
    command: ExperimentCommand  # with the flags on top of the base recipe
    out: Path
    variants: tuple[Variant, ...]

    @staticmethod
    def of(grid: Grid, flags: Sequence[str]) -> _Asked:
        base = flag_value(flags, "--base") or grid.base
        if grid.only_own_base and base != grid.base:
            raise ValueError(f"--base = {base!r}: {grid.name} is about rewards of {grid.base} and runs only on that")
        if grid.timed and any(flag.partition("=")[0] == "--reuse" for flag in flags):
            raise ValueError(f"--reuse: {grid.name} shows times, and those of other runs were measured separately")
        below = read_recipe(find_recipe(base))
        command = _parsed(below, flags, base)
        out = Path(command.out or Path("experiments") / grid.name).expanduser()
        return _Asked(grid, base, below, flags, command, out, grid.chosen(command.only))

    def best(self) -> Mapping[str, Best]:
        """The best trial of each family that variants take settings from; {} for a table alone without such a CSV."""
        families = list(dict.fromkeys(variant.tuned for variant in self.variants if variant.tuned))
        if not families:
            return {}
        if self.command.tuning == "none":
            return {}
        path = find_tuning(self.command.tuning, self.grid.tuning, self.out)
        if path:
            return best_trials(path, self.base, families)
        if self.command.table_only:
            return {}
        raise ValueError(
            f"{self.grid.name} takes settings from the experiment tuning: run ngrpo experiment tuning --base "
            f"{self.base} first, name its CSV with --tuning, or take published settings with --tuning none"
        )

    def experiment(self, best: Mapping[str, Best]) -> Experiment:
        """The experiment, with all its recipes parsed and checked."""
        from ngrpo_train.experiments.runs import Experiment, Run, Yardstick, identity  # torch is not needed before

        grid, command = self.grid, self.command
        self._refuse_flags_that_variants_set(best)
        if grid.test and not command.recipe.evaluation.test:
            raise ValueError(
                f"{grid.name} reports scores of test prompts, and {self.base} names none: give --evaluation.test"
            )
        common = _as_run(_parsed(self._common(), self.flags, grid.name), command.steps)
        yardstick = Yardstick(command.recipe, grid.test)
        by_seed: dict[int, list[Run]] = {seed: [] for seed in command.seeds or grid.seeds}
        for variant in self.variants:
            name = f"{grid.name}, {variant.name}"
            settings = self._settings(variant, best, name)
            resolved = _as_run(_parsed(overlay(self._common(), settings), self.flags, name), command.steps)
            for seed, runs in by_seed.items():
                seeded = replace(resolved, train=replace(resolved.train, seed=seed))
                try:
                    check(seeded, world_size_at_launch())
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
                runs.append(Run(variant, json.dumps(settings), seeded))
        return Experiment(
            name=grid.name,
            base=self.base,
            yardstick=yardstick,
            common=identity(common, yardstick),
            runs=tuple(run for runs in by_seed.values() for run in runs),  # all variants of a seed before the next seed
            out=self.out,
            reuse=[row for path in command.reuse for row in _read_existing(Path(path), f"--reuse = {path!r}")],
        )

    def _refuse_flags_that_variants_set(self, best: Mapping[str, Best]) -> None:
        """Raise ValueError for a flag that sets a field in which the runs differ."""
        names = (re.match(r"--(\w[\w-]*\.[\w.-]+)", flag) for flag in self.flags)
        given = {match[1].replace("-", "_") for match in names if match}
        for variant in self.variants:
            tuned = best[variant.tuned].settings if variant.tuned in best else {}
            settings = variant.settings(tuned, on_own_base=self._on_own_base)
            varied = {"algorithm.name", *variant.times, *(flag[2:].partition("=")[0] for flag in as_flags(settings))}
            for field_name in sorted(given & varied):
                raise ValueError(f"--{field_name}: runs of {self.grid.name} differ in it, as {variant.name!r} says")

    def _common(self) -> Mapping[str, Any]:
        """The sections of a recipe that all variants share."""
        common = overlay(self.below, self.grid.recipe)
        return overlay(common, self.grid.own_base) if self._on_own_base else common

    @property
    def _on_own_base(self) -> bool:
        return self.base == self.grid.base

    def _settings(self, variant: Variant, best: Mapping[str, Best], name: str) -> dict[str, Any]:
        """A variant's sections of a recipe, with its factors multiplied out."""
        tuned = best[variant.tuned].settings if variant.tuned in best else {}
        settings = variant.settings(tuned, on_own_base=self._on_own_base)
        without = _parsed(overlay(self._common(), settings), (), name).recipe
        for path, factor in variant.times.items():
            section, _, entry = path.partition(".")
            value = getattr(getattr(without, section, None), entry, None)
            if not isinstance(value, int | float) or not isinstance(factor, int | float):
                raise ValueError(f"{name}: times.{path} = {factor!r} must be a number, for a field that is one")
            product = value * factor
            settings = overlay(settings, {section: {entry: round(product) if isinstance(value, int) else product}})
        return settings


def _parsed(recipe: Mapping[str, Any], flags: Sequence[str], name: str) -> ExperimentCommand:
    return parse(ExperimentCommand, recipe, flags, prog="ngrpo experiment NAME", name=name, quiet=rank_at_launch() != 0)


def _as_run(command: ExperimentCommand, steps: int) -> Recipe:
    """A recipe without the outputs that only a single run has: trackers, pictures, a table, an export."""
    recipe = command.recipe
    return replace(
        recipe,
        train=replace(recipe.train, steps=steps or recipe.train.steps),
        evaluation=replace(recipe.evaluation, test=""),
        log=replace(recipe.log, trackers=(), export=False, images_every=1_000_000, num_images=1),
    )


def _report(grid: Grid, rows: Sequence[Row], best: Mapping[str, Best], out: Path) -> None:
    """Write and print the table, and draw the figures. Raises ValueError where no run has finished."""
    from rich.console import Console

    from ngrpo_train.experiments.figures import draw_figures
    from ngrpo_train.experiments.summary import Summary

    if not any(row.seed is not None for row in rows):
        raise ValueError(f"--out = {str(out)!r} has no {grid.name}.csv with a finished run in it")
    summary = Summary.of(grid, rows, best)
    pictures = draw_figures(grid, rows, out)
    page = out / f"{grid.name}.md"
    page.write_text(summary.markdown(grid, pictures), encoding="utf-8")
    console, table = Console(markup=False, highlight=False), summary.rendered(grid)
    wide = console.measure(table, options=console.options.update(max_width=1000)).maximum
    Console(markup=False, highlight=False, width=max(console.width, wide)).print(table)  # cut off, it would say nothing
    print(f"{out / grid.name}.csv has every evaluation; table and figures: {page}")


def _read_existing(path: Path, what: str) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"{what} is not a file: name the CSV of an experiment")
    return read_rows(path)
