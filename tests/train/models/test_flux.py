"""The model against stock diffusers: text, velocity, whole samplings, LoRA's layers; and models that cannot be had."""

import json
import math
import re
import shutil
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.autoencoders.vae import AutoencoderMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch import nn

from ngrpo_train.models.loading import decode_in_tiles
from ngrpo_train.sampling.rollout import generate
from ngrpo_train.sampling.solvers import flow_sigmas
from ngrpo_train.worlds import pipeline_dir

from ..oracles import stock_pictures

TOKENS = 4  # of a tiny picture
DEV_SHIFT = math.exp(calculate_shift(TOKENS))  # what FLUX.1-dev's dynamic shifting comes to at this size
PROMPTS = ["a large red circle on a blue background", "a dog", "two cats on a mat"]


def stock(directory):
    pipeline = FluxPipeline.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sampled(flux, noise, sigmas):
    """Pictures of PROMPTS from `noise` by our solver and decoder."""
    conditioning = flux.encode(PROMPTS)
    for step in generate(flux, noise, conditioning, sigmas):
        latents = step.after_NS
    return flux.decode(latents)


# --- against stock diffusers


@pytest.mark.parametrize("steps", [8, 28])
def test_sampling_equals_stock_on_the_shapes_pipeline(load_flux, steps):
    flux = load_flux(
        "shapes", solver="euler", height=64, width=64, shift=3.0, num_inference_steps=steps, guidance_scale=2.0
    )
    noise = torch.randn(3, *flux.latent_shape, generator=torch.Generator().manual_seed(1))
    ours = sampled(flux, noise, flow_sigmas(steps, 3.0))
    theirs = stock(pipeline_dir("shapes"))(
        PROMPTS,
        height=64,
        width=64,
        max_sequence_length=16,
        num_inference_steps=steps,
        guidance_scale=2.0,
        latents=noise,
        output_type="pt",
    ).images
    assert_same_pictures(ours, theirs)


@pytest.mark.parametrize("solver", ["euler", "ddim"])
@pytest.mark.parametrize("model, shift", [("tiny_dev", DEV_SHIFT), ("tiny_schnell", 1.0)])
def test_sampling_equals_stock_on_dev_and_schnell(request, load_flux, model, shift, solver):
    directory = request.getfixturevalue(model)
    flux = load_flux(directory, solver=solver, guidance_scale=3.5, decode_batch=2)
    noise = torch.randn(3, *flux.latent_shape, generator=torch.Generator().manual_seed(2))
    ours = sampled(flux, noise, flow_sigmas(4, shift))
    pictures = stock_pictures(stock(directory), PROMPTS, noise, size=32)
    assert_same_pictures(ours, pictures)


def assert_same_pictures(ours, theirs):
    """Ours are uint8, theirs floats in [0, 1] that `numpy_to_pil` would round: at most a few pixels by one level."""
    theirs = (theirs * 255).round()
    assert theirs.std() > 5, "these pictures could not tell"
    difference = (ours.float() - theirs).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


