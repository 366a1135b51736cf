"""The library of guard.cpp: compiled once for each version of torch, and loaded before torch is."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
_NAME = "ngrpo_fake_gpu"


def library() -> Path:
    """The path of the library, which need not be there yet. It depends on the sources and on torch's version."""
    source = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    version = importlib.metadata.version("torch")
    home = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(home) / "ngrpo" / f"{_NAME}-torch{version}-{sys.implementation.cache_tag}-{source}.so"


def build() -> None:
    """Compile the library unless it is there. Torch also loads it, so this wants a process of its own."""
    if library().exists():
        return
    from torch.utils.cpp_extension import load as build_extension

    library().parent.mkdir(parents=True, exist_ok=True)
    # In a directory of its own and then into place, so that no process waits for another's lock.
    with tempfile.TemporaryDirectory(dir=library().parent, prefix="build-") as directory:
        build_extension(_NAME, [str(SOURCE)], build_directory=directory, is_python_module=False)
        (made,) = Path(directory).glob(f"{_NAME}*.so")
        os.replace(made, library())


def load() -> None:
    """Load the library. Torch asks once, when it is imported, whether there is a device."""
    assert "torch" not in sys.modules, "the fake device must be there before torch is imported"
    found = importlib.util.find_spec("torch")
    assert found is not None
    torchs = Path(str(found.origin)).parent / "lib"
    for path in (torchs / "libc10.so", torchs / "libtorch_cpu.so", library()):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    build()
