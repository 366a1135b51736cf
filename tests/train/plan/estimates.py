"""The estimates on docs/training-cost.md: the target's seconds by part, and what changes would bring.

    python -m tests.train.plan.estimates

A test holds the page to what this writes. What is not built is put together from parts of other plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.rows import RESULTS
from benchmarks.train_recipes import full_size
from benchmarks.train_rows import read
from ngrpo_train.plan import make_plan, rates
from ngrpo_train.plan.elementwise import result_bytes
from ngrpo_train.plan.forecast import Plan
from ngrpo_train.plan.layout import Batches, coarsely, computed_share, shape_of
from ngrpo_train.plan.machines import MACHINES
from ngrpo_train.plan.rates import Rates
from ngrpo_train.plan.remedies import with_settings
from ngrpo_train.plan.seconds import Part
from ngrpo_train.plan.trace import traced
from ngrpo_train.recipe.explore import Explore
from ngrpo_train.recipe.sections import Recipe, RolloutCache

PAGE = Path(__file__).parents[3] / "docs" / "training-cost.md"
H200, H100 = MACHINES["h200-141"], MACHINES["h100-80"]
FULL = {"model.gradient_checkpointing": "full", "parallel.retain": "off"}
RETAINED = {"model.gradient_checkpointing": "full", "parallel.retain": "on"}
FLOAT8 = {
    "parallel.rollout_dtype": "float8",
    "prompts.embeddings": "DIRECTORY",
}  # beside text encoders it would not fit
CACHED = {"parallel.rollout_cache": RolloutCache(kind="taylor_seer")}
CHOSEN = {"algorithm.explore": Explore(candidates=12), "algorithm.num_generations": 4}
LARGER = {"sampling.height": 768, "sampling.width": 768}  # whose half is whole tokens
OPTIMIZER_BYTES = 11.1  # of a weight, by the generated code of the 8-bit optimizer

# What a rollout's block could spare, in its results (15.6 MB a picture), by the kernels of the generated code. Queries
# and keys are read and written 5 times in a double block and 3 in a single one, where twice would do. GELU reads and
# writes what the product before it could write: 8; in a single block with a copy beside attention's output: 10, one of
# which a product in two parts reads again. Both streams' parts of attention's output are copied: 2.
SPARED = {"FluxTransformerBlock": 2 * (5 - 2) + 8 + 2, "FluxSingleTransformerBlock": 2 * (3 - 2) + 10 - 1}


@dataclass(frozen=True, slots=True)
class Sum:
    """Seconds of an iteration and prompt on one GPU: estimated, and those of its arithmetic at full speed."""

    estimate: float
    floor: float

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.estimate + other.estimate, self.floor + other.floor)

    def __sub__(self, other: Sum) -> Sum:
        return self + -1.0 * other

    def __rmul__(self, factor: float) -> Sum:
        return Sum(factor * self.estimate, factor * self.floor)


def of(parts: Iterable[Part]) -> Sum:
    return sum((Sum(part.seconds, part.floor) for part in parts), Sum(0.0, 0.0))


def target(settings: Mapping[str, Any] | None = None) -> Recipe:
    return with_settings(full_size(), settings or {})


def planned(settings: Mapping[str, Any] | None = None) -> Plan:
    return make_plan(target(settings), H200)


def whole(plan: Plan) -> Sum:
    assert plan.seconds
    assert plan.fits
    return 1 / plan.batches.prompts * of(plan.seconds.parts)


def some(plan: Plan, *names: str) -> Sum:
    """Of parts, or of all parts of stages, by name."""
    assert plan.seconds
    return of(part for part in plan.seconds.parts if part.stage in names or f"{part.stage} {part.name}" in names)


# -- What is not built ----------------------------------------------------------------------------------------------


def fused(plan: Plan) -> Sum:
    """What the fused kernels of `SPARED` would save of a rollout, and of coarse exploration before it."""
    assert plan.machine
    resolved = plan.settled.within(plan.recipe)
    spared = 0.0
    for recipe in filter(None, (coarsely(resolved), resolved)):
        batches = Batches.of(recipe)
        pictures = computed_share(recipe) * sum(batches.calls) - batches.retained  # whose GELU keeps what it reads
        kinds = traced(plan.architecture, shape_of(recipe)).kinds
        spared += pictures * sum(kind.layers * SPARED[type(kind.block).__name__] * result_bytes(kind) for kind in kinds)
    return Sum(spared / Rates.of(plan.machine).memory, 0.0)


def one_launch(plan: Plan) -> Sum:
    """What is saved where the optimizer's step, and a float8 copy, are a launch each: their traffic is left."""
    assert plan.machine
    counts, memory = plan.parameters, Rates.of(plan.machine).memory
    seconds = some(plan, "update optimizer") - Sum(OPTIMIZER_BYTES * plan.trained / memory, 0.0)
    if plan.recipe.parallel.rollout_dtype == "same":
        return seconds
    moved = 2 * counts.transformer + counts.token_matrices + 2 * (counts.transformer - counts.token_matrices)
    return seconds + some(plan, "rollout float8 copy") - Sum(moved / memory, 0.0)


# -- Tables ------------------------------------------------------------------------------------------------------------

TARGET = ("iteration", "full, 1 update")


def measured(of: tuple[str, str], metric: str) -> str:
    """A measured cell of a part and case of benchmarks/train_parts.py; empty where no GPU has run it."""
    found = {row.metric: row.value for row in read(RESULTS / "train_gpu.csv") if row.of() == of}.get(metric)
    return "" if found is None else f"{found:.2f}"


