"""Every way to lay weights over processes trains as one process does: full, hybrid, whole copies; kept, offloaded."""

from pathlib import Path

import pytest
import torch

from ..runs import TOLERANCE, TWO_PROMPTS, Run, assert_close, assert_close_figures, figures, observed, on_ranks

PROMPTS = [*TWO_PROMPTS, "a large blue star on a white background", "a small red circle on a purple background"]
# Several forward-backwards for each optimizer step, and every forward of the same size however many processes share the
# prompts: then all that differs is the order in which gradients are summed. With candidates far apart, rewards spread
# widely in a group, against the byte of a picture that this may round otherwise.
BY_ROW = {
    "parallel.update-batch": "1",
    "parallel.rollout-batch": "4",
    "parallel.decode-batch": "4",
    "parallel.retain": "off",
    "algorithm.sigma": "1",
}
RETAINED = BY_ROW | {"parallel.retain": "on", "parallel.stream": "on"}  # also where it trains alone
LORA = {"model.tuning": "lora", "model.lora-rank": "4"}

# What each case shares with one plain process, and what it lays out otherwise, by number of processes.
CASES: dict[int, dict[str, tuple[dict[str, str], dict[str, str]]]] = {
    2: {
        "copies": (BY_ROW, {"sharding": "none"}),
        "copies-lora": (BY_ROW | LORA, {"sharding": "none"}),
        "never-reduce_batch-stream": (
            BY_ROW,
            {"keep-gathered": "never", "reduce-gradients": "batch", "stream": "on"},
        ),
        "iteration-lora-stream": (BY_ROW | LORA, {"keep-gathered": "iteration", "stream": "on"}),
        "iteration-retain": (RETAINED, {"keep-gathered": "iteration", "reduce-gradients": "batch"}),
        "offload-two_updates": (
            BY_ROW | {"algorithm.updates-per-iteration": "2"},
            {"offload": "True", "keep-gathered": "iteration"},
        ),
    },
    4: {
        "full": (BY_ROW, {"sharding": "full"}),
        "hybrid": (BY_ROW, {"sharding": "hybrid", "shard-size": "2"}),
        "hybrid-reduce_batch": (BY_ROW, {"sharding": "hybrid", "shard-size": "2", "reduce-gradients": "batch"}),
    },
}
ALL = [(ranks, case) for ranks, cases in CASES.items() for case in cases]


def shares(prompts: int, *, streams: bool) -> dict[str, str]:
    """The prompts of a process, explored together or one after the other."""
    together, parts = (1, prompts) if streams else (prompts, 1)
    return {"prompts.per-rank": str(together), "train.gradient-accumulation-steps": str(parts)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, as several ranks make it and as one process does."""
    directory = tmp_path_factory.mktemp("sharding")
    prompts = directory / "four.txt"
    prompts.write_text("\n".join(PROMPTS))
    alone: list[dict[str, str]] = []
    for ranks, cases in CASES.items():
        runs = []
        for case, (shared, layout) in cases.items():
            streams = "stream" in layout or shared is RETAINED
            recipe = shared | {"prompts.source": str(prompts)} | shares(4 // ranks, streams=streams)
            runs.append(Run(directory / case, recipe | {f"parallel.{name}": value for name, value in layout.items()}))
            if shared not in alone:
                alone.append(shared)
        on_ranks(ranks, runs)
    for index, shared in enumerate(alone):
        recipe = shared | {"prompts.source": str(prompts)} | shares(4, streams=shared is RETAINED)
        assert Run(directory / f"alone_{index}", recipe).make() == 0
    for cases in CASES.values():
        for case, (shared, _) in cases.items():
            (directory / f"{case}-alone").symlink_to(directory / f"alone_{alone.index(shared)}")
    return directory


@pytest.mark.parametrize("ranks, case", ALL, ids=[f"{ranks}-{case}" for ranks, case in ALL])
def test_several_processes_train_as_one_does(made: Path, ranks: int, case: str) -> None:
    """Rewards, advantages, norms of dL/dv and of gradients, optimizer state and weights after three iterations."""
    mine, theirs = observed(made / f"{case}-alone"), observed(made / case)
    for name in ("rewards", "advantages"):
        assert torch.equal(theirs[name], observed(made / case, rank=ranks - 1)[name])
        torch.testing.assert_close(theirs[name], mine[name], rtol=0, atol=TOLERANCE[name])
    rows, expected = figures(made / case), figures(made / f"{case}-alone")
    assert any(name.startswith("velocity_grad_norm/") for name in rows[0])
    assert_close_figures(rows, expected, mine["gains"])
    assert_close(made / case, made / f"{case}-alone")
