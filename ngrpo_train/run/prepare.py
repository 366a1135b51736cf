"""Checks before any work: a recipe that cannot be trained is refused while there is nothing to lose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from ngrpo_train.algorithms import refuse_backend
from ngrpo_train.models.coarse import refuse_scale
from ngrpo_train.models.embeddings import EmbeddingCache
from ngrpo_train.models.needs import refuse_without_pictures
from ngrpo_train.models.packing import refuse_size
from ngrpo_train.parallel import blocks, sharding
from ngrpo_train.plan.layout import refuse_retaining
from ngrpo_train.plan.settle import settle_attention
from ngrpo_train.prompts import Prompt, PromptCursor, load_prompts
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.rewards import Rewards
from ngrpo_train.run.checkpoint import read_record, refuse_unlike


@dataclass(frozen=True, slots=True)
class Prepared:
    """The parts that training needs, but for the model. `validation` and `test` are empty if nothing is evaluated."""

    recipe: Recipe  # with the attention backend settled
    prompts: list[Prompt]
    validation: list[Prompt]
    test: list[Prompt]
    cursor: PromptCursor
    rewards: Rewards
    resume_from: Path | None  # a checkpoint


def prepare(
    recipe: Recipe, launch: PartialState, *, evaluates: bool = False, resume_from: Path | None = None
) -> Prepared:
    """Read, load and check everything that training by a recipe needs, except for the model.

    With `evaluates`, also the prompts for validation and test; with `resume_from`, also a checkpoint's record. Raises
    ValueError, naming the field, for settings, prompts, their pictures, embeddings, rewards, a backend or a checkpoint
    that cannot be used.
    """
    check(recipe, launch.num_processes)
    refuse_retaining(recipe, launch.num_processes, sharding.node_size())
    refuse_size(recipe.model, recipe.sampling)
    refuse_scale(recipe.model, recipe.sampling, recipe.workload().coarse_scale)
    prompts, evaluation = load_prompts(recipe.prompts.source), recipe.evaluation
    cursor = PromptCursor.of(recipe, prompts, launch.process_index, launch.num_processes)
    validation: list[Prompt] = []
    test: list[Prompt] = []
    if evaluates and evaluation.validation:
        validation = load_prompts(evaluation.validation, "evaluation.validation")
    if evaluates and evaluation.test:
        test = load_prompts(evaluation.test, "evaluation.test")
    refuse_without_pictures(
        recipe.model, {"prompts.source": prompts, "evaluation.validation": validation, "evaluation.test": test}
    )
    if recipe.prompts.embeddings:
        # When the model loads, it is checked that its own encoders made them.
        directory = Path(recipe.prompts.embeddings).expanduser()
        EmbeddingCache(directory, recipe.sampling, launch.device).refuse_missing([*prompts, *validation, *test])
    rewards = Rewards(recipe.rewards, launch.device)
    rewards.check(prompts, "prompts.source", rewards.in_training)
    rewards.check(validation, "evaluation.validation")
    rewards.check(test, "evaluation.test")
    refuse_backend(recipe.algorithm, launch.device)
    blocks.refuse(recipe.model, recipe.parallel, launch.device)
    kept = read_record(resume_from)["recipe"]["parallel"].get("attention", "") if resume_from else ""
    recipe = settle_attention(recipe, launch.device, kept)
    if resume_from:
        refuse_unlike(resume_from, recipe, cursor)
    return Prepared(recipe, prompts, validation, test, cursor, rewards, resume_from)
