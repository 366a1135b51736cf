"""Encoders of any pipeline that lie sharded over two processes, which encode unlike numbers of prompts."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from ngrpo_train.models.driven import _Seen
from ngrpo_train.models.pipeline import Pipeline
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Model, Parallel, Sampling

from ...families import FAMILIES
from ..runs import ended, forked, free_ports

TEXTS = ("a large red circle on a blue background", "two dogs", "a cat")
MODELS = ("sd35", "qwen_image")  # three encoders of fixed lengths; a language model, and texts of any length


def encoded(directory: Path, family: str, count: int, placement: str) -> list[torch.Tensor]:
    sampling = Sampling(**FAMILIES[family].sampling)
    settings = Parallel(device="cpu", compute_dtype="float32", text_encoders=placement)  # type: ignore[arg-type]
    model = Pipeline(Model(name_or_path=str(directory / family)), sampling, settings, torch.device("cpu"))
    if placement == "shard":
        largest = max(model._encoder_modules(), key=lambda each: sum(p.numel() for p in each.parameters()))
        assert all(isinstance(parameter, DTensor) for parameter in largest.parameters())
    record = model.encode([Prompt(text) for text in TEXTS[:count]])
    return [value for value in record.values if isinstance(value, torch.Tensor)]


def on_a_rank(directory: Path) -> None:
    with processes.joined(Parallel(device="cpu")):
        for family in MODELS:
            values = encoded(directory, family, 1 + 2 * processes.rank(), "shard")  # one prompt, and three
            torch.save(values, directory / f"{family}_{processes.rank()}.pt")


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("families")
    for family in MODELS:
        FAMILIES[family].save(directory / family)
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    logs = [directory / f"rank_{rank}.txt" for rank in range(2)]
    ranks = [
        forked(log, on_a_rank, directory, **group, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, log in enumerate(logs)
    ]
    for rank, log in zip(ranks, logs, strict=True):
        ended(rank, log)
    return directory


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("family", MODELS)
def test_sharded_encoders_give_what_whole_ones_do(on_two_ranks: Path, family: str, rank: int) -> None:
    got = torch.load(on_two_ranks / f"{family}_{rank}.pt", weights_only=True)
    want = encoded(on_two_ranks, family, 1 + 2 * rank, "device")
    assert len(got) == len(want) > 0
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_inputs_go_to_the_device_that_computes_and_not_to_where_weights_wait() -> None:
    """Offloaded weights are in host memory between their uses: a transformer then says that it is there."""

    class Waiting(torch.nn.Module):
        device = torch.device("meta")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    seen = _Seen(Waiting(), torch.device("cpu"), torch.float32)
    seen.compute = Waiting()
    assert seen(torch.ones(2)).device.type == "cpu"
