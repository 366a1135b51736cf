"""Plans of other families than FLUX.1: operations against formulas that were worked out by hand, and what is theirs."""

# h width, T tokens of a picture or video, L tokens of its text, S = T + L.

import re
import tokenize
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ngrpo_train.plan
from ngrpo_train.models import frozen
from ngrpo_train.models.counts import Parameters, parameters
from ngrpo_train.models.sizes import KNOWN, part_on
from ngrpo_train.parallel.layout import Layout
from ngrpo_train.plan import make_plan, remedies
from ngrpo_train.plan.activations import encode_pass
from ngrpo_train.plan.flops import TransformerFlops, transformer_flops
from ngrpo_train.plan.layout import code_bytes
from ngrpo_train.plan.machines import MACHINES
from ngrpo_train.plan.memory import iteration_memory
from ngrpo_train.plan.remedies import with_settings
from ngrpo_train.plan.trace import Shape, traced
from ngrpo_train.plan.traffic import iteration_traffic
from ngrpo_train.recipe.parsing import find_recipe, read_recipe, resolve
from ngrpo_train.recipe.sections import Recipe, Sampling


def packaged(name: str, **settings: Any) -> Recipe:
    """A packaged recipe without its rewards."""
    recipe = replace(resolve(read_recipe(find_recipe(name)), name=name), rewards={})
    return with_settings(recipe, {field.replace("__", "."): value for field, value in settings.items()})


# -- Operations, by hand -----------------------------------------------------------------------------------------------


def qwen(T: int, L: int) -> TransformerFlops:
    """60 blocks with a stream for the picture and one for the text; two forwards for guidance."""
    h, S, layers = 3072, T + L, 60
    time, output = 256 * h + h * h, 2 * h * h + T * h * 64
    return TransformerFlops(
        products=2 * 2 * layers * 12 * S * h * h,  # four of h x h for attention, two of h x 4h
        attention=2 * 2 * layers * 2 * S * S * h,
        conditioning=2 * 2 * layers * 2 * 6 * h * h,  # shift, scale and gate of attention and feed-forward, each stream
        around=2 * 2 * (T * 64 * h + L * 3584 * h + time + output),
        adapters=0,
    )


def klein(T: int, L: int) -> TransformerFlops:
    """5 double and 20 single blocks, whose modulations are computed once for all; two forwards for guidance."""
    h, S = 3072, T + L
    time, modulations = 256 * h + h * h, (2 * 6 + 3) * h * h
    output = 2 * h * h + T * h * 128
    return TransformerFlops(
        products=2 * 2 * (5 + 20) * 13 * S * h * h,  # 4 h^2 of attention, and a gated feed-forward of 3h: 9 h^2
        attention=2 * 2 * (5 + 20) * 2 * S * S * h,
        conditioning=0,
        around=2 * 2 * (T * 128 * h + L * 7680 * h + time + modulations + output),
        adapters=0,
    )


def wan(T: int, L: int) -> TransformerFlops:
    """30 blocks with attention among the video's tokens, and from these to the text; two forwards for guidance."""
    h, ff, layers = 1536, 8960, 30
    time, text = 256 * h + h * h + 6 * h * h, L * (4096 * h + h * h)
    return TransformerFlops(
        products=2 * 2 * layers * T * (6 * h * h + 2 * h * ff),  # q, k, v, out; q and out of the second attention
        attention=2 * 2 * layers * 2 * (T * T + T * L) * h,
        conditioning=2 * 2 * layers * 2 * L * h * h,  # keys and values of the text, which all blocks share
        around=2 * 2 * (T * 64 * h + time + text + T * h * 64),
        adapters=0,
    )


def z_image(T: int, L: int) -> TransformerFlops:
    """30 blocks over picture and text, two more for each of them before; one forward of a doubled batch."""
    h, ff = 3840, 10240
    tokens = 30 * (T + L) + 2 * T + 2 * L
    pairs = 30 * (T + L) ** 2 + 2 * T**2 + 2 * L**2
    time = 256 * 1024 + 1024 * 256
    return TransformerFlops(
        products=2 * 2 * tokens * (4 * h * h + 3 * h * ff),
        attention=2 * 2 * 2 * pairs * h,
        conditioning=2 * 2 * (30 + 2) * 256 * 4 * h,  # blocks of the text alone are not modulated
        around=2 * 2 * (T * 64 * h + L * 2560 * h + time + 256 * h + (T + L) * h * 64),
        adapters=0,
    )


