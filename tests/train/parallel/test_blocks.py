"""Recomputed and compiled blocks give the gradients of plain ones, keep as little as they say, and compile once."""

import os
from functools import partial

import pytest
import torch
import torch._functorch.config as functorch
import torch._inductor.config as inductor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ngrpo_train.parallel import blocks
from ngrpo_train.parallel.layout import compiles
from ngrpo_train.recipe.sections import Model, Parallel

from ...tiny import PROMPTS

TOKENS = 4


def gradients(flux, pictures=2):
    x = torch.randn(pictures, TOKENS, 64, generator=torch.Generator().manual_seed(0))
    flux.velocity(x, torch.full((pictures,), 0.6), flux.encode(PROMPTS[:pictures])).square().sum().backward()
    found = {name: parameter.grad for name, parameter in flux.trainable.items()}
    for parameter in flux.trainable.values():
        parameter.grad = None
    return found


def bytes_kept(flux):
    """What autograd keeps between a forward and its backward, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in flux.transformer.parameters()}
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x = torch.randn(2, TOKENS, 64)
    conditioning = flux.encode(PROMPTS[:2])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = flux.velocity(x, torch.full((2,), 0.6), conditioning)
    del out
    return sum(kept.values())


def flops(flux):
    """The operations of matrix products and attention in a forward and its backward."""
    with FlopCounterMode(display=False) as counter:
        gradients(flux)
    return counter.get_total_flops()


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_recomputing_changes_no_gradient_and_keeps_less(tiny_dev, load_flux, tuning):
    made = {
        what: load_flux(tiny_dev, tuning=tuning, gradient_checkpointing=what) for what in ("none", "selective", "full")
    }
    expected = gradients(made["none"])
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for what in ("selective", "full"):
        found = gradients(made[what])
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7)
    assert bytes_kept(made["full"]) < bytes_kept(made["none"]) / 5
    products = {what: flops(flux) for what, flux in made.items()}
    assert products["full"] > 1.2 * products["none"]
    assert products["selective"] == products["none"]  # what it computes again has no matrix product


def test_without_gradients_nothing_is_recomputed():
    calls = []
    recomputed = blocks.recomputing(lambda x: calls.append(1) or x * x, "full")
    with torch.no_grad():
        assert torch.equal(recomputed(torch.full((2,), 3.0)), torch.full((2,), 9.0))
    assert len(calls) == 1
    recomputed(torch.ones(2, requires_grad=True)).sum().backward()
    assert len(calls) == 3


@pytest.mark.parametrize(
    "name", ["flash_attn::_flash_attn_forward", "xformers_flash::flash_fwd", "xformers_flash3::flash_fwd"]
)
@pytest.mark.parametrize("what, times", [("selective", 1), ("full", 2)])
def test_attention_of_other_packages_is_kept(name, what, times):
    """These packages have no operators on a CPU: one of the same name tells how often it computes."""
    calls = []

    @torch.library.custom_op(name, mutates_args=())
    def attention(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return 3 * x

    attention.register_autograd(lambda _, gradient: 3 * gradient)
    x = torch.ones(2, requires_grad=True)
    blocks.recomputing(lambda x: attention(x.sin()).cos(), what)(x).sum().backward()
    assert len(calls) == times
    one = torch.ones(2)
    torch.testing.assert_close(x.grad, -3 * (3 * one.sin()).sin() * one.cos())


@pytest.mark.parametrize(
    "setting, device, expected", [("auto", "cpu", False), ("auto", "cuda", True), ("on", "cpu", True)]
)
def test_what_is_compiled(setting, device, expected):
    assert compiles(Parallel(compile=setting), device) is expected


@pytest.mark.parametrize(
    "tuning, what, backend",
    [
        ("full", "selective", "aot_eager"),  # traced and partitioned, but no code made of it: that takes long
        ("full", "full", "aot_eager"),
        ("lora", "full", "aot_eager"),
        ("full", 0.5, "aot_eager_decomp_partition"),  # inductor's partitioner, which minds the budget
        pytest.param("full", 0.5, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_train_alike_and_compile_once(monkeypatch, tiny_dev, load_flux, tuning, what, backend):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain = gradients(load_flux(tiny_dev, tuning=tuning))
    flux = load_flux(tiny_dev, tuning=tuning, gradient_checkpointing=what, compile="on", rollout_batch=3)
    assert flux.compiled
    before = blocks.graphs_compiled()
    for pictures in (3, 2, 1):  # chunks are filled up, so that no size is new
        noise = torch.randn(pictures, TOKENS, 64)
        conditioning = flux.encode(PROMPTS[:pictures])
        sampled = flux.sampling_velocity(noise, torch.full((pictures,), 0.6), conditioning)
        assert sampled.shape == noise.shape
    found = gradients(flux)
    compiled = blocks.graphs_compiled()
    assert compiled > before
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-6)
    flux.sampling_velocity(torch.randn(5, TOKENS, 64), torch.full((5,), 0.6), flux.encode([*PROMPTS, PROMPTS[0]]))
    gradients(flux)
    assert blocks.graphs_compiled() == compiled


def test_the_compilers_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    settings = Parallel(compile="on", compile_cache=str(tmp_path))
    with functorch.patch(activation_memory_budget=1.0), inductor.patch(shape_padding=True):
        blocks.prepare([nn.Linear(2, 2)], Model(gradient_checkpointing=0.7), settings, torch.device("cpu"))
        assert functorch.activation_memory_budget == 0.7
        assert not inductor.shape_padding
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def test_a_budget_without_a_compiler_is_said_to_do_nothing(caplog):
    blocks.prepare([nn.Linear(2, 2)], Model(gradient_checkpointing=0.7), Parallel(), torch.device("cpu"))
    assert "model.gradient_checkpointing = 0.7 is a setting of the compiler and does nothing" in caplog.text
