"""The pictures of a gallery that are still missing, shared out over processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ngrpo_train.comparison.gallery import Gallery
from ngrpo_train.models.model import Conditioning, FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.parallel.progress import progress
from ngrpo_train.recipe.sections import Model, Recipe
from ngrpo_train.sampling.pictures import pictures
from ngrpo_train.sampling.rollout import Tail


def generate_missing(model: FlowModel, recipe: Recipe, gallery: Gallery, what: str, tail: Tail | None = None) -> None:
    """A collective: every process makes as many batches as every other, for a sharded forward needs them all."""
    missing = set(gallery.missing())
    processes.barrier()  # all have looked before one of them writes
    if not missing:
        return
    # A picture's last bits depend on those computed with it: batches are cut alike, whatever is there already and
    # however many processes share them.
    batch = recipe.evaluation.batch or 8
    every = [range(start, min(start + batch, len(gallery))) for start in range(0, len(gallery), batch)]
    batches = [slots for slots in every if not missing.isdisjoint(slots)]
    ranks, rank = processes.world_size(), processes.rank()
    places = range(rank, -(-len(batches) // ranks) * ranks, ranks)
    mine = [batches[place % len(batches)] for place in places]
    with progress(f"{what}: pictures", sum(map(len, mine))) as advance:
        for place, slots in zip(places, mine, strict=True):
            images = pictures(model, recipe, [gallery.prompt(slot).text for slot in slots], slots, tail).cpu()
            if place < len(batches):  # the rest is another process's, made only because all must make as many
                for slot, image in zip(slots, images, strict=True):
                    if slot in missing:
                        gallery.save(slot, image)
            advance(len(slots))
    processes.barrier()


def base_tail(model: FlowModel, base: Model, steps: int) -> Tail | None:
    """The base model for the last `steps` solver steps: LoRA's adapters off, else its own transformer beside."""
    if steps == 0:
        return None
    is_own_base = model.spec.tuning == "lora" and replace(model.spec, tuning="full") == replace(base, tuning="full")
    return Tail(_WithoutAdapters(model) if is_own_base else model.beside(base), steps)


@dataclass(frozen=True, slots=True)
class _WithoutAdapters:
    model: FlowModel

    def sampling_velocity(
        self, x_NTC: Tensor, sigma_N: Tensor, conditioning: Conditioning, *, explore: bool = False
    ) -> Any:
        with self.model.base_model():
            return self.model.sampling_velocity(x_NTC, sigma_N, conditioning, explore=explore)
