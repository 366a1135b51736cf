"""What every test runs under: no network, uninitialised memory that cannot pass for a result, no process group but its
own, Triton without a GPU."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch.distributed as dist

from .lanes import LANES, lanes_of

# Read when huggingface_hub and triton are first imported, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

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
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))
    lanes = lanes_of(items)
    config.stash[LANE_OF_TEST] = {item.nodeid: lane for item, lane in lanes.items()}
    for item in items:
        item.add_marker(lanes[item])
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
