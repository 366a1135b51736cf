"""Rank correlation of coarse and exact rewards, on the small worlds: `python -m benchmarks.coarse_ranks`.

For each validation prompt, the candidates of a neighborhood are drawn exactly, as in a rollout, and coarsely, by fewer
solver steps or at a lower resolution. Writes a row for each world and way to be coarse.
"""

import csv
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rows import RESULTS
from ngrpo_train.algorithms.advantages import quasi_norm
from ngrpo_train.algorithms.choice import rank_correlation
from ngrpo_train.comparison.statistics import bootstrap
from ngrpo_train.models.model import FlowModel
from ngrpo_train.models.sizes import find_architecture
from ngrpo_train.plan.flops import coarse_cost
from ngrpo_train.prompts import load_prompts
from ngrpo_train.recipe.explore import Explore
from ngrpo_train.recipe.parsing import find_recipe, read_recipe, resolve
from ngrpo_train.rewards import Rewards
from ngrpo_train.sampling.coarse import coarse_pictures
from ngrpo_train.sampling.perturb import neighborhood

CSV = RESULTS / "coarse_ranks.csv"
WORLDS = ("shapes", "spelling")
CANDIDATES = 24
WAYS = [*((steps, 1.0) for steps in (1, 2, 3, 4, 6)), *((steps, 0.5) for steps in (2, 4, 8))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    world: str
    solver_steps: int
    scale: float
    forwards: float
    """Operations of a coarse picture's solver, relative to a single forward of the transformer for a whole picture."""
    rank_correlation: float
    """Spearman's, with the rewards of exact pictures; a mean over prompts."""
    low: float
    high: float
    """Bounds of its bootstrap interval of 95 % over prompts."""
    coarse_reward: float
    exact_reward: float
    prompts: int
    candidates: int
    torch: str


def measured(world: str) -> Iterator[Row]:
    """The rows of one world, by its packaged recipe."""
    path = find_recipe(f"{world}_cpu")
    recipe = resolve(read_recipe(path), name=path.stem)
    sampling, settings, device = recipe.sampling, recipe.algorithm, torch.device("cpu")
    prompts, architecture = load_prompts(recipe.evaluation.validation), find_architecture(recipe.model.name_or_path)
    model = FlowModel(recipe.model, sampling, recipe.parallel, device)
    rewards = Rewards(recipe.rewards)
    noise_PCS = torch.stack(
        [
            neighborhood(model.latent_shape, CANDIDATES, settings.sigma, seed=0, step=0, slot=p)
            for p in range(len(prompts))
        ]
    )

    def scored(steps: int, scale: float) -> tuple[Tensor, float]:
        """The values that rank candidates, [P, C], and the mean of the trained rewards."""
        pictures = coarse_pictures(
            model, prompts, noise_PCS, Explore(num_inference_steps=steps, scale=scale), sampling.shift
        )
        scores = rewards.of_coarse(pictures, prompts)
        return quasi_norm(*scores.combined(settings.combine), settings), scores.trained_RPG.mean().item()

    exact_PC, exact_reward = scored(sampling.num_inference_steps, 1.0)
    for steps, scale in WAYS:
        coarse_PC, coarse_reward = scored(steps, scale)
        interval = bootstrap(rank_correlation(coarse_PC, exact_PC)[None])
        yield Row(
            world=world,
            solver_steps=steps,
            scale=scale,
            forwards=steps * coarse_cost(recipe, architecture, scale),
            rank_correlation=interval.mean.item(),
            low=interval.low.item(),
            high=interval.high.item(),
            coarse_reward=coarse_reward,
            exact_reward=exact_reward,
            prompts=len(prompts),
            candidates=CANDIDATES,
            torch=torch.__version__,
        )


def table() -> str:
    """The committed rows, as a table in Markdown."""
    with CSV.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = ["| world | solver steps | scale | forwards | rank correlation | 95 % | coarse reward | exact reward |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        number = {name: float(value) for name, value in row.items() if name not in ("world", "torch")}
        lines.append(
            f"| {row['world']} | {row['solver_steps']} | {number['scale']:g} | {number['forwards']:.2f} "
            f"| {number['rank_correlation']:.2f} | {number['low']:.2f} to {number['high']:.2f} "
            f"| {number['coarse_reward']:.3f} | {number['exact_reward']:.3f} |"
        )
    first = rows[0]
    made = f"{first['prompts']} validation prompts, {first['candidates']} candidates of each; torch {first['torch']}."
    return "\n".join([*lines, "", f"- {made}"])


def main(path: Path = CSV) -> None:
    rows = [asdict(row) for world in WORLDS for row in measured(world)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
