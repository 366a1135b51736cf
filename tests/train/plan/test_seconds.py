"""Estimated seconds, part by part, against sums worked out by hand from FLUX.1-dev's published sizes, counted bytes."""

# h width, T tokens of a picture, L of its text, S = T + L; N weights; a U is what a block hands on: S x h bfloat16.

import csv
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ngrpo_train.plan
from benchmarks.train_recipes import full_size
from ngrpo_train.models.sizes import KNOWN
from ngrpo_train.plan import elementwise, make_plan, plan_command
from ngrpo_train.plan.activations import BlockBytes
from ngrpo_train.plan.elementwise import elementwise_bytes, generated, is_counted, operand_bytes, result_bytes
from ngrpo_train.plan.forecast import Plan
from ngrpo_train.plan.instruments import Operands, Traffic
from ngrpo_train.plan.machines import MACHINES
from ngrpo_train.plan.remedies import with_settings
from ngrpo_train.plan.seconds import LINKS
from ngrpo_train.plan.trace import Kind, Shape, traced
from ngrpo_train.recipe.sections import Recipe, Sampling

H100, H200 = MACHINES["h100-80"], MACHINES["h200-141"]
h, T, L, DOUBLE, SINGLE = 3072, 45 * 45, 512, 19, 38
S, BLOCKS, N, WEIGHTS = T + L, DOUBLE + SINGLE, 11_901_408_320, 1_160
U = 2 * S * h
ROLLOUT, STATES = 12 * 8, 4 * 4
SHARDED = {
    "parallel.master_dtype": "float32",
    "optimizer.name": "adamw",
    "model.gradient_checkpointing": "full",
    "parallel.retain": "off",
}

# Operations of a picture. Each stream of a double block has 12 h^2 weights that multiply its tokens, and so has a
# single block. All blocks have modulations: two of 6 h^2, or one of 3 h^2. The rest lies around the blocks.
ATTENTION = 4 * BLOCKS * S * S * h
PRODUCTS = 2 * (12 * BLOCKS * S + 12 * DOUBLE + 3 * SINGLE) * h * h
AROUND = 2 * (2 * (256 * h + h * h) + 768 * h + h * h + T * 64 * h + L * 4096 * h + 2 * h * h + T * h * 64)
PRODUCTS += AROUND
DECODE = 5.04e12

# What the estimate assumes of an H200, per second.
FAST, ATTEND, ATTEND_BACK, MEMORY = 0.86 * 790e12, 0.56 * 989e12, 0.49 * 989e12, 0.67 * 4.8e12


def target(**settings: Any) -> Recipe:
    """The performance target: the paper's settings, one prompt, bfloat16 weights, 8-bit states, one optimizer step."""
    return with_settings(full_size(), {name.replace("__", "."): value for name, value in settings.items()})


@cache
def plan(sharded: bool = False, **settings: Any) -> Plan:
    if sharded:
        return make_plan(with_settings(target(**settings), SHARDED), H100, 8)
    return make_plan(target(**settings), H200)


def parts(made: Plan) -> dict[tuple[str, str], float]:
    assert made.seconds
    return {(part.stage, part.name): part.seconds for part in made.seconds.parts}


