"""The counter of operations and adapters, against torch's own counter and formulas that were worked out by hand."""

# h width of the transformer, T image tokens, L text tokens, S = T + L tokens of a picture, r LoRA's rank.

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ngrpo_train.models.counts import adapters
from ngrpo_train.models.inputs import inputs_of
from ngrpo_train.models.sizes import KNOWN, Architecture, add_adapters, find_architecture, transformer_on
from ngrpo_train.plan.flops import TransformerFlops, transformer_flops
from ngrpo_train.plan.trace import Shape, traced
from ngrpo_train.recipe.sections import Sampling

DEV = KNOWN["flux-dev"]


# -- FLUX.1, whose operations are a formula ----------------------------------------------------------------------------


def formula(found: Architecture, sampling: Sampling, rank: int = 0) -> TransformerFlops:
    """Operations of a picture: products inside and outside of blocks, attention, and adapters."""
    config, L = found.transformer, sampling.max_sequence_length
    T = sampling.height * sampling.width // (2 * 2 ** (len(found.vae["block_out_channels"]) - 1)) ** 2
    h, S = config["num_attention_heads"] * config["attention_head_dim"], T + L
    doubles, singles = config["num_layers"], config["num_single_layers"]
    times = 2 if config["guidance_embeds"] else 1  # timestep, and guidance
    embedders = times * (256 * h + h * h) + (config["pooled_projection_dim"] * h + h * h)
    ends = T * config["in_channels"] * h + L * config["joint_attention_dim"] * h + 2 * h * h
    # Weights that multiply a token. In a double block, those of its stream: four of h x h for attention, two of h x 4h
    # for the feed-forward. In a single block: three of h x h, one of h x 4h, one of 5h x h. Both come to 12 h^2.
    return TransformerFlops(
        products=2 * 12 * (doubles + singles) * S * h * h,
        attention=2 * 2 * (doubles + singles) * S * S * h,
        conditioning=2 * (12 * doubles + 3 * singles) * h * h,
        around=2 * (embedders + ends + T * h * config["in_channels"]),
        # Of a double block's adapters, half see the picture's tokens and half the text's.
        adapters=2 * S * (doubles * _double(h, rank) // 2 + singles * _single(h, rank)),
    )


def _double(h: int, rank: int) -> int:
    """Adapters of a double block: q, k, v, out and the two layers of a feed-forward, for picture and text."""
    return rank * (8 * (h + h) + 4 * (h + 4 * h))


def _single(h: int, rank: int) -> int:
    """Of a single block: q, k, v; the feed-forward's first; its second with attention's."""
    return rank * (3 * (h + h) + (h + 4 * h) + (5 * h + h))


CASES = [
    ("random:flux-dev", {"height": 720, "width": 720}, 0),
    ("random:flux-schnell", {"height": 512, "width": 768, "max_sequence_length": 256}, 0),
    ("random:flux-dev", {"height": 720, "width": 720}, 128),
    ("shapes", {"height": 64, "width": 64, "max_sequence_length": 16}, 0),
    ("shapes", {"height": 512, "width": 512, "max_sequence_length": 16}, 8),
    ("tiny_schnell", {"height": 128, "width": 128, "max_sequence_length": 33}, 0),
]


@pytest.mark.parametrize("name, sizes, rank", CASES)
def test_what_is_counted_is_the_formula(
    name: str, sizes: dict[str, Any], rank: int, request: pytest.FixtureRequest
) -> None:
    found = find_architecture(request.getfixturevalue(name) if name.startswith("tiny") else name)
    sampling = Sampling(**sizes)
    assert transformer_flops(found, Shape(sampling, lora_rank=rank)) == formula(found, sampling, rank)


@pytest.mark.parametrize("name", ["random:flux-dev", "shapes"])
def test_adapters_are_the_formulas(name: str) -> None:
    found, rank = find_architecture(name), 16
    config = found.transformer
    h = config["num_attention_heads"] * config["attention_head_dim"]
    counts = adapters(found, rank)
    assert counts.total == config["num_layers"] * _double(h, rank) + config["num_single_layers"] * _single(h, rank)
    assert (counts.largest_block, counts.last_block) == (_double(h, rank), _single(h, rank))


# -- Torch's counter ---------------------------------------------------------------------------------------------------


def counted(found: Architecture, pictures: int, shape: Shape, *, backward: bool = True) -> tuple[int, int]:
    """Operations of a whole forward and of its backward, by torch's counter."""
    model = transformer_on(found)
    if shape.lora_rank:
        add_adapters(found, model, shape.lora_rank)
    (call,) = inputs_of(found, shape.sampling, torch.bfloat16, pictures).velocity
    with FlopCounterMode(display=False) as forth, torch.set_grad_enabled(backward):
        out = model(**call.named)[0]
    with FlopCounterMode(display=False) as back:
        if backward:
            out.backward(torch.empty_like(out))
    return forth.get_total_flops(), back.get_total_flops()


def test_a_model_of_full_size_is_counted_as_torch_counts_it() -> None:
    shape = Shape(Sampling(height=720, width=720))
    assert transformer_flops(DEV, shape).forward == counted(DEV, 1, shape, backward=False)[0]


@pytest.mark.parametrize(
    "name, pictures, sizes, rank",
    [
        ("shapes", 5, {"height": 64, "width": 64, "max_sequence_length": 16}, 0),
        ("shapes", 1, {"height": 512, "width": 512, "max_sequence_length": 16}, 8),
        ("tiny_schnell", 3, {"height": 128, "width": 128, "max_sequence_length": 33}, 0),
    ],
)
def test_pictures_are_counted_as_torch_counts_them(
    name: str, pictures: int, sizes: dict[str, Any], rank: int, request: pytest.FixtureRequest
) -> None:
    found = find_architecture(request.getfixturevalue(name) if name.startswith("tiny") else name)
    shape = Shape(Sampling(**sizes), lora_rank=rank)
    forward, backward = counted(found, pictures, shape)
    assert pictures * transformer_flops(found, shape).forward == forward
    # The first layers' inputs need no gradients, which the rule for backwards does not know of.
    assert pictures * transformer_flops(found, shape).backward == pytest.approx(backward, rel=0.05)


@pytest.mark.parametrize("rank", [0, 128])
def test_the_rule_for_backwards_is_close_at_full_width(rank: int) -> None:
    found, shape = find_architecture("random:flux-dev:2+4"), Shape(Sampling(height=720, width=720), lora_rank=rank)
    assert transformer_flops(found, shape).backward == pytest.approx(counted(found, 1, shape)[1], rel=0.04)


@pytest.mark.parametrize("pixels, tflops", [(512, 21.50), (720, 37.28), (1024, 74.38)])
def test_operations_of_a_picture(pixels: int, tflops: float) -> None:
    shape = Shape(Sampling(height=pixels, width=pixels))
    assert transformer_flops(DEV, shape).forward / 1e12 == pytest.approx(tflops, abs=0.005)


# -- Blocks by kind ----------------------------------------------------------------------------------------------------


def test_blocks_of_a_kind_are_computed_once() -> None:
    """FLUX.1's two kinds, with the largest attention, over all tokens of a picture."""
    trace = traced(DEV, Shape(Sampling(height=720, width=720)))
    assert [(kind.name, kind.layers) for kind in trace.kinds] == [
        ("transformer_blocks", 19),
        ("single_transformer_blocks", 38),
    ]
    assert trace.attention == ((1, 24, 2537, 128), (1, 24, 2537, 128))
    assert trace.tokens == 2537
    assert trace.shared == 2 * 3072  # time, guidance and pooled text; position ids are the same for all pictures