def by_part() -> Iterator[str]:
    """The target part by part. A measured stage stands beside the sum of its parts."""
    yield "| s | estimate | arithmetic at full speed | estimate, blocks computed again | measured |"
    yield "|---|---|---|---|---|"
    plans = planned(), planned(FULL)
    columns = [{(part.stage, part.name): part for part in plan.seconds.parts} for plan in plans if plan.seconds]
    for stage in dict.fromkeys(stage for stage, _ in columns[0]):
        one, again = (some(plan, stage) for plan in plans)
        cells = f"{one.estimate:.2f} | {one.floor:.2f} | {again.estimate:.2f}"
        yield f"| **{stage}** | {cells} | {measured(TARGET, stage)} |"
        names = [name for its_stage, name in columns[0] if its_stage == stage]
        for name in names if len(names) > 1 else ():
            part, other = (column[stage, name] for column in columns)
            floor = f"{part.floor:.2f}" if part.floor else ""
            yield f"| {name} | {part.seconds:.2f} | {floor} | {other.seconds:.2f} | |"
    one, again = map(whole, plans)
    cells = f"**{one.estimate:.1f}** | **{one.floor:.2f}** | **{again.estimate:.1f}**"
    yield f"| **iteration** | {cells} | {measured(TARGET, 'iteration')} |"


class Change(NamedTuple):
    name: str
    there: str
    seconds: Sum
    """Per prompt."""
    case: tuple[str, str] = ("", "")
    """Where a GPU measures it."""


def changes() -> Iterator[Change]:
    plan, full, float8 = planned(), planned(FULL), planned(FLOAT8)
    yield Change("the target", "yes", whole(plan), TARGET)
    for tflops in (620, 740):
        with mock.patch.object(rates, "SUSTAINED", tflops / H200.matmul_tflops):
            yield Change(f"if products run at {tflops} TFLOP/s, not 680", "", whole(planned()))
    yield Change(
        "blocks computed again in the backward", "yes", whole(full), ("variants", "full, blocks computed again")
    )
    yield Change("the same with retained graphs", "yes", whole(planned(RETAINED)))
    some_kept = planned(RETAINED | {"model.gradient_checkpointing": 0.15})
    yield Change("retained graphs, of whose activations the compiler keeps 15 %", "yes", whole(some_kept))
    yield Change("and the optimizer's step in one launch", "no", whole(some_kept) - one_launch(some_kept))
    spared = one_launch(some_kept) + fused(some_kept)
    yield Change("and fused elementwise kernels in the rollout", "no", whole(some_kept) - spared)
    four = planned({"train.gradient_accumulation_steps": 4})
    yield Change("the target with four prompts an update, streamed", "yes", whole(four))
    yield Change("the target with a Taylor cache, which leaves out 3 of 8 steps", "yes", whole(planned(CACHED)))
    yield Change(
        "float8 rollout, prompts encoded beforehand", "yes", whole(float8), ("variants", "full, float8 rollout")
    )
    yield Change("float8 rollout with a Taylor cache", "yes", whole(planned(FLOAT8 | CACHED)))
    spared = one_launch(float8) + fused(float8)
    yield Change("float8 rollout, fused kernels, one launch", "no", whole(float8) - spared)
    yield Change("12 candidates in 4 coarse steps, of which 4 are kept", "yes", whole(planned(CHOSEN)))
    yield Change("the target at 768x768", "yes", whole(planned(LARGER)))
    half = LARGER | CHOSEN | {"algorithm.explore": Explore(candidates=12, scale=0.5)}
    yield Change("at 768x768, 4 of 12 coarse ones of half the height and width", "yes", whole(planned(half)))
    kept = planned(half | RETAINED | {"model.gradient_checkpointing": 0.1})
    yield Change("and retained graphs, of whose activations the compiler keeps 10 %", "yes", whole(kept))
    coarse = planned(half | FLOAT8 | CACHED)
    yield Change("or a float8 rollout with a Taylor cache", "yes", whole(coarse))
    yield Change("and fused kernels, one launch", "no", whole(coarse) - one_launch(coarse) - fused(coarse))


def of_changes() -> Iterator[str]:
    yield "| one H200 | there? | arithmetic at full speed, s | estimate, s | measured, s |"
    yield "|---|---|---|---|---|"
    for name, there, seconds, case in changes():
        yield f"| {name} | {there} | {seconds.floor:.2f} | {seconds.estimate:.1f} | {measured(case, 'prompt')} |"


def of_scaling() -> Iterator[str]:
    """Float32 weights and retained graphs, with one prompt on each H100."""
    sharded = RETAINED | {
        "parallel.master_dtype": "float32",
        "optimizer.name": "adamw",
        "parallel.text_encoders": "shard",  # what makes room on eight
    }
    yield "| H100 | weights | gathers, s | sums of gradients, s | waiting, s | estimate, s | measured, s |"
    yield "|---|---|---|---|---|---|---|"
    for count in (8, 32, 128, 1024):
        for sharding in ("full", "hybrid") if count > 8 else ("full",):
            plan = make_plan(target({**sharded, "parallel.sharding": sharding}), H100, count)
            assert plan.seconds
            assert plan.fits
            found = plan.seconds
            cells = (f"{each:.2f}" for each in (found.gathers, found.reductions, found.waiting))
            where = f"sharded over {plan.layout.shares:,}" + f", {plan.layout.copies} copies" * (plan.layout.copies > 1)
            yield f"| {count:,} | {where} | {' | '.join(cells)} | {found.estimate:.1f} | |"


TABLES = {"estimates by part": by_part, "estimates of changes": of_changes, "estimates of scaling": of_scaling}


def page(text: str, *names: str) -> str:
    """The page with these tables made anew."""
    for name in names:
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text = "\n".join([text.split(begin)[0] + begin, *TABLES[name](), end + text.split(end)[1]])
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), *TABLES))