@torch.no_grad()
def test_large_pictures_are_decoded_in_the_vaes_tiles(tiny_dev, load_flux, monkeypatch):
    """A tile is 32 pixels a side: a picture of that size is decoded as ever, a larger one as diffusers' VAE does it."""
    theirs = stock(tiny_dev)
    theirs.vae.enable_tiling()
    for size, tiles in ((32, 1), (64, 9)):
        flux = load_flux(tiny_dev, height=size, width=size, decode_tiles=True)
        seen, decoder = [], flux.adapter.pipeline.vae.decoder
        monkeypatch.setattr(
            decoder, "forward", lambda z, *a, f=decoder.forward, s=seen: s.append(z.shape[-2:]) or f(z, *a)
        )
        latents = torch.randn(2, *flux.latent_shape, generator=torch.Generator().manual_seed(0))
        pictures = flux.decode(latents)
        assert len(seen) == tiles
        assert all(max(shape) <= 32 // 8 for shape in seen)
        assert torch.equal(pictures, as_pictures(theirs, latents, size))
        whole = load_flux(tiny_dev, height=size, width=size).decode(latents)
        assert torch.equal(pictures, whole) == (tiles == 1)


def as_pictures(pipeline, latents, size):
    config = pipeline.vae.config
    latents = FluxPipeline._unpack_latents(latents, size, size, pipeline.vae_scale_factor)
    decoded = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    return (pipeline.image_processor.postprocess(decoded, output_type="pt") * 255).round().to(torch.uint8)


def test_a_vae_without_tiles_is_refused():
    class AutoencoderWhole(nn.Module):
        pass

    with pytest.raises(
        ValueError, match=r"^parallel\.decode_tiles = True: the model's AutoencoderWhole cannot decode in"
    ):
        decode_in_tiles(AutoencoderWhole())
    with pytest.raises(ValueError, match=r"AutoencoderVidTokWhole cannot"):
        decode_in_tiles(type("AutoencoderVidTokWhole", (AutoencoderMixin,), {})())


def test_encode_is_the_pipelines(tiny_dev, load_flux):
    flux = load_flux(tiny_dev)
    with torch.no_grad():
        embeds, pooled, txt_ids = stock(tiny_dev).encode_prompt(PROMPTS, None, max_sequence_length=16)
    conditioning = flux.encode(PROMPTS)
    assert conditioning.prompt_embeds.shape == (3, 16, 16)
    assert torch.equal(conditioning.prompt_embeds, embeds)
    assert torch.equal(conditioning.pooled, pooled)
    assert torch.equal(conditioning.txt_ids, txt_ids)


def test_rows_repeat_prompts(tiny_dev, load_flux):
    flux = load_flux(tiny_dev)
    rows = flux.encode(PROMPTS).rows(torch.tensor([2, 0, 2]))
    for i, prompt in enumerate([PROMPTS[2], PROMPTS[0], PROMPTS[2]]):
        alone = flux.encode([prompt])
        torch.testing.assert_close(rows.prompt_embeds[i], alone.prompt_embeds[0])
        torch.testing.assert_close(rows.pooled[i], alone.pooled[0])


@pytest.mark.parametrize("model, feels", [("tiny_dev", True), ("tiny_schnell", False)])
def test_guidance_reaches_only_models_that_embed_it(request, load_flux, model, feels):
    x, sigma = torch.randn(2, TOKENS, 64, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.6)
    velocities = []
    for scale in (1.0, 5.0):
        flux = load_flux(request.getfixturevalue(model), guidance_scale=scale)
        with torch.no_grad():
            velocities.append(flux.velocity(x, sigma, flux.encode(PROMPTS[:2])))
    assert torch.equal(*velocities) is not feels


# --- what is trained


def test_full_tuning_trains_every_weight_in_float32(tiny_dev, load_flux):
    flux = load_flux(tiny_dev)
    expected = dict(stock(tiny_dev).transformer.named_parameters())
    assert flux.trainable.keys() == expected.keys()
    assert {parameter.dtype for parameter in flux.trainable.values()} == {torch.float32}
    for part in (getattr(flux.adapter.pipeline, name) for name in ("vae", "text_encoder", "text_encoder_2")):
        assert not any(parameter.requires_grad for parameter in part.parameters())


def test_lora_adapts_every_linear_of_attention_and_feed_forward(tiny_dev, load_flux):
    transformer = stock(tiny_dev).transformer
    linears = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    blocks = {name for name in linears if re.match(r"(single_)?transformer_blocks\.", name)}
    expected = {name for name in blocks if ".norm" not in name}  # all but the modulations
    flux = load_flux(tiny_dev, tuning="lora")
    adapted = {name.split(".lora_")[0] for name in flux.trainable}
    assert adapted == expected
    # A double block: q, k, v, out and two feed-forward layers, for image and text. A single one: q, k, v, mlp, out.
    assert len(adapted) == 1 * (8 + 4) + 2 * 5
    assert {parameter.numel() for name, parameter in flux.trainable.items() if "to_q.lora_A" in name} == {4 * 32}


def test_base_model_is_the_model_before_training(tiny_dev, load_flux):
    flux = load_flux(tiny_dev, tuning="lora")
    x, sigma = torch.randn(1, TOKENS, 64), torch.full((1,), 0.6)
    conditioning = flux.encode(PROMPTS[:1])
    with torch.no_grad():
        before = flux.velocity(x, sigma, conditioning)
        for parameter in flux.trainable.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        after = flux.velocity(x, sigma, conditioning)
        with flux.base_model():
            base = flux.velocity(x, sigma, conditioning)
        again = flux.velocity(x, sigma, conditioning)
    assert torch.equal(base, before)
    assert torch.equal(again, after)
    assert (after - before).abs().max() > 0.1
    assert all(parameter.requires_grad for parameter in flux.trainable.values())


# --- models that cannot be had


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2", "model_index.json"])
def test_a_directory_with_a_part_missing_is_refused(tiny_dev, load_flux, tmp_path, part):
    directory = tmp_path / "model"
    shutil.copytree(tiny_dev, directory)
    missing = directory / part
    missing.unlink() if missing.is_file() else shutil.rmtree(missing)
    with pytest.raises(ValueError, match=rf"^model\.name_or_path = '{re.escape(str(directory))}' has no {part}[^\n]*$"):
        load_flux(str(directory))


def test_a_transformer_without_weights_is_refused(tiny_dev, load_flux, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny_dev, directory)
    for weights in (directory / "transformer").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match=r"^model\.name_or_path = .* has no \*\.safetensors in its transformer dir"):
        load_flux(str(directory))


