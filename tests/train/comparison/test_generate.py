"""Pictures of a gallery: the base model's last steps against loops written out, and what is made in which batch."""

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from ngrpo_train.comparison import generate
from ngrpo_train.comparison.gallery import Gallery
from ngrpo_train.comparison.generate import base_tail, generate_missing
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.picture_files import read_picture
from ngrpo_train.recipe.sections import Evaluation, Recipe, Sampling
from ngrpo_train.sampling.pictures import pictures
from ngrpo_train.sampling.rollout import generate as solve
from ngrpo_train.sampling.solvers import dpmpp_2m_step, flow_sigmas

PROMPTS = ["a dog", "a large red circle on a blue background"]
STEPS, SHIFT = 5, 3.0


@pytest.fixture(params=["full", "lora"])
def two_models(request, tiny_dev, load_flux):
    """Loads one that was trained, by a solver, with diffusers' own transformers of it and of its base."""

    def load(solver="euler", **changes):
        flux = load_flux(tiny_dev, tuning=request.param, solver=solver, num_inference_steps=STEPS, **changes)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in flux.trainable.items():
                if parameter.ndim == 2 and ".lora_A." not in name:
                    processes.local(parameter).add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        base = FluxTransformer2DModel.from_pretrained(tiny_dev, subfolder="transformer")
        trained = FluxTransformer2DModel.from_pretrained(tiny_dev, subfolder="transformer")
        trained.load_state_dict(merged(flux.transformer))
        return flux, base, trained

    return load


def merged(transformer):
    """Weights with what LoRA's adapters add (alpha 4 over rank 4: once)."""
    state = {name: processes.whole(value) for name, value in transformer.state_dict().items()}
    weights = {name.replace(".base_layer", ""): value.clone() for name, value in state.items() if ".lora_" not in name}
    for name, value in state.items():
        if ".lora_A." in name:
            weights[name.replace("lora_A.default.", "")] += state[name.replace(".lora_A.", ".lora_B.")] @ value
    return weights


