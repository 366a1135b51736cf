"""Groups that are chosen by coarse pictures: how these are drawn, and that what is trained on is drawn exactly."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from ngrpo_train.algorithms import make_algorithm
from ngrpo_train.algorithms.choice import Choice
from ngrpo_train.algorithms.neighbor import Neighborhoods, explored
from ngrpo_train.draws import draw_anchors, draw_train_steps
from ngrpo_train.models.coarse import enlarged, refuse_scale
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt, PromptCursor
from ngrpo_train.recipe.algorithms import Neighbor
from ngrpo_train.recipe.explore import Explore
from ngrpo_train.recipe.sections import Model, Parallel, Prompts, Recipe, Reward, Sampling, Train
from ngrpo_train.rewards import Rewards, Scores
from ngrpo_train.run.metrics import reward_figures
from ngrpo_train.run.stopwatch import Stopwatch
from ngrpo_train.run.trainer import Trainer
from ngrpo_train.sampling.coarse import coarse_pictures
from ngrpo_train.sampling.perturb import neighborhood
from ngrpo_train.sampling.solvers import flow_sigmas

from ...tiny import PROMPTS, SIZE

CPU = torch.device("cpu")
C, G, B, K, COARSE = 6, 4, 2, 2, 2
TWO = [Prompt(PROMPTS[0], 0), Prompt(PROMPTS[1], 1)]


def recipe_of(model: str, scale: float = 1.0, stream: str = "off", **sampling: Any) -> Recipe:
    explore = Explore(candidates=C, num_inference_steps=COARSE, scale=scale, middle=1)
    return Recipe(
        model=Model(name_or_path=model, gradient_checkpointing="none"),
        prompts=Prompts(source="any", per_rank=1),
        sampling=Sampling(
            **{"height": SIZE, "width": SIZE, "max_sequence_length": 16, "num_inference_steps": 4} | sampling
        ),
        algorithm=Neighbor(
            num_generations=G, num_anchors=B, num_train_steps=K, step_range=(0.0, 0.75), sigma=1.0, explore=explore
        ),
        rewards={"brightness": Reward(path="tiny_scorers:brightness"), "redness": Reward(path="tiny_scorers:redness")},
        train=Train(gradient_accumulation_steps=2),
        # A batch of rows is a prompt's, so that both ways of streaming add the same numbers in the same order.
        parallel=Parallel(device="cpu", compute_dtype="float32", stream=stream, update_batch=B * K),
    )


def mean_scores(images: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """One reward, the mean of a picture."""
    scores = images.float().mean((1, 2, 3)).view(1, len(prompts), -1)
    return Scores(("mean",), ("mean",), (1.0,), scores)


@torch.no_grad()
def drawn_alone(flux: FlowModel, prompt: Prompt, noise_S: Tensor) -> Tensor:
    """The coarse picture of one candidate, by a loop of Euler's steps. Two steps of DPM-Solver++ are these."""
    sigmas, x = flow_sigmas(COARSE, flux.sampling.shift), noise_S[None]
    for here, there in pairwise(sigmas):
        x = x + (there - here) * flux.velocity(x, here[None], flux.encode([prompt]))
    return flux.decode(x)[0]


def test_the_kept_are_drawn_again_exactly(tiny_dev: str, load_flux: Callable[..., FlowModel]) -> None:
    """Each prompt's best, worst and middle candidates by pictures drawn one by one; what is explored are these noises,
    solved as ever, to the bit.
    """
    flux, recipe = load_flux(tiny_dev), recipe_of(tiny_dev)
    algorithm = make_algorithm(replace(recipe, prompts=replace(recipe.prompts, per_rank=2)))
    choice: Choice = algorithm.choose(flux, TWO, 3, mean_scores)
    draws = [{"seed": 0, "step": 3, "slot": prompt.slot} for prompt in TWO]
    noise_PCS = torch.stack([neighborhood(flux.latent_shape, C, 1.0, **draw) for draw in draws])
    for p, prompt in enumerate(TWO):
        means = torch.stack([drawn_alone(flux, prompt, noise_S).float().mean() for noise_S in noise_PCS[p]])
        torch.testing.assert_close(choice.scores.all_RPG[0, p], means, atol=0.01, rtol=0)
        order = means.argsort(descending=True)
        assert sorted([*order[:2], order[3], order[5]]) == choice.kept_PG[p].tolist()

    groups: Neighborhoods = algorithm.explore(flux, TWO, 3, choice)
    steps = torch.stack([draw_train_steps((0, 3), K, **draw) for draw in draws])
    anchors = torch.stack([draw_anchors(G, B, **draw) for draw in draws])
    kept_PGS = torch.stack([noise_CS[kept] for noise_CS, kept in zip(noise_PCS, choice.kept_PG, strict=True)])
    truth = explored(flux, TWO, kept_PGS, flow_sigmas(4, flux.sampling.shift), steps, anchors)
    for name in ("latents_PKBS", "candidates_PKGS", "velocity_PKBS", "final_PGS", "anchor_PB", "step_PK"):
        assert torch.equal(getattr(groups, name), getattr(truth, name)), name