def tensors(of: str, keep: str = "") -> float:
    """U that all blocks of FLUX.1-dev move in a pass, by the table's file."""
    layers = {"FluxTransformerBlock": DOUBLE, "FluxSingleTransformerBlock": SINGLE}
    with Path(ngrpo_train.plan.__file__).with_name("generated_sm90.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["block"] in layers]
    found = [row for row in rows if (row["pass"], row["keep"]) == (of, keep)]
    assert len(found) == 2
    return sum(layers[row["block"]] * float(row["tensors"]) for row in found)


# -- One H200 ----------------------------------------------------------------------------------------------------------


def test_the_target_by_hand() -> None:
    """10 s: in the rollout 6, in the update 3.7, for pictures a quarter."""
    forward = STATES * (PRODUCTS / FAST + ATTENTION / ATTEND + tensors("forward", "selective") * U / MEMORY)
    back = STATES * (2 * PRODUCTS / FAST + 2.5 * ATTENTION / ATTEND_BACK + tensors("backward", "none") * U / MEMORY)
    again = STATES * (tensors("backward", "selective") - tensors("backward", "none")) * U / MEMORY
    expected = {
        ("rollout", "products"): ROLLOUT * PRODUCTS / FAST,
        ("rollout", "attention"): ROLLOUT * ATTENTION / ATTEND,
        ("rollout", "elementwise"): ROLLOUT * tensors("rollout") * U / MEMORY,
        ("decode", "decode"): 12 * DECODE / (0.3 * 790e12),
        ("update", "forward"): forward,
        ("update", "recomputation"): again,
        ("update", "backward"): back,
        # Three batches are added to the first: two tensors read and one written. Norm and clipping: two and one.
        ("update", "gradients"): (3 * 3 + 3) * 2 * N / MEMORY,
        ("update", "optimizer"): WEIGHTS * 0.27e-3,  # the device needs 11.1 bytes a weight: 0.04 s
    }
    found = parts(plan())
    text = found.pop(("rollout", "text"))
    assert found == pytest.approx(expected, rel=2e-3)
    assert text == pytest.approx(4.9e12 / FAST, rel=0.02)
    assert sum(expected.values()) == pytest.approx(10.0, abs=0.05)
    assert plan().seconds.estimate == pytest.approx(text + sum(expected.values()), rel=2e-3)  # type: ignore[union-attr]


def test_arithmetic_at_full_speed_is_the_lower_bound() -> None:
    for made in (plan(), plan(parallel__rollout_dtype="float8"), plan(sharded=True)):
        assert made.seconds
        hardware = made.flops.hardware - made.flops.float8 / 2
        assert made.seconds.compute == pytest.approx(hardware / (H200.matmul_tflops * 1e12), rel=0.002)
        assert made.seconds.estimate > made.seconds.floor


def test_whole_blocks_computed_again_by_hand() -> None:
    """A second forward without what lies around the blocks, whose kernels the backward partly shares."""
    more = (tensors("backward", "full") - tensors("backward", "none")) * U / MEMORY
    found = parts(plan(model__gradient_checkpointing="full", parallel__retain="off"))
    again = STATES * ((PRODUCTS - AROUND) / FAST + ATTENTION / ATTEND + more)
    assert found["update", "recomputation"] == pytest.approx(again, rel=2e-3)


def test_retained_forwards_are_the_rollouts() -> None:
    """16 of its 96: the update makes none, and all else stays."""
    apart, retained = (
        parts(plan(model__gradient_checkpointing="full", parallel__retain=retain)) for retain in ("off", "on")
    )
    assert retained["rollout", "forward"] == apart["update", "forward"]
    for name in ("products", "attention", "elementwise"):
        assert retained["rollout", name] == pytest.approx((1 - STATES / ROLLOUT) * apart["rollout", name])
    assert {name for name in apart if name[0] == "update"} - {("update", "forward")} == {
        name for name in retained if name[0] == "update" and retained[name] == apart[name]
    }


def test_float8_speeds_up_products_of_tokens_alone() -> None:
    """1.7 times, for 30.9 of a picture's 32.8 TFLOP; and each of the copy's weights is made by a call of the host."""
    found = parts(plan(parallel__rollout_dtype="float8"))
    fast = 24 * BLOCKS * S * h * h
    products = ROLLOUT * (fast / 1.7 + PRODUCTS - fast) / FAST
    assert found["rollout", "products"] == pytest.approx(products, rel=2e-3)
    assert found["rollout", "elementwise"] == pytest.approx(ROLLOUT * tensors("float8 rollout") * U / MEMORY, rel=2e-3)
    assert found["rollout", "float8 copy"] == pytest.approx(WEIGHTS * 0.27e-3, rel=1e-6)
    assert {name: found[name] for name in found if name[0] == "update"} == {
        name: seconds for name, seconds in parts(plan()).items() if name[0] == "update"
    }


def test_further_passes_of_the_policy_are_parts() -> None:
    several = parts(plan(algorithm__updates_per_iteration=4, parallel__update_batch=1))
    once = parts(plan())
    assert several["update", "old policy"] == pytest.approx(3 / 4 * once["update", "forward"], rel=0.01)
    assert several["update", "optimizer"] == 4 * once["update", "optimizer"]


def test_a_small_model_waits_for_the_host() -> None:
    """Two double and three single blocks of width 128: a forward takes 0.25 ms a block at least."""
    found = parts(plan(model__name_or_path="shapes"))
    blocks = 5 * 0.25e-3
    device = sum(found["rollout", name] for name in ("products", "attention", "elementwise"))
    assert found["rollout", "host"] == pytest.approx(8 * blocks - device)


# -- Links -------------------------------------------------------------------------------------------------------------


def test_eight_gpus_wait_for_the_first_and_the_last_block() -> None:
    """All else is sent during arithmetic: 2 N bytes gathered once, and 4 N summed after each of 4 backwards."""
    seconds = plan(sharded=True, parallel__keep_gathered="iteration", parallel__reduce_gradients="batch").seconds
    assert seconds
    delay = (BLOCKS + 1) * (8.4e-6 + 7 * 3.4e-6)
    gather, reduction = (bytes_ * N * 7 / 8 / (0.8 * 450e9) + delay for bytes_ in (2, 4))
    assert seconds.gathers == pytest.approx(gather)
    assert seconds.reductions == pytest.approx(4 * reduction)
    assert seconds.waiting == pytest.approx((gather + 4 * reduction) / (BLOCKS + 1))


def test_what_slow_links_cannot_hide_is_waited_for() -> None:
    """Gathered for every forward, summed after every backward, over links of 20 GB/s."""
    asked = with_settings(target(parallel__keep_gathered="never", parallel__reduce_gradients="batch"), SHARDED)
    made = make_plan(asked, replace(H100, nvlink_gbps=20.0), 8)
    seconds, found = made.seconds, parts(made)
    assert seconds
    assert seconds.links == pytest.approx((16 * 2 + 4 * 4) * N * 7 / 8 / 20e9)
    gather, reduction = seconds.gathers / 16, seconds.reductions / 4
    forward = sum(found["rollout", name] for name in ("products", "attention", "elementwise")) / 8
    assert found["rollout", LINKS] == pytest.approx(8 * (gather - forward))
    back = found["update", "recomputation"] + found["update", "backward"]
    passes = 8 * (gather - (found["update", "forward"] + back) / 8)
    assert back / 4 < gather  # so nothing is left to hide a sum
    assert found["update", LINKS] == pytest.approx(passes + 4 * reduction)


def test_rings_of_many_gpus_by_hand() -> None:
    """On 128 nodes a ring has 127 steps between nodes and 896 within; two in each of 64 copies, 126 between nodes."""
    asked = target(parallel__keep_gathered="iteration", parallel__reduce_gradients="step")
    whole = make_plan(with_settings(asked, SHARDED), H100, 1024).seconds
    copies = make_plan(with_settings(asked, SHARDED | {"parallel.sharding": "hybrid"}), H100, 512).seconds
    assert whole
    assert copies
    delay = (BLOCKS + 1) * (8.4e-6 + 896 * 3.4e-6 + 127 * 14e-6)
    assert whole.gathers == pytest.approx(2 * N * 1023 / 1024 / (0.8 * 400e9) + delay)  # 8 adapters of 50 GB/s
    delay = (BLOCKS + 1) * (8.4e-6 + 2 * 63 * 14e-6)
    within = 4 * N * 7 / 8 / (0.8 * 450e9) + (BLOCKS + 1) * (8.4e-6 + 7 * 3.4e-6)
    assert copies.reductions == pytest.approx(within + 2 * (63 / 64) * 4 * N / 8 / (0.8 * 50e9) + delay)


# -- Elementwise parts -------------------------------------------------------------------------------------------------


def test_bytes_of_operators_by_hand() -> None:
    """Views and a row that is read again for others move nothing; a product's weight is none of its operands."""
    layer, x = nn.Linear(4, 8, bias=False, device="meta"), torch.empty(16, 4, device="meta")
    with torch.no_grad(), Traffic() as moved, Operands(layer.parameters()) as operands:
        y = layer(x.view(2, 8, 4))
        y.flatten(0, 1) + torch.empty(1, 8, device="meta").expand(16, 8)
        layer(x)
    assert moved.total == 4 * (16 * 8 + 8 + 16 * 8)
    assert operands.total == 4 * (16 * 4 + 2 * 16 * 8)


def kinds(name: str, **sizes: Any) -> list[Kind]:
    return list(traced(KNOWN[name], Shape(Sampling(**sizes))).kinds)


def test_operands_of_blocks_by_hand() -> None:
    """In U. A double block: normed 1, q, k, v 3, these of both streams 3, attention 1, out 1, normed 1, 4, 4, out 1.

    A single one: normed 1, q, k, v 3, rotated q and k 2, attention 1, 4, attention and these 5, out 1.
    """
    double, single = kinds("flux-dev", height=720, width=720)
    assert result_bytes(double) == result_bytes(single) == U
    assert operand_bytes(double) / U == pytest.approx(19, abs=0.05)  # and modulations
    assert operand_bytes(single) / U == pytest.approx(17, abs=0.05)


def test_the_rule_for_blocks_that_are_not_counted() -> None:
    """Each block of the table, by those of other models alone: forwards within 35 %, backwards within 20 %."""
    models = (
        {"FluxTransformerBlock", "FluxSingleTransformerBlock"},
        {"QwenImageTransformerBlock"},
        {"WanTransformerBlock"},
    )
    table = generated()
    for of, keep, off in (("rollout", "", 0.35), ("backward", "selective", 0.2), ("backward", "none", 0.2)):
        for own in models:
            others = [row for name, row in table.items() if name[1:] == (of, keep) and name[0] not in own]
            factor = sum(row.tensors for row in others) / sum(row.operands for row in others)
            for block in own:
                row = table[block, of, keep]
                assert factor * row.operands == pytest.approx(row.tensors, rel=off)


def test_adapters_are_taken_to_move_more() -> None:
    """Blocks with adapters are not in the table."""
    plain = kinds("flux-dev", height=720, width=720)
    adapted = traced(KNOWN["flux-dev"], Shape(Sampling(height=720, width=720), lora_rank=128)).kinds
    for kind, same in zip(adapted, plain, strict=True):
        assert (is_counted(kind), is_counted(same)) == (False, True)
        ours, table = (elementwise_bytes(each, "backward", "selective") for each in (kind, same))
        assert table < ours < 2 * table


def test_compilation_and_recomputation_change_what_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "block_bytes", lambda *_, **__: BlockBytes(0, 0, 0, recomputed=0.25))
    for kind in kinds("flux-dev", height=720, width=720):
        assert elementwise_bytes(kind, "rollout", compiled=False) > 2.5 * elementwise_bytes(kind, "rollout")
        none, some, full = (elementwise_bytes(kind, "backward", keep) for keep in ("none", 0.1, "full"))  # type: ignore[arg-type]
        assert some - none == pytest.approx(0.25 * (full - none))


