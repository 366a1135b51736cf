"""The frozen base in fewer bits: what is kept of a weight, the gradient through it, memory, and training over it.

Truths: torchao's quantisers, the nearest level found by brute force, and stock diffusers in float64 with the very
weights that the codes stand for.
"""

import json
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, quantize_, to_nf4

from ngrpo_train.models import frozen
from ngrpo_train.models.frozen import FrozenLinear
from ngrpo_train.models.loading import quiet_diffusers
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import blocks
from ngrpo_train.recipe.sections import Model, Parallel, Sampling

from ...families import FAMILIES, Family
from ...tiny import PROMPTS
from ..runs import saved

CPU = torch.device("cpu")
STORAGES = ["bfloat16", "float8", "nf4"]
SHAPES = [(1, 1), (3, 7), (32, 64), (130, 96)]  # one weight; less than a block of nf4; whole blocks; several, ragged


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kept(weight: Tensor, storage: str, bias: Tensor | None = None) -> FrozenLinear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=bias is not None, dtype=weight.dtype).requires_grad_(False)
    if bias is not None:
        linear.bias.copy_(bias)
    layer = FrozenLinear(linear, storage)
    layer.keep(weight)
    return layer


def noted(tensors: list[Tensor], tensor: Tensor) -> Tensor:
    tensors.append(tensor)
    return tensor


# --- codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float8_is_torchaos(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """In float32: of a bfloat16 weight, torchao rounds the scales to bfloat16 too, and then clips the largest."""
    weight = drawn(*shape, dtype=dtype) / 8
    theirs = nn.Linear(shape[1], shape[0])
    theirs.weight = nn.Parameter(weight.float(), requires_grad=False)
    quantize_(theirs, Float8WeightOnlyConfig(set_inductor_config=False))
    ours = kept(weight, "float8")
    assert torch.equal(ours.codes.view(torch.uint8), theirs.weight.qdata.view(torch.uint8))
    assert torch.equal(ours.scales, theirs.weight.scale)
    assert torch.equal(ours.weight, theirs.weight.dequantize().to(dtype))


