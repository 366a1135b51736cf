"""Grids: an experiment's runs as a TOML file, and the recipes of these runs.

    title = "..."                    one line, for the list of grids
    question = "..."                 one sentence: what the runs shall answer
    claim = "..."                    what the paper says, with its table
    base = "shapes_cpu"              recipe that all runs start from, unless --base is given
    seeds = [0, 1, 2]
    only_own_base = false            true refuses --base: only this base has the rewards or prompts
    timed = false                    show a CPU's times too; then nothing else may run. A GPU's are always shown
    test = true                      score trained models on the base recipe's evaluation.test
    figures = ["curves", "final"]    also "gradient_by_step", and any column of the CSV, to be drawn over iterations
    columns = ["G"]                  CSV columns that the table shows, as means over a whole run
    against = "sigma 0.3"            variant that the others are compared with, paired by seed
    paper_table = "Table 3"          source of the variants' `paper` numbers
    tuning = "FILE"                  CSV that `tuned` variants take their settings from; beside this file

    [recipe.algorithm]               sections of a recipe that override the base's, for all variants
    p = 2.0
    [own_base.train]                 the same, only if the base is the grid's own: settings for its size
    steps = 30

    [[variants]]
    name = "sigma 0.3"               then any sections of a recipe, which override all of the above
    algorithm = { sigma = 0.3 }
    own_base.train = { steps = 20 }  sections used only if the base is the grid's own
    each = { "algorithm.p" = [1, 2] }             one variant for each value: "sigma 0.3, p 1" and "sigma 0.3, p 2";
    times = { "train.steps" = [1, 2] }            for several fields, all combinations. `times` multiplies the field
    control = true                   a second run, with rewards shuffled at random within each group
    family = "neighbor"              in a grid for tuning: a trial of this family
    tuned = "neighbor"               settings of this family's best trial; the variant's own win
    paper = { "s / Iter." = 45.08 }  the paper's numbers, shown beside ours

Only title, question, claim, and a name for each variant that its lists do not name, have no default. Models are tested
with the base recipe's own rewards and sampler, whatever they were trained with. Validations during a run use the run's
own sampler.
"""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from ngrpo_train.experiments.results import is_column
from ngrpo_train.recipe.parsing import overlay, suggestion
from ngrpo_train.recipe.sections import Recipe

CONTROL = ", rewards permuted"  # added to a variant's name to name its control
DRAWN = ("curves", "final", "gradient_by_step")  # figures by name; any CSV column is a further one, over iterations

