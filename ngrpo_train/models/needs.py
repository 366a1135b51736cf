"""Pictures that a model takes beside a prompt's text: which ones, before any weights are loaded, and who lacks them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from ngrpo_train.models.directory import pipeline_class_name
from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.picture_files import IMAGE, MASK, is_named, refuse_row
from ngrpo_train.prompts.prompt import Row
from ngrpo_train.recipe.named import import_named
from ngrpo_train.recipe.sections import Model

ARGUMENTS = {IMAGE: "image", MASK: "mask_image"}
"""Fields of a prompt's row, and the arguments of a pipeline's call that take what they name."""

# diffusers lists these among the pipelines that draw from a text alone, which they can do. They were trained to edit.
_EDITORS = ("FluxKontextPipeline",)

_AT_ONCE = 32  # files that are looked at together, for a disk of another machine answers late


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures that a model takes, by the fields of a prompt's row that name their files."""

    needed: tuple[str, ...] = ()
    """Each row must name these."""
    optional: tuple[str, ...] = ()
    """Either all rows of a run name these, or none does."""

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.needed, *self.optional)

    def refuse(self, model: str, prompts: Mapping[str, Sequence[Prompt]]) -> None:
        """Look at the pictures of prompts, by the setting that they come from, without reading them whole.

        Raises ValueError, in one line that names `model`, the prompt with its row's number, the field and the file: for
        a picture that is not named or not there, that is no picture, or that does not fit to its mask.
        """
        named = self.needed + tuple(self._used(model, prompts))
        if not named:
            return
        for setting, some in prompts.items():
            refused = [(prompt, why) for prompt, why in zip(some, _reasons(some, named), strict=True) if why]
            if refused:
                first, why = refused[0]
                others = f" and {len(refused) - 1} more of {len(some)}" if len(refused) > 1 else ""
                raise ValueError(f"{model} cannot draw {first}{others} of {setting}: {why}")

    def _used(self, model: str, prompts: Mapping[str, Sequence[Prompt]]) -> Iterator[str]:
        """The optional fields that rows name. Raises ValueError where some do and others do not."""
        each = [(prompt, setting) for setting, some in prompts.items() for prompt in some]
        for field in self.optional:
            with_it = [(prompt, setting) for prompt, setting in each if is_named(prompt.row, field)]
            without = [(prompt, setting) for prompt, setting in each if not is_named(prompt.row, field)]
            if with_it and without:
                (prompt, setting), (other, other_setting) = with_it[0], without[0]
                raise ValueError(
                    f"{model} takes a picture with every prompt of a run or with none: {prompt} of {setting} names "
                    f'{prompt.row[field]!r} in its row\'s field "{field}", and {other} of {other_setting} names none'
                )
            if with_it:
                yield field


def pictures_of(model: Model) -> Pictures | None:
    """The pictures that the model of a recipe takes. Nothing of it is loaded, and its weights are not looked for.

    The class of an adapter of the user's own may say so by its `pictures`. Otherwise it follows from the class of the
    pipeline; None if that is not known, for a model that is not found or is no pipeline: loading will explain. Raises
    ValueError if an adapter cannot be imported.
    """
    if model.adapter != "auto":
        make = import_named("model.adapter", model.adapter, form='"auto" or "package.module:Name"')
        if isinstance(own := getattr(make, "pictures", None), tuple):
            return Pictures(needed=own)
    import diffusers

    kind = getattr(diffusers, pipeline_class_name(model.name_or_path), None)
    return pictures_of_pipeline(kind) if kind else None


def refuse_without_pictures(model: Model, prompts: Mapping[str, Sequence[Prompt]]) -> None:
    """Look at the pictures that a model takes with these prompts, given by the setting that they come from.

    Raises ValueError as `Pictures.refuse` does, naming the model.
    """
    if taken := pictures_of(model):
        field = "name_or_path" if model.adapter == "auto" else "adapter"
        taken.refuse(f"model.{field} = {getattr(model, field)!r}", prompts)


@cache
def pictures_of_pipeline(kind: Any) -> Pictures:
    """The pictures that a class of diffusers' pipelines takes, by the arguments of its call.

    They may be left out where diffusers lists the pipeline among those that draw from a text alone.
    """
    arguments = inspect.signature(kind.__call__).parameters
    fields = tuple(field for field, argument in ARGUMENTS.items() if argument in arguments)
    if not fields:
        return Pictures()
    from diffusers.pipelines import auto_pipeline  # a second: it imports all that it lists

    from_text = auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()
    if kind in from_text and kind.__name__ not in _EDITORS:
        return Pictures(optional=fields)
    return Pictures(needed=fields)


def _reasons(prompts: Sequence[Prompt], fields: tuple[str, ...]) -> list[str]:
    """For each prompt, why its row lacks a picture that these fields name; "" where it lacks none."""
    keys = [_files(prompt, fields) for prompt in prompts]
    distinct = dict(zip(keys, prompts, strict=True))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = dict(zip(distinct, pool.map(partial(_reason, fields), distinct.values()), strict=True))
    return [found[key] for key in keys]


def _files(prompt: Prompt, fields: tuple[str, ...]) -> str:
    """A key that is equal for prompts with equal pictures."""
    folder = prompt.row.folder if isinstance(prompt.row, Row) else ""
    return repr([str(folder), *(prompt.row.get(field) for field in fields)])


def _reason(fields: tuple[str, ...], prompt: Prompt) -> str:
    try:
        refuse_row(prompt.row, fields)
    except ValueError as error:
        return str(error)
    return ""
