"""What every test runs under: no network, uninitialised memory that cannot pass for a result, no process group but its
own, Triton without a GPU."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir

import hypothesis
import pytest
import torch
import torch.distributed as dist
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from . import faster
from .lanes import LANES, lanes_of

# Read when huggingface_hub and triton are first imported, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

faster.parser()
if os.environ.get("TRITON_INTERPRET") == "1":
    faster.interpreter()

hypothesis.settings.register_profile("ngrpo", deadline=None)  # a first call compiles, or interprets a kernel
hypothesis.settings.load_profile("ngrpo")


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    """`torch.empty` gives NaN (the largest integer), so that an output not fully written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """Sharded weights on one process open a group for their mesh, which the next test would take for a launcher's."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


LANE_OF_TEST = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    for lane in LANES:
        config.addinivalue_line("markers", f"{lane}: set by tests/lanes.py, from what a test is made of")


# Modules whose fixtures take longest. Several workers end together if these come first, and each on another worker.
_LONGEST = ("test_compile.py", "test_blocks.py", "test_backends.py", "test_checkpoint.py")


# First, for what `-m` leaves out is gone from the list afterwards.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lanes = lanes_of(items)
    config.stash[LANE_OF_TEST] = {item.nodeid: lane for item, lane in lanes.items()}
    length = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: (LANES.index(lanes[item]), length.get(item.path.name, len(length))))
    if hasattr(config, "workerinput"):
        whole = Path(config.workerinput[_LANES_FILE])
        part = whole.with_suffix(f".{config.workerinput['workerid']}")
        part.write_text(json.dumps(config.stash[LANE_OF_TEST]))
        part.replace(whole)  # in one piece: every worker writes the same
    for item in items:
        item.add_marker(lanes[item])
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# --- several workers: module by module, but the light tests of all modules first

_LANES_FILE = "ngrpo_lanes_file"  # where a worker leaves the lane of every test for the process that shares tests out


def pytest_configure_node(node: WorkerController) -> None:
    node.workerinput[_LANES_FILE] = f"{gettempdir()}/ngrpo-lanes-{node.workerinput['testrunuid']}.json"


class LaneByLane(LoadScopeScheduling):
    """The scheduler of `--dist loadscope`, which takes each lane's part of a module for a module of its own."""

    lanes: dict[str, str] | None = None

    def schedule(self) -> None:
        if self.lanes is None:
            file = Path(self.nodes[0].workerinput[_LANES_FILE])
            self.lanes = json.loads(file.read_text())
            file.unlink()
        super().schedule()

    def _split_scope(self, nodeid: str) -> str:
        assert self.lanes is not None
        return f"{super()._split_scope(nodeid)} {self.lanes[nodeid]}"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    return LaneByLane(config, log) if config.getoption("dist") == "loadscope" else None
