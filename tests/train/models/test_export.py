"""What a run leaves for others: stock diffusers loads it and gives the outputs of the model that was trained."""

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers import FluxPipeline
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from ngrpo_train.models.export import export
from ngrpo_train.models.loading import quiet_diffusers
from ngrpo_train.models.model import FlowModel
from ngrpo_train.recipe.parsing import resolve
from ngrpo_train.recipe.sections import Model, Parallel, Sampling
from ngrpo_train.run.checkpoint import find_checkpoint, load_weights
from ngrpo_train.sampling.rollout import generate
from ngrpo_train.sampling.solvers import flow_sigmas

from ...families import FAMILIES
from ..oracles import stock_pictures

PROMPTS = ["a large red circle on a blue background", "a dog"]
SIGMAS = flow_sigmas(4, 3.0)


@torch.no_grad()
def outputs(transformer_or_flux, flux):
    """Velocities of PROMPTS at three times, by our model or by a loaded transformer."""
    x = torch.randn(2, *flux.latent_shape, generator=torch.Generator().manual_seed(0))
    kept, flux.transformer = flux.transformer, transformer_or_flux
    try:
        conditioning = flux.encode(PROMPTS)
        return torch.stack([flux.velocity(x, torch.full((2,), sigma), conditioning) for sigma in (1.0, 0.7, 0.2)])
    finally:
        flux.transformer = kept


@torch.no_grad()
def sampled(flux):
    noise = torch.randn(2, *flux.latent_shape, generator=torch.Generator().manual_seed(0))
    for step in generate(flux, noise, flux.encode(PROMPTS), SIGMAS):
        latents = step.after_NS
    return flux.decode(latents)


def sampled_by_stock(pipeline, flux):
    noise = torch.randn(2, *flux.latent_shape, generator=torch.Generator().manual_seed(0))
    pictures = stock_pictures(pipeline, PROMPTS, noise, size=32)
    return (pictures * 255).round()


@pytest.fixture(scope="module")
def shift_three(tiny_dev, tmp_path_factory):
    """The tiny pipeline with a scheduler that has the trainer's schedule."""
    directory = tmp_path_factory.mktemp("shift3") / "model"
    shutil.copytree(tiny_dev, directory)
    path = directory / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dynamic_shifting": False, "shift": 3.0}))
    return str(directory)


def trained(ngrpo, recipe, model, *flags):
    """A run of two iterations with Euler rollouts: its directory."""
    code, _, err = ngrpo(
        "train", recipe, f"--model.name-or-path={model}", "--sampling.solver=euler", "--checkpoint.every=1", *flags
    )
    assert code == 0, err
    return Path("runs/tiny")


def live(load_flux, run, step=2, **changes):
    """The model of a checkpoint of a run, as the trainer has it."""
    recipe = resolve(tomllib.loads((run / "recipe.toml").read_text()), name="recipe.toml")
    settings = {
        "tuning": recipe.model.tuning,
        "lora_rank": recipe.model.lora_rank,
        "lora_alpha": recipe.model.lora_alpha,
        "solver": "euler",
    }
    flux = load_flux(recipe.model.name_or_path, **settings | changes)
    load_weights(flux, run / "checkpoints" / f"step_{step:06d}")
    return flux


def test_full_tuning_loads_back_identical(ngrpo, tiny_recipe, shift_three, load_flux):
    run = trained(ngrpo, tiny_recipe, shift_three, "--log.export", "True")
    flux = live(load_flux, run)
    stock = FluxPipeline.from_pretrained(run / "export", local_files_only=True)
    assert torch.equal(outputs(stock.transformer, flux), outputs(flux.transformer, flux))
    base = FluxPipeline.from_pretrained(shift_three, local_files_only=True)
    assert (outputs(base.transformer, flux) - outputs(flux.transformer, flux)).abs().max() > 1e-3
    assert (sampled_by_stock(stock, flux) - sampled(flux)).abs().max() <= 1
    assert (sampled_by_stock(base, flux) - sampled(flux)).abs().max() > 1


