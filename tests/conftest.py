"""What every test runs under: no network, uninitialised memory that cannot pass for a result, no process group but its
own, Triton without a GPU."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch.distributed as dist

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


# Modules whose fixtures take longest. Several workers end together if these come first, and each on another worker.
_LONGEST = ("test_sharding.py", "test_distributed.py", "test_compile.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
