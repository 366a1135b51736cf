"""What coarse exploration and caches cost by a plan, against sums worked out by hand."""

# C candidates that are drawn coarsely, G of them kept.

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.train_recipes import full_size
from ngrpo_train.models.sizes import KNOWN
from ngrpo_train.parallel.layout import Layout
from ngrpo_train.plan import iteration_flops, make_plan
from ngrpo_train.plan.activations import decode_pass, encode_pass
from ngrpo_train.plan.flops import transformer_flops
from ngrpo_train.plan.layout import computed_share
from ngrpo_train.plan.machines import MACHINES
from ngrpo_train.plan.memory import iteration_memory
from ngrpo_train.plan.remedies import with_settings
from ngrpo_train.plan.trace import Shape
from ngrpo_train.plan.traffic import iteration_traffic
from ngrpo_train.recipe.explore import Explore
from ngrpo_train.recipe.sections import Recipe, RolloutCache, Sampling

DEV, H200 = KNOWN["flux-dev"], MACHINES["h200-141"]
SMALL, WHOLE = (Sampling(height=side, width=side) for side in (384, 768))
C, STEPS, G = 20, 3, 5


def recipe(scale: float = 0.5, **settings: Any) -> Recipe:
    """G of C candidates at 768 x 768, as the target trains them but for retained graphs."""
    explore = Explore(candidates=C, num_inference_steps=STEPS, scale=scale)
    given = {"algorithm.explore": explore, "algorithm.num_generations": G, "parallel.retain": "off", **settings}
    return with_settings(replace(full_size(), sampling=replace(full_size().sampling, height=768, width=768)), given)


def test_operations_of_coarse_pictures() -> None:
    """A prompt is encoded for them, too."""
    flops = iteration_flops(recipe(), DEV)
    drawn = C * STEPS * transformer_flops(DEV, Shape(SMALL)).forward + C * decode_pass(DEV, SMALL).flops
    coarse = drawn + encode_pass(DEV, SMALL).flops
    assert flops.model_stages["coarse"] == flops.hardware_stages["coarse"] == coarse
    exact = iteration_flops(recipe(**{"algorithm.explore": Explore()}), DEV)
    assert flops.model == exact.model + coarse
    assert exact.model_stages["rollout"] == 8 * G * transformer_flops(DEV, Shape(WHOLE)).forward


def test_seconds_of_coarse_pictures() -> None:
    """At the whole size they are to the rollout as their evaluations are, in float8 as well; the copy is made once."""
    for dtype in ("same", "float8"):
        plan = make_plan(recipe(1.0, **{"parallel.rollout_dtype": dtype}), H200)
        assert plan.seconds
        found = {(part.stage, part.name): part.seconds for part in plan.seconds.parts}
        for name in ("products", "attention", "elementwise"):
            assert found["coarse", name] == pytest.approx(C * STEPS / (8 * G) * found["rollout", name])
        assert found["coarse", "decode"] == pytest.approx(C / G * found["decode", "decode"])
        assert ("coarse", "float8 copy") not in found
        hardware = plan.flops.hardware - plan.flops.float8 / 2
        assert plan.seconds.compute == pytest.approx(hardware / 790e12)


def test_gathers_for_coarse_pictures() -> None:
    """For each forward, once more for a rollout, or not at all where weights stay for the iteration."""
    more = {}
    for keep in ("never", "rollout", "iteration"):
        settings = {"parallel.keep_gathered": keep, "parallel.reduce_gradients": "batch"}
        asked = recipe(**settings), recipe(**settings, **{"algorithm.explore": Explore()})
        layout = Layout.of(asked[0].model, asked[0].parallel, 8, 8)
        coarse, exact = (iteration_traffic(each, DEV, layout) for each in asked)
        more[keep] = coarse.gathers - exact.gathers
        assert more[keep] == coarse.rollout_gathers - exact.rollout_gathers
    assert more == {"never": STEPS, "rollout": 1, "iteration": 0}


def test_weights_that_are_gathered_for_coarse_pictures_are_waited_for_once() -> None:
    """Over links so slow that little hides: each rollout waits for what it gathers, less its arithmetic. G at once."""
    slow = replace(MACHINES["h100-80"], nvlink_gbps=1.0)
    sharded = {
        "parallel.master_dtype": "float32",
        "optimizer.name": "adamw",
        "parallel.keep_gathered": "never",
        "parallel.reduce_gradients": "batch",
    }
    seconds = make_plan(recipe(1.0, **sharded), slow, 8).seconds
    assert seconds
    found = {(part.stage, part.name): part.seconds for part in seconds.parts}
    for stage, forwards in (("coarse", C // G * STEPS), ("rollout", 8)):
        hidden = sum(found[stage, name] for name in ("products", "attention", "elementwise"))
        each = 2 * 11_901_408_320 * 7 / 8 / 0.8e9  # 26 s
        assert found[stage, "links"] == pytest.approx(forwards * each - hidden, rel=1e-3)


def test_many_coarse_pictures_take_memory() -> None:
    """Made large in float32, beside their bytes: here more than the rollout's forwards take. Whole ones stay bytes."""
    settings = {"parallel.rollout_batch": 1, "parallel.decode_batch": 1}
    held = []
    for scale in (0.5, 1.0):
        many = recipe(**settings, **{"algorithm.explore": Explore(candidates=1000, scale=scale)})
        layout = Layout.of(many.model, many.parallel, 1, 1)
        held.append(iteration_memory(many, DEV, layout).phases["rollout"]["activations"])
    half, whole = held
    assert half == (4 + 1) * 1000 * 3 * 768 * 768
    assert whole < half


@pytest.mark.parametrize("full, interval, N, computed", [(2, 2, 8, 5), (2, 3, 8, 4), (1, 1, 8, 8), (9, 2, 8, 8)])
def test_steps_that_a_taylor_cache_computes(full: int, interval: int, N: int, computed: int) -> None:
    """Of 8 steps 0, 1, 3, 5, 7; or 0, 1, 3, 6; or all."""
    cache = RolloutCache(kind="taylor_seer", full_steps=full, interval=interval)
    asked = with_settings(full_size(), {"parallel.rollout_cache": cache, "sampling.num_inference_steps": N})
    assert computed_share(asked) == computed / N
    picture, flops = transformer_flops(DEV, Shape(asked.sampling)), iteration_flops(asked, DEV)
    evaluations = 12 * N * picture.around + 12 * computed * picture.blocks
    assert flops.hardware_stages["rollout"] == pytest.approx(evaluations)
    unknown = with_settings(asked, {"parallel.rollout_cache": RolloutCache(kind="first_block")})
    assert computed_share(unknown) == 1