def test_a_model_of_another_kind_is_refused(tiny_dev, load_flux, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny_dev, directory)
    shutil.rmtree(directory / "transformer")
    shutil.copytree(directory / "vae", directory / "transformer")
    index = json.loads((directory / "model_index.json").read_text())
    (directory / "model_index.json").write_text(json.dumps(index | {"transformer": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(ValueError, match=r"^model\.name_or_path = [^\n]* has a AutoencoderKL where its pipeline has"):
        load_flux(str(directory))


@pytest.mark.parametrize("name", ["./nowhere", "no where", "runs/a/b/c", "nonsense"])
def test_what_is_neither_directory_nor_hub_id(load_flux, name):
    with pytest.raises(
        ValueError, match=rf"^model\.name_or_path = '{re.escape(name)}' is neither a directory nor a hub"
    ):
        load_flux(name)


def test_hub_model_offline_says_what_to_do(load_flux):
    assert constants.HF_HUB_OFFLINE
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set: fetch it with `hf download some/model`"):
        load_flux("some/model")


@pytest.mark.parametrize(
    "error, remedy",
    [
        (GatedRepoError, "some/model is gated: accept its licence on its hub page, then run `hf auth login`"),
        (RepositoryNotFoundError, "there is no model some/model on the hub, or it is private: check the spelling"),
    ],
)
@pytest.mark.parametrize("function", ["model_info", "hf_hub_download"])
def test_hub_refusals_say_what_to_do(load_flux, monkeypatch, error, remedy, function):
    def refuse(*args, **kwargs):
        raise error("refused", response=MagicMock())

    def info(*args, **kwargs):
        return type("Info", (), {"siblings": []})()

    monkeypatch.setattr("diffusers.pipelines.pipeline_utils._resolve_revision", lambda *a, **k: "main", raising=False)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", info)
    monkeypatch.setattr(f"diffusers.pipelines.pipeline_utils.{function}", refuse)
    with pytest.raises(
        ValueError, match=rf"^model\.name_or_path = 'some/model' is no directory here: {re.escape(remedy)}"
    ) as raised:
        load_flux("some/model")
    assert "\n" not in str(raised.value)
