"""Parsing of recipes (TOML) and flags into dataclasses, by one parser.

A recipe is flattened into flags. So the same rules check both, and a misspelt name is answered with the nearest right
one, in a file and on the command line. The recipe's values are then the defaults of the user's own flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from ngrpo_train.recipe.algorithms import Algorithm, carried_over, refuse_foreign
from ngrpo_train.recipe.resume import with_present_names
from ngrpo_train.recipe.rewards import REWARDS, refuse_fields_of_others, settings_class, with_class
from ngrpo_train.recipe.sections import Recipe, Reward, as_dict

T = TypeVar("T")

_DEFAULT = Recipe().algorithm.name


def packaged_recipes() -> dict[str, Path]:
    """The files of the packaged recipes by bare name."""
    folder = files("ngrpo_train.recipe") / "packaged"
    return {path.name.removesuffix(".toml"): Path(str(path)) for path in sorted(folder.iterdir(), key=str)}


def find_recipe(name: str, beside: Path = Path()) -> Path:
    """A packaged recipe by bare name, or a TOML file, relative to `beside`. Raises ValueError if there is neither."""
    packaged = packaged_recipes()
    if name in packaged:
        return packaged[name]
    path = beside / name
    if path.suffix == ".toml" and path.is_file():
        return path
    close = suggestion(name, packaged)
    raise ValueError(f"no recipe {name!r}: not a TOML file, nor one of {', '.join(sorted(packaged))}{close}")


def is_run(name: str) -> bool:
    """True where `name` is the directory of a run: one with a recipe in it."""
    return bool(name) and (Path(name) / "recipe.toml").exists()


def suggestion(name: str, known: Sequence[str] | Mapping[str, object]) -> str:
    """'; did you mean X?' where one of `known` is near `name`, else ''."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def read_recipe(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe as nested dicts, on top of the one that it `extends`.

    Raises ValueError for a file that is not TOML, and if the extended recipe does not exist or leads back to this one.
    """
    try:
        with path.open("rb") as file:
            own = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: not valid TOML: {error}") from error
    name = own.pop("extends", None)
    if name is None:
        return own
    if not isinstance(name, str):
        raise ValueError(f"recipe {path}: extends = {name!r} must be the name of a recipe")
    try:
        base = find_recipe(name, beside=path.parent)
    except ValueError as error:
        raise ValueError(f"recipe {path}: extends: {error}") from error
    if base.resolve() in (path.resolve(), *within):
        raise ValueError(f"recipe {path}: extends = {name!r} leads back to itself")
    below = read_recipe(base, (path.resolve(), *within))
    try:
        return overlay(below, own)
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from error


def overlay(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe `own` over the recipe `base`, table by table.

    Where `own` names another algorithm, settings of `base` that belong to its algorithm alone are left out: published
    settings of one algorithm do not hold for another. Raises ValueError for an algorithm that does not exist.
    """
    name = _algorithm(own).get("name")
    if name is not None and name != _algorithm(base).get("name", _DEFAULT):
        base = {**base, "algorithm": carried_over(_algorithm(base), str(name))}
    return _on_top(base, own)


