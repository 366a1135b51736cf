"""The row of the paper's Table 1 for a model, its base's row, and their difference; and the same for each style."""

# R rewards, P prompts, N pictures.

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from ngrpo_train.comparison.gallery import Picture
from ngrpo_train.comparison.statistics import Interval, bootstrap, prompt_means
from ngrpo_train.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Column:
    """A reward's column as the paper prints it: its heading, and the factor of a score."""

    heading: str
    scale: float = 1.0


_COLUMNS = {
    "hpsv2_1": Column("HPSv2.1"),
    "pickscore": Column("Pick", 0.01),
    "image_reward": Column("ImageReward"),
    "clip": Column("CLIP"),
    "unified": Column("Unified"),
    "aesthetic": Column("Aes"),
}
# The paper's Table 1 for FLUX.1-dev over HPDv2's 3,200 prompts: a base model's row should come near to it.
PAPER = {
    "hpsv2_1": 0.310,
    "pickscore": 0.227,
    "image_reward": 1.131,
    "clip": 0.389,
    "unified": 3.211,
    "aesthetic": 6.108,
}


def column(name: str) -> Column:
    return _COLUMNS.get(name, Column(name))


@dataclass(frozen=True, slots=True)
class Scored:
    """A model's pictures and their scores [R, N] (NaN where a picture could not be read), in the paper's units."""

    label: str
    pictures: Sequence[Picture]
    scores_RN: Tensor

    @staticmethod
    def of(label: str, rewards: Sequence[str], pictures: Sequence[Picture], raw_RN: Tensor) -> Scored:
        scale = torch.tensor([column(name).scale for name in rewards], dtype=torch.float64)
        return Scored(label, pictures, raw_RN * scale[:, None])

    def by_prompt(self, prompts: Sequence[Prompt]) -> Tensor:
        """The mean score of each prompt: float64 [R, P]."""
        row = {prompt: i for i, prompt in enumerate(prompts)}
        prompt_N = torch.tensor([row[picture.prompt] for picture in self.pictures])
        return prompt_means(self.scores_RN, prompt_N, len(prompts))


@dataclass(frozen=True, slots=True)
class Section:
    """All prompts, or those of one style: every model's interval, and the evaluated model's difference to its base."""

    style: str | None  # None for all prompts
    prompts: int
    models: Mapping[str, Interval]
    difference: Interval | None


def sections(prompts: Sequence[Prompt], model: Scored, base: Scored | None) -> list[Section]:
    """The section of all prompts, then, if there are several styles, one for each style."""
    styles = list(dict.fromkeys(prompt.style for prompt in prompts))
    chosen: dict[str | None, list[int]] = {None: list(range(len(prompts)))}
    if len(styles) > 1:
        chosen |= {style: [i for i, p in enumerate(prompts) if p.style == style] for style in styles}
    values = {scored.label: scored.by_prompt(prompts) for scored in (base, model) if scored}
    found = []
    for style, rows in chosen.items():
        own = {label: each[:, rows] for label, each in values.items()}
        difference = bootstrap(own[model.label] - own[base.label]) if base else None
        found.append(Section(style, len(rows), {label: bootstrap(each) for label, each in own.items()}, difference))
    return found


def render(
    found: Sequence[Section], rewards: Sequence[str], in_domain: Sequence[str], paper: Mapping[str, float]
) -> Table:
    """A table with a block of rows for each section. Rewards that the model was trained on are marked; the paper
    underlines them.

    `paper` is a row to compare the base model's with, or empty.
    """
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("prompts", overflow="fold")
    table.add_column("model", overflow="fold")
    for name in rewards:
        heading = column(name).heading + ("*" if name in in_domain else "")
        table.add_column(heading, justify="right", overflow="fold")
    if paper:
        table.add_row("", "FLUX.1-dev, paper", *(f"{paper[name]:.3f}" if name in paper else "" for name in rewards))
    for section in found:
        name = "all" if section.style is None else section.style or "no style"
        head = f"{name} ({section.prompts:,})"
        for label, interval in section.models.items():
            table.add_row(head, label, *(f"{mean:.3f}" for mean in interval.mean.tolist()))
            head = ""
        if section.difference:
            table.add_row("", "difference", *(f"{mean:+.3f}" for mean in section.difference.mean.tolist()))
        table.add_row("", "95 %", *_bounds(section), end_section=True)
    return table


def legend(found: Sequence[Section], rewards: Sequence[str], in_domain: Sequence[str]) -> str:
    """The lines below the table."""
    of = "difference" if found[0].difference else "mean"
    parts = [f"95 %: bootstrap interval of the {of} over prompts"]
    if set(in_domain) & set(rewards):
        parts.append("*: trained on")
    return "; ".join(parts)


def _bounds(section: Section) -> list[str]:
    interval, sign = section.difference, "+"
    if interval is None:
        [interval], sign = section.models.values(), ""
    bounds = zip(interval.low.tolist(), interval.high.tolist(), strict=True)
    return [f"{low:{sign}.4f} {high:{sign}.4f}" if math.isfinite(low) else "" for low, high in bounds]


def summary(found: Sequence[Section], rewards: Sequence[str]) -> dict[str, Any]:
    """The table as plain values, in the paper's units; null for an unknown value."""
    plain = {
        section.style: {
            "prompts": section.prompts,
            "models": {label: _plain(interval, rewards) for label, interval in section.models.items()},
            "difference": _plain(section.difference, rewards) if section.difference else None,
        }
        for section in found
    }
    return {"all": plain.pop(None), "styles": plain}


def _plain(interval: Interval, rewards: Sequence[str]) -> dict[str, dict[str, float | None]]:
    def value(x: Tensor) -> float | None:
        return x.item() if x.isfinite() else None

    return {
        name: {"mean": value(interval.mean[i]), "low": value(interval.low[i]), "high": value(interval.high[i])}
        for i, name in enumerate(rewards)
    }


def write_csv(path: Path, rewards: Sequence[str], scored: Sequence[Scored], raw: Mapping[str, Tensor]) -> None:
    """Write a row for every picture, with scores as the rewards return them."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "picture", "style", "prompt", *rewards])
        for each in scored:
            for picture, scores in zip(each.pictures, raw[each.label].T.tolist(), strict=True):
                values = [score if math.isfinite(score) else "" for score in scores]
                writer.writerow([each.label, picture.file.name, picture.prompt.style, picture.prompt.text, *values])


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