@pytest.mark.parametrize("alpha", [2, 4, 12])
def test_lora_loads_back_identical(ngrpo, tiny_recipe, shift_three, load_flux, alpha):
    flags = ["--model.tuning=lora", "--model.lora-rank=4", f"--model.lora-alpha={alpha}", "--log.export=True"]
    run = trained(ngrpo, tiny_recipe, shift_three, *flags, "--optimizer.learning-rate=0.03")
    flux = live(load_flux, run)
    assert {path.name for path in (run / "export").iterdir()} == {"pytorch_lora_weights.safetensors", "README.md"}
    stock = FluxPipeline.from_pretrained(shift_three, local_files_only=True)
    before = outputs(stock.transformer, flux)
    stock.load_lora_weights(run / "export")
    expected = outputs(flux.transformer, flux)
    assert (before - expected).abs().max() > 1e-3
    torch.testing.assert_close(outputs(stock.transformer, flux), expected, rtol=1e-6, atol=1e-6)
    assert (sampled_by_stock(stock, flux) - sampled(flux)).abs().max() <= 1
    stock.unload_lora_weights()
    torch.testing.assert_close(outputs(stock.transformer, flux), before)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_averaged_weights_are_what_is_exported(ngrpo, tiny_recipe, shift_three, load_flux):
    run = trained(ngrpo, tiny_recipe, shift_three, "--model.ema=0.6", "--log.export=True", "--checkpoint.keep=9")
    weights = [dict(load_flux(shift_three).trainable)]
    for step in (1, 2):  # the raw weights of each iteration
        flux = load_flux(shift_three)
        load_raw(flux, run / "checkpoints" / f"step_{step:06d}")
        weights.append(dict(flux.trainable))
    exported = load_file(run / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == weights[0].keys()
    for name, value in exported.items():
        average = weights[0][name].double()
        for later in weights[1:]:
            average = 0.6 * average + 0.4 * later[name].double()
        torch.testing.assert_close(value.double(), average, rtol=1e-6, atol=1e-7)
    assert any((exported[name] - weights[2][name]).abs().max() > 1e-4 for name in exported)


def load_raw(flux, path):
    optimizer = torch.optim.AdamW(flux.trainable.values(), fused=True)
    frozen_left_out = StateDictOptions(ignore_frozen_params=True)
    tensors = {"model": get_state_dict(flux.transformer, optimizer, options=frozen_left_out)[0]}
    dcp.load(tensors, checkpoint_id=path / "tensors", no_dist=True)
    flux.transformer.load_state_dict(tensors["model"])


def test_export_command_chooses_the_checkpoint(ngrpo, tiny_recipe, shift_three, load_flux):
    flags = ["--evaluation.validation=prompts.txt", "--evaluation.every=1", "--checkpoint.keep=1", "--train.steps=3"]
    run = trained(ngrpo, tiny_recipe, shift_three, *flags)
    best = find_checkpoint(run, "best").name
    for which, step in (("latest", 3), ("best", int(best[5:])), (int(best[5:]), int(best[5:]))):
        out = Path(f"exported_{which}")
        code, said, _ = ngrpo("export", run, "--checkpoint", which, "--out", out)
        assert (code, said) == (0, f"exported to {out}\n")
        flux = live(load_flux, run, step)
        exported = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(exported[name], value) for name, value in flux.trainable.items())

    code, _, err = ngrpo("export", run, "--checkpoint", "77", "--out", "x")
    assert code == 2
    assert err.startswith("ngrpo export: no checkpoint '77' in runs/tiny; steps there: ")
    code, _, err = ngrpo("export", run, "--out", "exported_latest")
    assert (code, err) == (2, "ngrpo export: --out = 'exported_latest' exists and is not empty\n")


def test_export_is_in_the_dtype_of_the_arithmetic(ngrpo, tiny_recipe, shift_three, load_flux):
    """As FLUX.1-dev is stored. The checkpoint keeps the float32 weights."""
    run = trained(ngrpo, tiny_recipe, shift_three, "--parallel.compute-dtype=bfloat16", "--log.export=True")
    exported = load_file(run / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    weights = live(load_flux, run).trainable
    assert {value.dtype for value in exported.values()} == {torch.bfloat16}
    assert all(torch.equal(exported[name], value.bfloat16()) for name, value in weights.items())
    assert not all(torch.equal(exported[name].float(), value) for name, value in weights.items())


def test_a_lora_file_is_float32(tiny_dev, load_flux, tmp_path):
    flux = load_flux(tiny_dev, tuning="lora")
    flux.settings = replace(flux.settings, compute_dtype="bfloat16")
    export(flux, tmp_path)
    exported = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {value.dtype for value in exported.values()} == {torch.float32}
    assert len(exported) == len(flux.trainable)


def test_a_table_that_is_no_parameter_is_exported_too(tmp_path):
    """SD3.5 keeps its table of positions in a buffer, which its files hold: an untrained export is the model itself."""
    with quiet_diffusers():
        FAMILIES["sd35"].save(tmp_path / "base")
    spec = Model(name_or_path=str(tmp_path / "base"), tuning="full", gradient_checkpointing="none")
    settings = Parallel(device="cpu", compute_dtype="float32")
    model = FlowModel(spec, Sampling(**FAMILIES["sd35"].sampling), settings, torch.device("cpu"))
    export(model, tmp_path / "out")
    base, out = (
        load_file(tmp_path / place / "transformer" / "diffusion_pytorch_model.safetensors") for place in ("base", "out")
    )
    assert "pos_embed.pos_embed" in base
    assert base.keys() == out.keys()
    assert all(torch.equal(out[name], value) for name, value in base.items())


def test_export_leaves_the_live_model_alone(tiny_dev, load_flux, tmp_path):
    flux = load_flux(tiny_dev)
    before = flux.transformer
    export(flux, tmp_path)
    assert flux.transformer is before
    assert all(parameter.device.type == "cpu" for parameter in flux.trainable.values())