# --- at a lower resolution


def test_coarse_noise_is_standard_normal_and_of_the_same_picture(
    tiny_dev: str, load_flux: Callable[..., FlowModel]
) -> None:
    """Latents of diffusers' own packing: each of the small ones is twice the mean of its four, of variance 1."""
    flux = load_flux(tiny_dev, height=2 * SIZE, width=4 * SIZE)
    noise_NCHW = torch.randn(64, 16, 8, 16, generator=torch.Generator().manual_seed(0))
    small = flux.coarser(2)
    averaged_NS = flux.averaged(FluxPipeline._pack_latents(noise_NCHW, *noise_NCHW.shape), 2)
    assert averaged_NS.shape[1:] == small.latent_shape == (8, 64)
    theirs = FluxPipeline._unpack_latents(averaged_NS, SIZE, 2 * SIZE, 8)
    blocks = noise_NCHW.unflatten(3, (8, 2)).unflatten(2, (4, 2)).sum((3, 5)) / 2
    torch.testing.assert_close(theirs, blocks)
    count = blocks.numel()
    assert abs(theirs.mean()) < 5 / count**0.5
    assert abs(theirs.var() - 1) < 5 * (2 / count) ** 0.5


def test_coarse_pictures_are_those_of_a_smaller_model(tiny_dev: str, load_flux: Callable[..., FlowModel]) -> None:
    """Enlarged to the size that scorers are given; the large model is as it was."""
    flux, small = load_flux(tiny_dev, height=2 * SIZE, width=2 * SIZE), load_flux(tiny_dev)
    noise_PCS = torch.randn(2, 3, *flux.latent_shape, generator=torch.Generator().manual_seed(0))
    how = Explore(candidates=3, num_inference_steps=COARSE, scale=0.5)
    pictures = coarse_pictures(flux, TWO, noise_PCS, how, flux.sampling.shift)
    assert pictures.shape == (6, 3, 2 * SIZE, 2 * SIZE)
    noise_NS = flux.averaged(noise_PCS.flatten(0, 1), 2)
    theirs = coarse_pictures(small, TWO, noise_NS.view(2, 3, -1, 64), replace(how, scale=1.0), flux.sampling.shift)
    assert torch.equal(pictures, enlarged(theirs, 2))
    assert flux.sampling.height == 2 * SIZE
    assert flux.decode(noise_PCS.flatten(0, 1)).shape[-1] == 2 * SIZE


def test_a_scale_that_cannot_be_had_is_refused(tiny_dev: str) -> None:
    sampling = Sampling(height=720, width=720)
    with pytest.raises(ValueError, match=r"^algorithm\.explore\.scale = 0\.5 of sampling\.height = 720 must be a mult"):
        refuse_scale(Model(name_or_path="black-forest-labs/FLUX.1-dev"), sampling, 0.5)
    refuse_scale(Model(name_or_path="black-forest-labs/FLUX.1-dev"), Sampling(height=1024, width=768), 0.25)


def test_an_adapter_without_other_sizes_is_refused(tiny_dev: str, load_flux: Callable[..., FlowModel]) -> None:
    flux = load_flux(tiny_dev)
    flux.adapter = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^algorithm\.explore\.scale = 0\.5 needs an adapter that draws other sizes"):
        flux.coarser(2)


# --- an iteration


def trainer_of(recipe: Recipe) -> Trainer:
    cursor = PromptCursor.of(recipe, [Prompt(text) for text in PROMPTS[:2]], 0, 1)
    return Trainer.make(recipe, recipe.parallel, cursor, Rewards(recipe.rewards), CPU, Stopwatch(CPU))


def test_streamed_iterations_choose_as_whole_ones(tiny_dev: str, scorers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same choice, the same pictures, the same weights, to the bit; figures count the exact rewards.

    As with rewards from other machines, a part is explored before the one before it is trained on.
    """
    monkeypatch.syspath_prepend(scorers)
    monkeypatch.setattr(Rewards, "waits_for_others", property(lambda self: True))
    streamed, whole = (trainer_of(recipe_of(tiny_dev, stream=stream)) for stream in ("on", "off"))
    assert streamed.prompts_per_part == 1
    for _ in range(2):
        mine, other = streamed.iterate(), whole.iterate()
        assert mine.choice is not None
        assert other.choice is not None
        assert torch.equal(mine.choice.kept_PG, other.choice.kept_PG)
        assert torch.equal(mine.choice.scores.all_RPG, other.choice.scores.all_RPG)
        assert torch.equal(mine.final_PGS, other.final_PGS)
        assert mine.choice.figures(mine.scores).keys() >= {"explore/coarse_reward_mean", "explore/rank_correlation"}
        images = whole.model.decode(other.final_PGS.flatten(0, 1))
        exact = whole.rewards(images, other.prompts)
        assert reward_figures(mine.scores) == reward_figures(exact)
    for a, b in zip(streamed.model.trainable.values(), whole.model.trainable.values(), strict=True):
        assert torch.equal(processes.local(a), processes.local(b))
    assert {"time/coarse_s", "time/rollout_s"} <= whole.stage.read().keys()