_SECTIONS = tuple(section.name for section in dataclasses.fields(Recipe))


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    name: str
    sections: Mapping[str, Any] = field(default_factory=dict)  # of a recipe
    is_control: bool = False
    own_base: Mapping[str, Any] = field(default_factory=dict)  # sections used only if the base is the grid's own
    times: Mapping[str, float] = field(default_factory=dict)  # "section.field": factor of its value without it
    family: str = ""
    tuned: str = ""
    paper: Mapping[str, float | str] = field(default_factory=dict)

    def settings(self, best: Mapping[str, Any], *, on_own_base: bool) -> dict[str, Any]:
        """Sections of a recipe: those of its family's best trial, `best`, with the variant's own on top."""
        own = overlay(best, self.sections)
        if on_own_base:
            own = overlay(own, self.own_base)
        return overlay(own, {"algorithm": {"shuffle_rewards": True}}) if self.is_control else own


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The description of an experiment; in `variants`, each control follows its variant."""

    name: str
    title: str
    question: str
    claim: str
    base: str = "shapes_cpu"
    seeds: tuple[int, ...] = (0, 1, 2)
    only_own_base: bool = False
    timed: bool = False
    test: bool = True
    figures: tuple[str, ...] = ("curves", "final")
    columns: tuple[str, ...] = ()
    against: str = ""
    paper_table: str = ""
    tuning: Path | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    own_base: Mapping[str, Any] = field(default_factory=dict)
    variants: tuple[Variant, ...] = ()

    def chosen(self, names: Iterable[str]) -> tuple[Variant, ...]:
        """The variants of these names with their controls; without names, all. Raises ValueError if unknown."""
        known = [variant.name for variant in self.variants]
        names = list(names) or known
        for name in names:
            if name not in known:
                raise ValueError(
                    f"--only: {self.name} has no variant {name!r}; there are: "
                    f"{'; '.join(name for name in known if not name.endswith(CONTROL))}{suggestion(name, known)}"
                )
        wanted = {*names, *(name + CONTROL for name in names)}
        return tuple(variant for variant in self.variants if variant.name in wanted)


def packaged() -> dict[str, Path]:
    """The grids that ship with ngrpo, by name."""
    directory = files("ngrpo_train.experiments") / "grids"
    found = {path.name.removesuffix(".toml"): Path(str(path)) for path in directory.iterdir()}
    return dict(sorted(found.items()))


def find_grid(name: str) -> Grid:
    """A packaged grid by its name, or one from a TOML file. Raises ValueError if it is missing or malformed."""
    known = packaged()
    path = known.get(name, Path(name))
    if path.suffix != ".toml" or not path.is_file():
        raise ValueError(
            f"no experiment {name!r}: not a TOML file, nor one of {', '.join(known)}{suggestion(name, known)}"
        )
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"experiment {path}: not valid TOML: {error}") from error
    try:
        return _grid(path, content)
    except ValueError as error:
        raise ValueError(f"experiment {path}: {error}") from error


def _grid(path: Path, content: Mapping[str, Any]) -> Grid:
    kinds = {
        **dict.fromkeys(("title", "question", "claim", "base", "against", "paper_table", "tuning"), str),
        **dict.fromkeys(("seeds", "figures", "columns", "variants"), list),
        **dict.fromkeys(("test", "timed", "only_own_base"), bool),
        "recipe": dict,
        "own_base": dict,
    }
    _refuse_misshapen(content, kinds, "")
    for key in ("title", "question", "claim", "variants"):
        if not content.get(key):
            raise ValueError(f"{key} must be given")
    for seed in content.get("seeds", ()):
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seeds = {content['seeds']!r} must be whole numbers")
    for key, also in (("figures", DRAWN), ("columns", ())):
        for name in content.get(key, ()):
            if name not in also and not is_column(str(name)):
                raise ValueError(f"{key}: {name!r} is no column of the CSV{suggestion(str(name), also)}")
    tables = content["variants"]
    variants = [each for i, table in enumerate(tables) for each in _variants(table, f"variants[{i}]: ")]
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two variants are called {name!r}: rename one of them")
    if content.get("against", names[0]) not in names:
        raise ValueError(f"against = {content['against']!r} is no variant{suggestion(content['against'], names)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    values["variants"] = tuple(variants)
    if "tuning" in content:
        values["tuning"] = path.parent / content["tuning"]
    return Grid(name=path.stem, **values)


def _variants(table: Any, where: str) -> list[Variant]:
    """The variants of a table: one for each combination of its lists, and the control of each."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{where}{table!r} must be a table, [[variants]]")
    kinds = {
        **dict.fromkeys(("name", "family", "tuned"), str),
        **dict.fromkeys(("paper", "own_base", "each", "times", *_SECTIONS), dict),
        "control": bool,
    }
    _refuse_misshapen(table, kinds, where)
    lists = {(kind, name): values for kind in ("each", "times") for name, values in table.get(kind, {}).items()}
    for (kind, name), values in lists.items():
        if not isinstance(values, list) or name.count(".") != 1:
            raise ValueError(f'{where}{kind}.{name} = {values!r} must be a list, for a "section.field"')
    if not table.get("name") and not lists:
        raise ValueError(f"{where}name must be given")
    if "|" in table.get("name", ""):
        raise ValueError(f"{where}name = {table['name']!r} must not have a |, which separates the columns of a table")
    if table.get("tuned") and not table.get("algorithm", {}).get("name"):
        raise ValueError(f"{where}algorithm.name must be given beside tuned: --tuning none needs it")
    made = []
    for values in itertools.product(*lists.values()):
        sections: dict[str, Any] = {key: value for key, value in table.items() if key in _SECTIONS}
        name, times = [table["name"]] if table.get("name") else [], {}
        for (kind, path), value in zip(lists, values, strict=True):
            section, _, entry = path.partition(".")
            spoken = entry.replace("_", " ")
            if kind == "times":
                times[path] = value
                name.append(f"{spoken} x {value:g}")
            else:
                sections = overlay(sections, {section: {entry: value}})
                name.append(f"{spoken} {' to '.join(map(str, value)) if isinstance(value, list) else value}")
        variant = Variant(
            name=", ".join(name),
            sections=sections,
            own_base=table.get("own_base", {}),
            times=times,
            family=table.get("family", ""),
            tuned=table.get("tuned", ""),
            paper=table.get("paper", {}),
        )
        made.append(variant)
        if table.get("control"):
            control = variant.name + CONTROL
            made.append(dataclasses.replace(variant, name=control, is_control=True, family="", paper={}))
    return made


def _refuse_misshapen(table: Mapping[str, Any], kinds: Mapping[str, type], where: str) -> None:
    words = {str: "a string", list: "a list", bool: "true or false", dict: "a table"}
    for key, value in table.items():
        if key not in kinds:
            raise ValueError(f"{where}no key {key!r}; there are {', '.join(kinds)}{suggestion(key, kinds)}")
        if not isinstance(value, kinds[key]):
            raise ValueError(f"{where}{key} = {value!r} must be {words[kinds[key]]}")