def test_nf4_has_the_published_levels() -> None:
    """Appendix E of QLoRA, to its last digit."""
    published = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
        -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634
        0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
    torch.testing.assert_close(
        frozen.nf4_levels(), torch.tensor([float(x) for x in published.split()]), rtol=0, atol=3e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_takes_the_nearest_level_of_a_block(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = drawn(*shape, dtype=dtype)
    got, levels = kept(weight, "nf4").weight, frozen.nf4_levels().double()
    assert (got.dtype, got.shape) == (dtype, weight.shape)
    for mine, block in zip(got.flatten().split(64), weight.flatten().double().split(64), strict=True):
        scale = block.abs().max()
        nearest = (block[:, None] - scale * levels).abs().argmin(1)
        assert torch.equal(mine, (scale * levels[nearest]).to(dtype))


def test_nf4_codes_are_torchaos() -> None:
    """Its levels have four digits: a weight within half of the last one of the middle of two may take either."""
    weight = drawn(256, 128)
    ours, theirs = kept(weight, "nf4"), to_nf4(weight, 64, 256)
    middles = (frozen.nf4_levels()[1:] + frozen.nf4_levels()[:-1]) / 2
    relative = weight.view(-1, 64) / ours.scales[:, None]
    clear = ((relative[..., None] - middles).abs() > 1e-4).all(-1).view(-1, 2).all(1)
    assert clear.float().mean() > 0.99
    assert torch.equal(ours.codes[clear], theirs.quantized_data[clear])


@pytest.mark.parametrize("storage", STORAGES)
def test_what_every_storage_keeps_exactly(storage: str) -> None:
    """Zeros, alone and beside huge weights, and the largest of a scale; nothing overflows."""
    weight = torch.zeros(4, 64, dtype=torch.bfloat16)
    weight[1, 5], weight[2, :] = 3e38, -1e-30
    assert torch.equal(kept(weight, storage).weight, weight)


# --- products


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_product_and_its_gradient_are_those_of_the_weight_that_is_kept(storage: str, with_bias: bool) -> None:
    bias = drawn(130) if with_bias else None
    layer, x, above = kept(drawn(130, 96), storage, bias), drawn(3, 7, 96, seed=1).requires_grad_(), drawn(3, 7, 130)
    y = layer(x)
    y.backward(above)
    weight = layer.weight.double()
    truth = x.detach().double() @ weight.T + (bias.double() if with_bias else 0)
    sums = 96 * torch.finfo(torch.float32).eps  # products of size 1, each rounded once, and their sums
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=sums * truth.abs().max().item())
    gradient = above.double() @ weight
    torch.testing.assert_close(x.grad.double(), gradient, rtol=0, atol=130 / 96 * sums * gradient.abs().max().item())


@pytest.mark.parametrize("storage", ["float8", "nf4"])
def test_no_whole_weight_waits_for_the_backward_pass(storage: str) -> None:
    layer, x = kept(drawn(64, 64), storage), drawn(2, 64).requires_grad_()
    waiting: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(partial(noted, waiting), lambda t: t):
        layer(x)
    assert waiting
    assert not [tensor for tensor in waiting if tensor.is_floating_point() and tensor.nbytes >= 64 * 64 * 2]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return y


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("storage", ["float8", "nf4"])
def test_compiled_blocks_compute_the_same_and_keep_no_weight(
    storage: str, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    partitioned = "aot_eager_decomp_partition"
    monkeypatch.setattr(torch, "compile", lambda f, **_: _compile(f, backend=partitioned, fullgraph=True))
    block = Block().requires_grad_(False)
    weights = {name: linear.weight for name, linear in block.named_children()}
    frozen.keep_in(storage, [block])
    for name, layer in block.named_children():
        layer.keep(weights[name])
    x, results = drawn(2, 128), []
    for compiled in (False, True):
        waiting: list[Tensor] = []
        if compiled:
            model = Model(tuning="lora", base_dtype=storage, gradient_checkpointing=recompute)
            blocks.prepare([block], model, Parallel(compile="on"), CPU)
        own = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(partial(noted, waiting), lambda t: t):
            y = block(own)
        y.sum().backward()
        with torch.no_grad():
            results.append((y, own.grad, block(x)))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)
    assert not [t for t in waiting if {*t.shape} == {128, 256} and t.dtype == torch.float32]


_compile = torch.compile


# --- a transformer's


def layers_of(flux: FlowModel) -> dict[str, FrozenLinear]:
    return {name: m for name, m in flux.transformer.named_modules() if isinstance(m, FrozenLinear)}


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_blocks_linear_layers_are_kept_so_and_all_else_as_it_was(
    storage: str, tiny_dev: str, load_flux: Callable[..., FlowModel]
) -> None:
    flux = load_flux(tiny_dev, tuning="lora", base_dtype=storage)
    stored = load_file(Path(tiny_dev) / "transformer" / "diffusion_pytorch_model.safetensors")
    matrices = {n for n, w in stored.items() if w.ndim == 2 and "transformer_blocks." in n}
    layers = {name.replace(".base_layer", "") + ".weight": layer for name, layer in layers_of(flux).items()}
    assert layers.keys() == matrices
    for name, layer in layers.items():
        assert torch.equal(layer.weight, kept(stored[name], storage).weight), name
    others = {n.replace(".base_layer.", "."): p for n, p in flux.transformer.named_parameters() if not p.requires_grad}
    assert others.keys() == stored.keys() - matrices
    assert all(torch.equal(parameter, stored[name]) for name, parameter in others.items())
    assert {p.dtype for p in flux.trainable.values()} == {torch.float32}


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_bytes_of_the_base(storage: str, compute: str, tiny_dev: str, load_flux: Callable[..., FlowModel]) -> None:
    """Of a layer with N weights and O outputs: 2N, N + 4O, or N / 2 and a scale in each block of 64."""
    flux = load_flux(tiny_dev, tuning="lora", base_dtype=storage, compute_dtype=compute)
    if storage == compute:
        assert not layers_of(flux), "nothing to make smaller"
        return
    for layer in layers_of(flux).values():
        outputs, weights = layer.out_features, layer.in_features * layer.out_features
        assert weights % 64 == 0
        scale = flux.compute_dtype.itemsize
        expected = {"bfloat16": 2 * weights, "float8": weights + 4 * outputs, "nf4": weights / 2 + weights / 64 * scale}
        mine = [t for name, t in layer.named_buffers() if name != "levels"]
        assert sum(t.untyped_storage().nbytes() for t in mine) == expected[storage]
    tables = {id(layer.levels) for layer in layers_of(flux).values()}
    assert len(tables) == 1, "one for all layers, of 2 KiB"


def test_never_more_than_one_block_is_there_in_full(
    tiny_dev: str, load_flux: Callable[..., FlowModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole weights that are read for a block are gone when those of the next are."""
    read: list[weakref.ref[Tensor]] = []
    calls, fill = [], frozen.fill

    def watched(transformer: nn.Module, parts: Any, device: torch.device, original: Any) -> None:
        def reading(weights: Mapping[str, Tensor]) -> None:
            assert not [reference for reference in read if reference() is not None]
            assert len({tuple(name.split(".")[:2]) for name in weights}) == 1
            read.extend(weakref.ref(weight) for weight in weights.values())
            calls.append(len(weights))
            original(weights)

        fill(transformer, parts, device, reading)

    monkeypatch.setattr(frozen, "fill", watched)
    flux = load_flux(tiny_dev, tuning="lora", base_dtype="nf4")
    assert len(calls) == len(flux.adapter.blocks(flux.transformer)) == 3
    assert sum(calls) == len(layers_of(flux))


def in_stock(flux: FlowModel, dtype: torch.dtype) -> Any:
    """diffusers' own transformer in `dtype` with the weights that the codes stand for, and peft's adapters."""
    theirs = FluxPipeline.from_pretrained(flux.spec.name_or_path, local_files_only=True).transformer.requires_grad_(
        False
    )
    theirs.add_adapter(next(iter(flux.transformer.peft_config.values())))
    state = dict(flux.transformer.named_parameters())
    state |= {f"{name}.weight": layer.weight for name, layer in layers_of(flux).items()}
    theirs.load_state_dict(state)
    return theirs.to(dtype)


def gradients(flux: Any, transformer: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the velocity along a fixed direction, with respect to the adapters."""
    kept, flux.adapter._compute_dtype = flux.adapter._compute_dtype, dtype
    try:
        text = flux.encode(PROMPTS)
        text = type(text)(text.prompt_embeds.to(dtype), text.pooled.to(dtype), text.txt_ids)
        x, sigma = drawn(len(PROMPTS), *flux.latent_shape), torch.full((len(PROMPTS),), 0.6)
        velocity = flux.adapter.velocity(transformer, x, sigma, text)
    finally:
        flux.adapter._compute_dtype = kept
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((velocity * drawn(*velocity.shape, seed=1)).sum(), list(trained.values()))
    return dict(zip(trained, found, strict=True)) | {"velocity": velocity.detach()}


def test_adapters_get_the_gradient_of_the_base_that_is_kept(
    storage: str, tiny_dev: str, load_flux: Callable[..., FlowModel]
) -> None:
    flux = load_flux(tiny_dev, tuning="lora", base_dtype=storage)
    with torch.no_grad():
        for index, parameter in enumerate(flux.trainable.values()):
            parameter.add_(drawn(*parameter.shape, seed=index), alpha=0.1)
    ours = gradients(flux, flux.transformer, torch.float32)
    exact, native = (gradients(flux, in_stock(flux, dtype), dtype) for dtype in (torch.float64, torch.float32))
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        floor = torch.finfo(torch.float32).eps * truth.abs().max()
        error = (native[name] - truth).abs().max()
        assert (ours[name] - truth).abs().max() <= 2 * (error + floor), name


def test_another_model_beside_it_is_whole(tiny_dev: str, load_flux: Callable[..., FlowModel]) -> None:
    flux = load_flux(tiny_dev, tuning="lora", base_dtype="nf4")
    other = flux.beside(flux.spec)
    assert not layers_of(other)
    x, sigma, text = drawn(1, *flux.latent_shape), torch.full((1,), 0.5), flux.encode(PROMPTS[:1])
    base = load_flux(tiny_dev)
    assert torch.equal(other.sampling_velocity(x, sigma, text), base.sampling_velocity(x, sigma, text))


def of_family(directory: Path, family: Family, base_dtype: Any) -> FlowModel:
    spec = Model(name_or_path=str(directory), tuning="lora", base_dtype=base_dtype, gradient_checkpointing="none")
    return FlowModel(spec, Sampling(**family.sampling), Parallel(device="cpu", compute_dtype="float32"), CPU)


@pytest.mark.parametrize("name", ["sd35", "z_image", "wan21_t2v"])
def test_other_families_compute_with_what_is_kept(name: str, tmp_path: Path) -> None:
    """To the bit as with a base that was rounded before it was saved; nothing in their blocks misses a weight."""
    family = FAMILIES[name]
    with quiet_diffusers():
        family.save(tmp_path)
    model = of_family(tmp_path, family, "nf4")
    layers = layers_of(model)
    x, sigma = drawn(1, *model.latent_shape), torch.full((1,), 0.6)
    velocity = model.sampling_velocity(x, sigma, model.encode(PROMPTS[:1]))

    [file] = (tmp_path / "transformer").glob("*.safetensors")
    stored = load_file(file)
    rounded = {f"{layer.replace('.base_layer', '')}.weight": own.weight for layer, own in layers.items()}
    assert rounded.keys() <= stored.keys()
    save_file(stored | rounded, file)
    plain = of_family(tmp_path, family, "same")
    assert torch.equal(plain.sampling_velocity(x, sigma, plain.encode(PROMPTS[:1])), velocity)
    assert not any(torch.equal(stored[layer], weight) for layer, weight in rounded.items())


# --- trained over


def figures(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_trains_resumes_and_leaves_as_lora_does(
    storage: str, ngrpo: Callable[..., tuple[int, str, str]], tiny_recipe: Path
) -> None:
    flags = ["--model.tuning=lora", f"--model.base-dtype={storage}", "--checkpoint.every=1", "--log.export=True"]
    code, _, err = ngrpo("train", tiny_recipe, *flags)
    assert code == 0, err
    straight = Path("runs/tiny")
    for line in figures(straight):
        # One update an iteration: before it, the velocities of rollout and update are the same numbers.
        assert (line["policy/ratio_min"], line["policy/ratio_max"]) == (1, 1)
        assert line["policy/rollout_mismatch"] == 0
    trained = load_file(straight / "export" / "pytorch_lora_weights.safetensors")
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert any(value.abs().max() > 0 for name, value in trained.items() if "lora_B" in name)

    first = straight / "checkpoints" / "step_000001"
    tensors = [name for name, value in saved(straight, 1).items() if isinstance(value, Tensor)]
    assert tensors
    assert all(".lora_" in name for name in tensors), "no code or scale, nor any other part of the base"
    code, _, err = ngrpo("train", tiny_recipe, *flags, f"--resume={first}", "--log.output-dir=again")
    assert code == 0, err
    again = load_file(Path("again/export/pytorch_lora_weights.safetensors"))
    assert trained.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in trained.items())

    code, _, err = ngrpo("train", tiny_recipe, *flags, "--model.base-dtype=same", f"--resume={first}")
    assert (code, err.partition(";")[0]) == (
        2,
        f"ngrpo train: model.base_dtype = 'same' differs from the checkpoint's {storage!r}",
    )


@pytest.mark.parametrize("keep", ["none", 0.5])
def test_blocks_that_would_keep_weights_whole_are_refused(keep: Any) -> None:
    model = Model(tuning="lora", base_dtype="nf4", gradient_checkpointing=keep)
    with pytest.raises(ValueError, match=rf"^model\.gradient_checkpointing = {keep!r} must be full or selective where"):
        blocks.refuse(model, Parallel(compile="on"), CPU)
    blocks.refuse(model, Parallel(), CPU)  # nothing is compiled on a CPU by default
    blocks.refuse(Model(tuning="lora", base_dtype="nf4"), Parallel(compile="on"), CPU)
    same_already = Model(tuning="lora", base_dtype="bfloat16", gradient_checkpointing=keep)
    blocks.refuse(same_already, Parallel(compile="on", compute_dtype="bfloat16"), CPU)