@pytest.mark.parametrize(
    "name, sizes, T, formula",
    [
        ("qwen-image", {"height": 512, "width": 768}, 1536, qwen),
        ("flux2-klein-base-4b", {"height": 512, "width": 768}, 1536, klein),
        # A latent for the first frame and one for each four after it; a token is two by two of 8 by 8 pixels.
        ("wan21-t2v-1.3b", {"height": 480, "width": 832, "num_frames": 33}, 9 * 30 * 52, wan),
        ("z-image", {"height": 512, "width": 768}, 1536, z_image),
    ],
)
def test_operations_are_those_of_a_formula(name: str, sizes: dict[str, int], T: int, formula: Any) -> None:
    sampling = Sampling(**sizes, guidance_scale=4.0, max_sequence_length=512)
    assert transformer_flops(KNOWN[name], Shape(sampling)) == formula(T, 512)


def test_without_guidance_there_is_one_forward() -> None:
    shapes = [Shape(Sampling(height=512, width=512, guidance_scale=scale)) for scale in (1.0, 4.0)]
    once, twice = (transformer_flops(KNOWN["qwen-image"], shape) for shape in shapes)
    assert twice.blocks == 2 * once.blocks
    assert traced(KNOWN["qwen-image"], shapes[1]).around_kept > 1.9 * traced(KNOWN["qwen-image"], shapes[0]).around_kept


def test_a_guided_forward_gathers_for_each_of_its_calls() -> None:
    """As FSDP does for a module that is called twice before its backward; gradients are summed once."""
    settings = {"parallel.keep_gathered": "never", "parallel.reduce_gradients": "batch", "parallel.rollout_batch": 12}
    found = []
    for scale in (1.0, 4.0):
        drawn = {"height": 512, "width": 512, "guidance_scale": scale, "negative_prompt": ""}
        recipe = packaged("qwen_image_lora", **{f"sampling__{name}": value for name, value in drawn.items()})
        recipe = with_settings(recipe, settings | {"train.gradient_accumulation_steps": 1})
        passes = recipe.sampling.num_inference_steps + 2 * recipe.algorithm.num_train_steps  # of all anchors of a step
        found.append(iteration_traffic(recipe, KNOWN["qwen-image"], Layout.of(recipe.model, recipe.parallel, 8, 8)))
        assert found[-1].gathers == (1 if scale == 1 else 2) * passes
    once, twice = found
    assert twice.gathered_bytes == 2 * once.gathered_bytes
    assert twice.reduced_bytes == once.reduced_bytes


@pytest.mark.parametrize(
    "name, length, expected",
    [
        # The last block gives no text on, and is smaller; half of the others have a second attention.
        ("sd35-medium", 77, {("transformer_blocks", 13), ("transformer_blocks", 10), ("transformer_blocks", 1)}),
        # It looks up how long each text is, which nobody knows on "meta".
        ("lumina2", 256, {("context_refiner", 2), ("noise_refiner", 2), ("layers", 26)}),
        ("sana-1600m", 300, {("transformer_blocks", 20)}),  # a template comes before its text
        ("flux-fill-dev", 512, {("transformer_blocks", 19), ("single_transformer_blocks", 38)}),
    ],
)
def test_blocks_of_each_kind_are_found(name: str, length: int, expected: set[tuple[str, int]]) -> None:
    sampling = Sampling(height=512, width=512, guidance_scale=1.0, max_sequence_length=length)
    kinds = traced(KNOWN[name], Shape(sampling)).kinds
    assert {(kind.name, kind.layers) for kind in kinds} == expected
    assert len(kinds) == len(expected)


# -- Pictures of prompts, experts --------------------------------------------------------------------------------------


def test_a_source_picture_is_encoded_and_lengthens_the_sequence() -> None:
    recipe = packaged("kontext_lora", sampling__height=512, sampling__width=512)
    edits, draws = KNOWN["flux-kontext-dev"], KNOWN["flux-dev"]
    text = encode_pass(draws, recipe.sampling)
    assert encode_pass(edits, recipe.sampling).flops - text.flops == pytest.approx(1.12e12, rel=0.01)
    tokens = {name: traced(KNOWN[name], Shape(recipe.sampling)).tokens for name in ("flux-kontext-dev", "flux-dev")}
    assert tokens["flux-kontext-dev"] - tokens["flux-dev"] == 32 * 32


