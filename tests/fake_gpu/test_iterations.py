"""Whole iterations of FLUX.1-dev on GPUs that are not there: what makes the host wait, and what takes memory.

In full width with one block of each kind; at full depth under `make slow`. Nothing has values, so nothing here says
that results are right: that is for the CPU's tests. A tensor on the wrong device ends an iteration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from .cases import Case, Seen, case, seen_of

READS, EVENT = "the host reads from the device", "an event is waited for"
Waits = Mapping[tuple[str, str, str], int]

ONCE: Waits = {
    ("reward", "ngrpo_train/rewards/__init__.py:Rewards.__call__", READS): 1,
    ("metrics", "ngrpo_train/run/metrics.py:_reduced", READS): 1,
}
# torchao's optimizer cannot skip a step on the device.
NORM_OF_A_STEP: Waits = {("step", "ngrpo_train/update/optimizer.py:guarded_step", READS): 1}
# The optimizer works on the host, so it waits for the gradients and their norm. FSDP has an event for each of 66.
OFFLOADED: Waits = {
    ("update", "_fully_shard/_fsdp_param_group.py:FSDPParamGroup.finalize_backward", EVENT): 66,
    ("step", "ngrpo_train/parallel/sharding.py:clip_grad_norm", READS): 1,
    ("step", "ngrpo_train/update/optimizer.py:guarded_step", READS): 1,
}

ADAMW, FLOAT32 = {"name": "adamw"}, {"master_dtype": "float32"}
ADAPTERS = {"model": {"tuning": "lora"}, "optimizer": ADAMW, "parallel": FLOAT32}
SHORT = {"sampling": {"num_inference_steps": 4}}
FEW = SHORT | {"algorithm": {"num_train_steps": 2}}
SHORTEST = FEW | {"sampling": {"num_inference_steps": 3}}


@dataclass(frozen=True, kw_only=True)
class Expected:
    case: Case
    waits: Waits = field(default_factory=dict)
    """Beside those of every iteration."""
    fused: tuple[str, ...] = ()
    """Stages whose arithmetic only compiled code does without large temporary tensors."""


RECIPES = {
    "full": Expected(case=case(**FEW), waits=NORM_OF_A_STEP, fused=("step",)),
    "four updates": Expected(
        case=case(
            **SHORT,
            model={"ema": 0.99},
            algorithm={"num_train_steps": 2, "updates_per_iteration": 4, "kl_coef": 0.1},
            optimizer=ADAMW,
            parallel={**FLOAT32, "update_batch": 1},
        )
    ),
    "lora": Expected(case=case(**SHORT, **ADAPTERS, algorithm={"num_train_steps": 2, "reference_coef": 0.1})),
    "nf4": Expected(case=case(**FEW, **ADAPTERS | {"model": {"tuning": "lora", "base_dtype": "nf4"}})),
    "fsdp": Expected(case=case("H100", 8, **FEW, optimizer=ADAMW, parallel=FLOAT32, prompts={"per_rank": 2})),
    "float8 rollout": Expected(
        case=case(
            "H100",
            8,
            **FEW,
            optimizer=ADAMW,
            parallel={**FLOAT32, "sharding": "hybrid", "shard_size": 4, "rollout_dtype": "float8"},
        ),
        fused=("rollout",),
    ),
    "lora, sharded": Expected(
        case=case("H100", 8, **FEW, **ADAPTERS | {"parallel": {**FLOAT32, "text_encoders": "shard"}})
    ),
    "offload": Expected(
        case=case("H100", **FEW, optimizer=ADAMW, parallel={**FLOAT32, "offload": True, "text_encoders": "offload"}),
        waits=OFFLOADED,
    ),
    "flow_grpo": Expected(case=case(**SHORT, **ADAPTERS, algorithm={"name": "flow_grpo", "num_generations": 4})),
    "mix_grpo_flash": Expected(
        case=case(**SHORT, **ADAPTERS, algorithm={"name": "mix_grpo_flash", "num_generations": 4, "window_size": 2})
    ),
    "branch_grpo": Expected(
        case=case(
            **SHORT,
            **ADAPTERS,
            algorithm={
                "name": "branch_grpo",
                "num_generations": 4,
                "branch_steps": [0, 1],
                "width_pruning": "extremes",
                "updates_per_iteration": 2,
            },
        )
    ),
}

WHOLE = {
    "full": Expected(case=case(**SHORTEST, name_or_path="random:flux-dev"), waits=NORM_OF_A_STEP, fused=("step",)),
    "fsdp": Expected(
        case=case("H100", 8, **SHORTEST, name_or_path="random:flux-dev", optimizer=ADAMW, parallel=FLOAT32)
    ),
}


@pytest.fixture(scope="module")
def shallow() -> dict[str, Seen]:
    return seen_of({name: expected.case for name, expected in RECIPES.items()})


@pytest.fixture(scope="module")
def whole() -> dict[str, Seen]:
    return seen_of({name: expected.case for name, expected in WHOLE.items()})


@pytest.mark.parametrize("name", RECIPES)
def test_an_iteration_waits_for_the_device_where_it_must(shallow: dict[str, Seen], name: str) -> None:
    """Above all, neither a rollout nor a forward or backward pass waits, or copies ordinary host memory."""
    assert shallow[name].waited == {**ONCE, **RECIPES[name].waits}


@pytest.mark.parametrize("name", RECIPES)
def test_memory_stays_below_the_plan(shallow: dict[str, Seen], name: str) -> None:
    """The plan's bounds for a single block weigh more where there is but one of each kind."""
    refuse_another_plan(shallow[name], RECIPES[name].fused, most_below=0.2)


def test_pinned_host_memory_is_the_plans(shallow: dict[str, Seen]) -> None:
    """The rest is noise and other small tensors on their way to the device."""
    seen = shallow["offload"]
    assert seen.planned_pinned <= seen.pinned <= seen.planned_pinned + 32 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_model_takes_what_the_plan_says(whole: dict[str, Seen], name: str) -> None:
    assert whole[name].waited == {**ONCE, **WHOLE[name].waits}
    refuse_another_plan(whole[name], WHOLE[name].fused, most_below=0.05)


def refuse_another_plan(seen: Seen, fused: tuple[str, ...], *, most_below: float) -> None:
    share = {stage: seen.peaks[stage] / seen.planned[stage] for stage in seen.planned if stage not in fused}
    assert share.keys() >= {"encode", "decode", "update"}
    # A plan counts weights that an earlier part of the prompts has left gathered, and here there is one part.
    assert share.pop("encode") <= 1.05
    assert all(1 - most_below <= each <= 1.05 for each in share.values()), share