def noise_of(flux, slots=(0, 1)):
    """As every evaluation ever made has drawn it: the hash of its seed, of 0 and of the picture's place."""
    draws = []
    for slot in slots:
        digest = hashlib.blake2b(f"251116955/0/{slot}/evaluation".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        draws.append(torch.randn(flux.latent_shape, generator=generator))
    return torch.stack(draws)


@torch.no_grad()
def by_hand(flux, trained, base, tail_steps, solver, slots=(0, 1)):
    """The last state [N, T, C]: every step written out, the model chosen by counting."""
    sigmas = flow_sigmas(STEPS, SHIFT)
    embeds, pooled, txt_ids = flux.adapter.pipeline.encode_prompt(PROMPTS, None, max_sequence_length=16)
    ids = FluxPipeline._prepare_latent_image_ids(1, 2, 2, "cpu", torch.float32)
    x, previous = noise_of(flux, slots), None
    for index in range(STEPS):
        model = trained if index < STEPS - tail_steps else base
        velocity = model(
            hidden_states=x,
            timestep=sigmas[index].expand(2),
            guidance=torch.full((2,), 3.5),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            txt_ids=txt_ids,
            img_ids=ids,
        ).sample
        if solver == "euler":
            x = x + (sigmas[index + 1] - sigmas[index]) * velocity
        else:
            x, previous = dpmpp_2m_step(x, velocity, sigmas, index, previous)
    return x


def solved(flux, tail):
    for step in solve(flux, noise_of(flux), flux.encode(PROMPTS), flow_sigmas(STEPS, SHIFT), tail=tail):
        last = step.after_NS
    return last


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_the_last_steps_are_the_base_models(two_models, solver):
    flux, base, trained = two_models(solver)
    ends = {}
    for tail_steps in (0, 1, 2, STEPS):
        ends[tail_steps] = solved(flux, base_tail(flux, flux.spec, tail_steps))
        want = by_hand(flux, trained, base, tail_steps, solver)
        torch.testing.assert_close(ends[tail_steps], want, rtol=0, atol=2e-5 * want.abs().max().item())
    for one, other in ((0, 1), (1, 2), (2, STEPS)):
        assert (ends[one] - ends[other]).abs().max() > 1e-3, "they can be told apart"


def test_a_pictures_noise_is_that_of_its_place(two_models):
    flux, base, trained = two_models()
    images = pictures(flux, Recipe(sampling=flux.sampling), PROMPTS, [7, 4]).int()
    want = flux.decode(by_hand(flux, trained, base, 0, "euler", slots=(7, 4))).int()
    assert (images - want).abs().max() <= 1, "rounded"
    assert (images - want.flip(0)).abs().max() > 10


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_without_a_tail_or_with_nothing_else_it_is_one_model_bitwise(tiny_dev, load_flux, two_models, compute_dtype):
    flux, _, _ = two_models(compute_dtype=compute_dtype)
    recipe = Recipe(sampling=flux.sampling)
    base = load_flux(tiny_dev, num_inference_steps=STEPS, solver="euler", compute_dtype=compute_dtype)
    own, bases = (pictures(each, recipe, PROMPTS, [0, 1]) for each in (flux, base))
    assert not torch.equal(own, bases)
    assert base_tail(flux, flux.spec, 0) is None
    assert torch.equal(pictures(flux, recipe, PROMPTS, [0, 1], base_tail(flux, flux.spec, STEPS)), bases)
    assert torch.equal(pictures(flux, recipe, PROMPTS, [0, 1]), own), "the adapters are on again"


def test_a_lora_over_another_base_brings_that_base_along(tiny_dev, tiny_schnell, load_flux):
    """Switching its adapters off would give its own base."""
    lora = load_flux(tiny_dev, tuning="lora", num_inference_steps=STEPS)
    schnell = load_flux(tiny_dev, transformer=tiny_schnell, num_inference_steps=STEPS)
    recipe = Recipe(sampling=lora.sampling)
    tail = base_tail(lora, replace(lora.spec, name_or_path=tiny_schnell), STEPS)
    beside = pictures(lora, recipe, PROMPTS, [0, 1], tail)
    assert not torch.equal(beside, pictures(lora, recipe, PROMPTS, [0, 1]))
    assert tail.sampler.transformer.config.guidance_embeds is False
    assert torch.equal(beside, pictures(schnell, recipe, PROMPTS, [0, 1])), "with the encoders and VAE of its own"


# --- which pictures are made, and with which others


@pytest.fixture
def gallery(tmp_path):
    """Ten pictures of five prompts; batches of four: 0-3, 4-7, 8-9."""
    return Gallery.claim(tmp_path / "gallery", {}, [Prompt(f"prompt {i}") for i in range(5)], 2)


@pytest.fixture
def made(monkeypatch):
    """The batches that were computed, as (slots, prompts)."""
    batches = []

    def fake(flux, recipe, prompts, slots, tail):
        batches.append((list(slots), prompts))
        return torch.stack([torch.full((3, 2, 2), slot, dtype=torch.uint8) for slot in slots])

    monkeypatch.setattr(generate, "pictures", fake)
    return batches


MODEL = SimpleNamespace(frame_rate=16.0)
RECIPE = Recipe(evaluation=Evaluation(batch=4), sampling=Sampling())


def test_batches_are_cut_alike_whatever_is_there(gallery, made):
    for slot in (0, 1, 2, 3, 5, 7):
        gallery.save(slot, torch.full((3, 2, 2), 200, dtype=torch.uint8), MODEL.frame_rate)
    generate_missing(MODEL, RECIPE, gallery, "x")
    prompts = [Prompt(f"prompt {slot // 2}") for slot in range(10)]
    assert made == [([4, 5, 6, 7], prompts[4:8]), ([8, 9], prompts[8:])]
    assert gallery.missing() == []
    values = [read_picture(picture.file).unique().tolist() for picture in gallery.pictures()]
    assert values == [[200]] * 4 + [[4], [200], [6], [200], [8], [9]], "those that were there are left"
    generate_missing(MODEL, RECIPE, gallery, "x")
    assert len(made) == 2


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_processes_make_as_many_batches_each_and_save_a_picture_once(gallery, made, monkeypatch, ranks):
    """Each in turn, having looked before any wrote."""
    saved = []
    monkeypatch.setattr(processes, "world_size", lambda: ranks)
    monkeypatch.setattr(processes, "barrier", lambda: None)
    monkeypatch.setattr(Gallery, "missing", lambda self: list(range(10)))
    monkeypatch.setattr(Gallery, "save", lambda self, slot, image, _: saved.append((slot, image.unique().tolist())))
    counts = []
    for rank in range(ranks):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        generate_missing(MODEL, RECIPE, gallery, "x")
        counts.append(len(made) - sum(counts))
    assert set(counts) == {-(-3 // ranks)}
    assert {tuple(slots) for slots, _ in made} == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)}
    assert sorted(saved) == [(slot, [slot]) for slot in range(10)]