# -- What is printed ---------------------------------------------------------------------------------------------------


def test_the_command_shows_parts_rates_and_scaling(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    asked = target(parallel__keep_gathered="never", parallel__reduce_gradients="batch", prompts__embeddings="DIRECTORY")
    asked = with_settings(asked, SHARDED | {"model.gradient_checkpointing": "selective"})
    assert plan_command(asked, "h100-80", 8, scaling=True) == 0
    shown = capsys.readouterr().out
    for words in (
        "    elementwise ",
        "    recomputation ",
        "products 680 TFLOP/s, 86% of",
        "generates for these blocks",
    ):
        assert words in shown
    rows = [line.split() for line in shown.partition("Weak scaling")[2].splitlines() if "sharded over" in line]
    assert [row[0] for row in rows] == ["8", *(n for n in ("32", "64", "128", "256", "512", "1,024") for _ in range(2))]
    efficiency = [float(row[-1].rstrip("%")) for row in rows if "copies" not in row]
    assert efficiency == sorted(efficiency, reverse=True)
    assert 90 < efficiency[-1] < efficiency[0] < 100
    assert plan_command(replace(asked, parallel=replace(asked.parallel, compile="off")), "h100-80", 8) == 0
    assert "the bytes of their operators one by one" in capsys.readouterr().out
