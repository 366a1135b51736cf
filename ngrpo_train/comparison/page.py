"""A page for a browser that shows pictures beside each other: what a prompt starts from, then each model's results."""

# R rewards, N pictures of a model.

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from torch import Tensor

from ngrpo_train.comparison.gallery import Picture
from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.picture_files import IMAGE, MASK, named_picture

_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
  body {{ font: 14px sans-serif; margin: 1em; }}
  td {{ border-top: 1px solid #ccc; padding: 6px; vertical-align: top; }}
  th {{ position: sticky; top: 0; background: white; text-align: left; padding: 6px; }}
  td:first-child {{ max-width: 20em; }}
  figure {{ display: inline-block; margin: 0 4px 4px 0; }}
  figcaption {{ color: #666; font-size: 12px; }}
  img {{ height: 256px; min-width: 32px; }}
</style>
"""


def write_page(
    file: Path,
    prompts: Sequence[Prompt],
    pictures: Mapping[str, Sequence[Picture]],
    rewards: Sequence[str],
    scores: Mapping[str, Tensor],
) -> None:
    """Write a row for each prompt: its text, the pictures that its row names, and those of each model, by its label.

    `scores` [R, N] of a model stand below its pictures. The page refers to the files where they are.
    """
    shown = {field: paths for field in (IMAGE, MASK) if any(paths := [_path(prompt, field) for prompt in prompts])}
    of_prompt: dict[str, dict[Prompt, list[str]]] = {label: {} for label in pictures}
    for label, some in pictures.items():
        for picture, scores_R in zip(some, scores[label].T.tolist(), strict=True):
            below = "<br>".join(f"{escape(name)} {score:.4g}" for name, score in zip(rewards, scores_R, strict=True))
            of_prompt[label].setdefault(picture.prompt, []).append(_figure(picture.file, file.parent, below))
    lines = [_HEAD.format(title=escape(" and ".join(pictures))), "<table>"]
    lines.append("<tr>" + "".join(f"<th>{escape(each)}" for each in ("prompt", *shown, *pictures)))
    for number, prompt in enumerate(prompts):
        cells = [f"{number}: {escape(prompt.text)}"]
        cells += [_figure(path, file.parent) if (path := paths[number]) else "" for paths in shown.values()]
        cells += ["".join(of_prompt[label].get(prompt, [])) for label in pictures]
        lines.append("<tr>" + "".join(f"<td>{cell}" for cell in cells))
    file.write_text("\n".join([*lines, "</table>\n"]), encoding="utf-8")


def _path(prompt: Prompt, field: str) -> Path | None:
    """The file of a picture that the prompt's row names; None if it names none, or none that is a picture."""
    try:
        return named_picture(prompt.row, field)
    except ValueError:
        return None


def _figure(picture: Path, folder: Path, below: str = "") -> str:
    where = quote(Path(os.path.relpath(picture, folder)).as_posix())
    return f'<figure><img loading="lazy" src="{where}"><figcaption>{below}</figcaption></figure>'
