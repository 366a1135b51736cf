"""Neighborhoods against a loop of one picture at a time, by diffusers' own schedulers and transformer."""

from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline

from ngrpo_train.algorithms import make_algorithm
from ngrpo_train.algorithms.neighbor import Neighborhoods, explored
from ngrpo_train.draws import draw_anchors, draw_train_steps
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.algorithms import Neighbor
from ngrpo_train.recipe.sections import Prompts, Recipe, Reward, Sampling
from ngrpo_train.sampling.perturb import neighborhood
from ngrpo_train.sampling.solvers import flow_sigmas

P, G, B, K, STEPS, SHIFT = 2, 3, 2, 2, 6, 3.0
PROMPTS = [Prompt("a large red circle on a blue background", 0), Prompt("a dog", 1)]
STEP_PK = torch.tensor([[0, 3], [2, 5]])  # the first step, the last, and both second-order ones
ANCHOR_PB = torch.tensor([[2, 0], [1, 2]])
STATES = ("latents_PKBS", "candidates_PKGS", "velocity_PKBS", "final_PGS")


def noise_of(flux):
    draws = [neighborhood(flux.latent_shape, G, 0.5, seed=3, step=1, slot=prompt.slot) for prompt in PROMPTS]
    return torch.stack(draws)


def exploration(flux):
    return explored(flux, PROMPTS, noise_of(flux), flow_sigmas(STEPS, SHIFT), STEP_PK, ANCHOR_PB)


def scheduler_of(solver, sigmas):
    if solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    else:
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", algorithm_type="dpmsolver++", solver_order=2
        )
        scheduler.set_timesteps(STEPS)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    return scheduler


@torch.no_grad()
def trajectory(pipeline, solver, noise_S, prompt):
    """One picture's states [STEPS + 1, T, C] and velocities [STEPS, T, C]."""
    sigmas = flow_sigmas(STEPS, SHIFT)
    scheduler = scheduler_of(solver, sigmas)
    embeds, pooled, txt_ids = pipeline.encode_prompt(prompt, None, max_sequence_length=16)
    ids = FluxPipeline._prepare_latent_image_ids(1, 2, 2, "cpu", torch.float32)
    states, velocities = [noise_S[None]], []
    for index in range(STEPS):
        velocity = pipeline.transformer(
            hidden_states=states[-1],
            timestep=sigmas[index][None],
            guidance=torch.tensor([3.5]),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            txt_ids=txt_ids,
            img_ids=ids,
        ).sample
        velocities.append(velocity)
        states.append(scheduler.step(velocity, scheduler.timesteps[index], states[-1], return_dict=False)[0])
    return torch.cat(states), torch.cat(velocities)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_equals_a_loop_with_diffusers(tiny_dev, load_flux, solver):
    flux = load_flux(tiny_dev, solver=solver)
    groups = exploration(flux)
    pipeline = FluxPipeline.from_pretrained(tiny_dev, local_files_only=True)
    noise = noise_of(flux)
    alone = [[trajectory(pipeline, solver, noise[p, g], PROMPTS[p].text) for g in range(G)] for p in range(P)]

    sigmas = flow_sigmas(STEPS, SHIFT)
    for p in range(P):
        for g in range(G):
            assert_close(groups.final_PGS[p, g], alone[p][g][0][-1])
        for k, step in enumerate(STEP_PK[p].tolist()):
            assert groups.sigma_before_PK[p, k] == sigmas[step]
            assert groups.sigma_after_PK[p, k] == sigmas[step + 1]
            for g in range(G):
                assert_close(groups.candidates_PKGS[p, k, g], alone[p][g][0][step + 1])
            for b, anchor in enumerate(ANCHOR_PB[p].tolist()):
                states, velocities = alone[p][anchor]
                assert_close(groups.latents_PKBS[p, k, b], states[step])
                assert_close(groups.velocity_PKBS[p, k, b], velocities[step])
    assert {getattr(groups, name).dtype for name in STATES} == {torch.float32}


def assert_close(ours, theirs):
    """Up to float32 noise, which six steps of a random model amplify; other pictures are a hundred times further."""
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_chunks_change_nothing_but_noise(tiny_dev, load_flux, chunk):
    whole, chunked = exploration(load_flux(tiny_dev)), exploration(load_flux(tiny_dev, rollout_batch=chunk))
    for name in STATES:
        assert_close(getattr(chunked, name), getattr(whole, name))


def test_keeps_no_graph(tiny_dev, load_flux):
    groups = exploration(load_flux(tiny_dev))
    assert not any(getattr(groups, name).requires_grad for name in STATES)


# --- the algorithm's exploration


def recipe_of(per_rank):
    return Recipe(
        prompts=Prompts(per_rank=per_rank),
        sampling=Sampling(num_inference_steps=STEPS, shift=SHIFT),
        algorithm=Neighbor(num_generations=G, num_anchors=B, num_train_steps=K, step_range=(0.0, 5 / 6), sigma=0.5),
        rewards={"shapes_verifier": Reward()},
    )


def algorithm_of(recipe):
    return make_algorithm(recipe)


def test_explore_draws_by_seed_step_and_slot(tiny_dev, load_flux):
    """Whatever shares the batch: a prompt alone explores what it explores beside others."""
    flux = load_flux(tiny_dev)
    algorithm = algorithm_of(recipe_of(per_rank=2))
    together = algorithm.explore(flux, PROMPTS, step=7)
    alone = algorithm.explore(flux, PROMPTS[1:], step=7)
    draw = {"seed": 0, "step": 7, "slot": 1}
    assert torch.equal(together.anchor_PB[1], draw_anchors(G, B, **draw))
    assert torch.equal(together.step_PK[1], draw_train_steps((0, 5), K, **draw))
    assert torch.equal(alone.anchor_PB[0], together.anchor_PB[1])
    assert torch.equal(alone.step_PK[0], together.step_PK[1])
    for name in STATES:
        assert_close(getattr(alone, name)[0], getattr(together, name)[1])
    other = algorithm.explore(flux, PROMPTS[1:], step=8)
    assert (other.final_PGS - alone.final_PGS).abs().max() > 0.1


def test_accumulated_batches_are_one_exploration(tiny_dev, load_flux):
    flux = load_flux(tiny_dev)
    at_once = algorithm_of(recipe_of(per_rank=2)).explore(flux, PROMPTS, step=0)
    in_turn = algorithm_of(recipe_of(per_rank=1)).explore(flux, PROMPTS, step=0)
    for name in Neighborhoods.__dataclass_fields__:
        if isinstance(value := getattr(at_once, name), torch.Tensor):
            assert getattr(in_turn, name).shape == value.shape
            assert_close(getattr(in_turn, name).float(), value.float())
    assert_close(in_turn.conditioning.prompt_embeds, at_once.conditioning.prompt_embeds)
    assert_close(in_turn.conditioning.pooled, at_once.conditioning.pooled)


def test_sigma_one_explores_independent_noises(tiny_dev, load_flux):

    recipe = recipe_of(per_rank=2)
    recipe = replace(recipe, algorithm=replace(recipe.algorithm, sigma=1.0))
    final = algorithm_of(recipe).explore(load_flux(tiny_dev), PROMPTS, step=0).final_PGS
    assert torch.pdist(final.flatten(2)[0]).min() > 1