def _algorithm(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    section = recipe.get("algorithm", {})
    return section if isinstance(section, Mapping) else {}


def _on_top(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        below = merged.get(key)
        merged[key] = _on_top(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


# As a field of a command: its flags without a prefix, true and false written out as in TOML.
RecipeFlags = Annotated[Recipe, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]


def parse(
    command: type[T],
    recipe: Mapping[str, Any],
    arguments: Sequence[str],
    *,
    prog: str,
    name: str = "",
    quiet: bool = False,
) -> T:
    """A `command`, which is a dataclass with a field `recipe: RecipeFlags`, from a recipe called `name` and flags.

    Exits with code 2 on a wrong key, flag or value. The message on one of the recipe also gives `name`.
    """
    if algorithm := flag_value(arguments, "--algorithm.name"):
        changed = overlay(recipe, {"algorithm": {"name": algorithm}})
        if (left := sorted({*_algorithm(recipe)} - {*_algorithm(changed)})) and not quiet:
            print(f"{algorithm} in place of the recipe's algorithm, without its {', '.join(left)}", file=sys.stderr)
        recipe = changed
    resolved = resolve(recipe, name=name, quiet=quiet)
    refuse_foreign(resolved.algorithm.name, _fields_given(arguments, "algorithm"))
    rewards, arguments = take_rewards(arguments, resolved.rewards)
    resolved = replace(resolved, rewards=rewards)
    # Rewards are a table of any names; the parser only knows flags of names that it has seen in its defaults.
    mentioned = [match[1] for argument in arguments if (match := re.match(r"--rewards\.([^.=]+)\.", argument))]
    resolved = _with_rewards(resolved, {name: {} for name in mentioned})
    resolved = replace(resolved, rewards=_of_their_kinds(resolved.rewards, arguments))
    default = command(recipe=resolved)  # type: ignore[call-arg]
    return parse_flags(default, list(_with_pythons_booleans(arguments, resolved)), prog=prog, quiet=quiet)


def flag_value(arguments: Sequence[str], flag: str) -> str:
    """The value of a flag such as "--base", as `--base VALUE` or `--base=VALUE`; empty if it is not given.

    This is for values that are needed before the parser runs. It agrees with the parser: of a flag given twice the last
    one counts, and underscores and dashes are alike.
    """
    return _given(arguments).get(flag.replace("_", "-"), "")


def _given(arguments: Sequence[str]) -> dict[str, str]:
    """Every flag, spelt with dashes, and the first word of its value."""
    found = {}
    for argument, following in pairwise([*arguments, ""]):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            found[name.replace("_", "-")] = value if equals else following
    return found


def _fields_given(arguments: Sequence[str], section: str) -> list[str]:
    """The fields of a section that are given as flags."""
    prefix = f"--{section}.".replace("_", "-")
    return [flag.removeprefix(prefix).replace("-", "_") for flag in _given(arguments) if flag.startswith(prefix)]


def _with_pythons_booleans(arguments: Sequence[str], recipe: Recipe) -> Iterator[str]:
    """The arguments with true and false, TOML's words, as True and False, the only ones that the parser takes."""
    sections = [type(getattr(recipe, section.name)) for section in dataclasses.fields(Recipe)]
    fields = {
        name
        for section in (Reward, *REWARDS.values(), *sections)
        if dataclasses.is_dataclass(section)
        for name, kind in get_type_hints(section).items()
        if kind is bool
    }
    before = ""
    for argument in arguments:
        flag, _, value = argument.rpartition("=") if argument.startswith("--") else (before, "", argument)
        is_boolean = flag.startswith("--") and flag.rpartition(".")[2].replace("-", "_") in fields
        yield (
            f"{argument.removesuffix(value)}{value.title()}" if is_boolean and value in ("true", "false") else argument
        )
        before = argument


def resolve(recipe: Mapping[str, Any], *, name: str, quiet: bool = False) -> Recipe:
    """A complete recipe from one as read from TOML. Exits with code 2, saying where and what, on a wrong key or value.

    Raises ValueError where the shape of the TOML is wrong, because the parser of flags could not explain that.
    """
    if section := _algorithm(recipe):
        recipe = {**recipe, "algorithm": with_present_names(section)}
    try:
        algorithm = Algorithm.of(str(_algorithm(recipe).get("name", _DEFAULT)))
        _refuse_misshapen(recipe, algorithm)
        refuse_foreign(algorithm.name, _algorithm(recipe))
        default = _with_rewards(Recipe(algorithm=algorithm), recipe.get("rewards", {}))
    except ValueError as error:
        raise ValueError(f"recipe {name}: {error}") from error
    try:
        return _cli(RecipeFlags, as_flags(recipe), default, "ngrpo train", quiet)
    except SystemExit:
        if not quiet:
            print(f"in the recipe {name}", file=sys.stderr)
        raise


def _refuse_misshapen(recipe: Mapping[str, Any], algorithm: Algorithm) -> None:
    types = {
        f"{section.name}.{key}": str(kind)
        for section in dataclasses.fields(Recipe)
        if section.name != "rewards"
        for key, kind in get_type_hints(type(getattr(Recipe(algorithm=algorithm), section.name))).items()
    }
    for section, values in recipe.items():
        if not isinstance(values, Mapping):
            raise ValueError(f"{section} = {values!r} must be a section of its own or stand inside one")
        for key, value in values.items():
            expected = types.get(f"{section}.{key}", "...")
            pair = "tuple[float, float]" in expected
            if isinstance(value, list) and "..." not in expected and not (pair and len(value) == 2):
                raise ValueError(f"{section}.{key} = {value!r} must be {'two numbers' if pair else 'one value'}")


def parse_flags(defaults: T, arguments: Sequence[str], *, prog: str, quiet: bool = False) -> T:
    """A command's dataclass with flags over its values; exits with code 2 on a wrong flag or value."""
    return _cli(type(defaults), arguments, defaults, prog, quiet)


def _cli(kind: Any, arguments: Iterable[str], default: T, prog: str, quiet: bool) -> T:
    result: T = tyro.cli(
        kind,
        prog=prog,
        args=list(arguments),
        default=default,
        config=(tyro.conf.AvoidSubcommands,),
        console_outputs=not quiet,
    )
    return result


def take_rewards(arguments: Sequence[str], known: Mapping[str, Reward]) -> tuple[dict[str, Reward], list[str]]:
    """The rewards that `--rewards NAME,NAME ...` chooses, with their settings in `known`, and the other flags.

    Without that flag, all rewards in `known`. "package.module:callable" gets the callable's name. Raises ValueError for
    a flag without names.
    """
    chosen: list[str] = []
    rest: list[str] = []
    taking = False
    for argument in arguments:
        if argument == "--rewards" or argument.startswith("--rewards="):
            chosen += filter(None, argument.removeprefix("--rewards").removeprefix("=").split(","))
            taking = argument == "--rewards"
        elif taking and not argument.startswith("-"):
            chosen += filter(None, argument.split(","))
        elif "." not in argument and _nearly_rewards(argument):
            raise ValueError(f"no flag {argument!r}; did you mean --rewards?")
        else:
            taking = False
            rest.append(argument)
    if not chosen:
        if len(rest) < len(arguments):
            raise ValueError("--rewards must name at least one reward, or package.module:callable")
        return _of_their_kinds(known, rest), rest
    rewards: dict[str, Reward] = {}
    for path in dict.fromkeys(chosen):
        name = path.rpartition(":")[2] if ":" in path else path.replace("-", "_")
        if name in rewards:
            raise ValueError(f"--rewards: {path} would be called {name}, as another one is: rename one of them")
        own = Reward(path=path) if ":" in path else None
        rewards[name] = own or known.get(name) or settings_class(name)()
    return _of_their_kinds(rewards, rest), rest


def _of_their_kinds(rewards: Mapping[str, Reward], arguments: Sequence[str]) -> dict[str, Reward]:
    """The rewards, each of the class that flags for its kind and path ask for, so that the parser knows its fields.

    Raises ValueError for the flag of a field that belongs to other kinds.
    """
    found = {}
    for name, reward in rewards.items():
        kind, path = (flag_value(arguments, f"--rewards.{name}.{each}") for each in ("kind", "path"))
        settings = settings_class(name, kind or reward.kind, path or reward.path)
        refuse_fields_of_others(name, settings, _fields_given(arguments, f"rewards.{name}"))
        found[name] = with_class(reward, settings)
    return found


def _nearly_rewards(argument: str) -> bool:
    return bool(difflib.get_close_matches(argument.partition("=")[0], ["--rewards"], cutoff=0.75))


def _with_rewards(recipe: Recipe, sections: Mapping[str, Any]) -> Recipe:
    """The recipe with the rewards of these sections added, each of the section's kind, at its defaults.

    Raises ValueError for a field that belongs to other kinds.
    """
    wanted = {}
    for name, section in sections.items():
        section, name = section if isinstance(section, Mapping) else {}, name.replace("-", "_")
        settings = settings_class(name, *(str(section.get(each, "")) for each in ("kind", "path")))
        refuse_fields_of_others(name, settings, (key.replace("-", "_") for key in section))
        wanted[name] = settings()
    return replace(recipe, rewards={**recipe.rewards, **{n: r for n, r in wanted.items() if n not in recipe.rewards}})


def as_flags(recipe: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    """Flags for a recipe: {"model": {"ema": 0.9}} -> "--model.ema=0.9".

    The values of a list are words of their own, after the flag.
    """
    for key, value in recipe.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from as_flags(value, f"{name}.")
        elif isinstance(value, list | tuple):
            yield name
            yield from map(str, value)
        else:
            yield f"{name}={value}"


def as_toml(recipe: Recipe) -> str:
    """The resolved recipe as a file that `ngrpo train` takes back."""
    lines: list[str] = []

    def table(name: str, values: Mapping[str, Any]) -> None:
        plain = {k: v for k, v in values.items() if not isinstance(v, Mapping)}
        if plain:
            lines.extend([f"[{name}]", *(f"{k} = {_toml_value(v)}" for k, v in plain.items()), ""])
        for key, value in values.items():
            if isinstance(value, Mapping):
                table(f"{name}.{key}", value)

    for section, values in as_dict(recipe).items():
        table(section, values)
    return "\n".join(lines)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's but for DEL
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    return repr(value)