def test_of_two_experts_each_forward_takes_one() -> None:
    """Both are there and are trained; what is gathered for one forward is half of it."""
    whole = KNOWN["wan22-t2v-a14b"]
    both = whole.changed("transformer", num_layers=2).changed("transformer_2", num_layers=2)
    one = KNOWN["wan21-t2v-14b"].changed("transformer", num_layers=2)
    assert both.transformers == ("transformer", "transformer_2")
    assert parameters(both).transformer == 2 * parameters(one).transformer
    recipe = packaged("wan21_t2v_lora", sampling__num_frames=5)
    recipe = with_settings(recipe, {"parallel.keep_gathered": "never", "parallel.reduce_gradients": "batch"})
    layout = Layout.of(recipe.model, recipe.parallel, 8, 8)
    double, single = (iteration_traffic(recipe, each, layout) for each in (both, one))
    assert (double.gathers, double.gathered_bytes) == (
        single.gathers / 2,
        pytest.approx(single.gathered_bytes, rel=1e-9),
    )
    frozen_weights = [iteration_memory(recipe, each, layout).phases["step"]["frozen weights"] for each in (both, one)]
    assert frozen_weights[0] == 2 * frozen_weights[1]


# -- A base in fewer bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["bfloat16", "float8", "nf4"])
def test_a_base_in_fewer_bits_takes_what_its_codes_take(storage: Any) -> None:
    """Counted on a transformer whose layers are there."""
    recipe = packaged("flux_lora_24gb", model__base_dtype=storage, parallel__compute_dtype="float32")
    small = KNOWN["flux-dev"].changed("transformer", num_layers=1, num_single_layers=1, num_attention_heads=2)
    transformer = part_on(small, "transformer", "cpu", torch.float32)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    kept = 0
    for layer in (part for block in blocks for part in block.modules() if isinstance(part, nn.Linear)):
        codes, scales = frozen.encode(layer.weight.detach(), storage)
        kept += codes.nbytes + (0 if scales is None else scales.nbytes)
    assert code_bytes(recipe, parameters(small)) == kept


def test_small_bases_by_hand() -> None:
    counts: Parameters = parameters(KNOWN["flux-dev"])
    matrices, others = counts.block_matrices, counts.transformer - counts.block_matrices
    layout = Layout.of(packaged("flux_lora_24gb").model, packaged("flux_lora_24gb").parallel, 1, 8)
    held = iteration_memory(
        packaged("flux_lora_24gb", parallel__keep_gathered="never"), KNOWN["flux-dev"], layout
    ).phases
    assert held["update"]["frozen weights"] == (1 / 2 + 2 / 64) * matrices + 2 * others
    # Of the largest layer, a block's modulation: float32 levels, their products with scales, and these rounded.
    assert held["update"]["decoded layer"] == held["rollout"]["decoded layer"] == (4 + 4 + 2) * 6 * 3072 * 3072
    assert "decoded layer" not in held["decode"]


@pytest.mark.parametrize("name, card", [("flux_lora_24gb", "rtx4090-24"), ("flux_lora_48gb", "l40s-48")])
def test_recipes_fit_the_cards_that_they_are_for(name: str, card: str) -> None:
    recipe = resolve(read_recipe(find_recipe(name)), name=name)
    assert make_plan(recipe, MACHINES[card]).fits
    whole = make_plan(with_settings(recipe, {"model.base_dtype": "same"}), MACHINES[card])
    smaller = [remedy for remedy in remedies(whole) if "model.base_dtype" in remedy.settings]
    assert min(remedy.plan.memory.peak for remedy in smaller) < whole.memory.peak


# -- Names -------------------------------------------------------------------------------------------------------------

FAMILIES = re.compile(r"(?i)flux|qwen|z.?image|sd3|stable.?diffusion|chroma|lumina|sana|ltx|\bwan\b|\bt5\b")


def test_a_plan_knows_no_model_by_name() -> None:
    """In names and strings of its code. (What "sanatise" would say is not there.)"""
    for path in sorted(Path(ngrpo_train.plan.__file__).parent.glob("*.py")):
        with tokenize.open(path) as file:
            said = [token.string for token in tokenize.generate_tokens(file.readline) if token.type != tokenize.COMMENT]
        assert not [words for words in said if FAMILIES.search(words)], path
