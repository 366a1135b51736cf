"""Build and loading of the C++ in csrc: compiled on first use, and reused by every later process of the user.

The name of a library holds a hash of everything that it depends on. A library that exists is therefore the right one,
and loading it needs no compiler.
"""

import hashlib
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path

import torch

# What PyTorch asks of a CPU before it uses these sets itself; elsewhere the compiler's default is kept.
CPU_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
# The stable ABI of PyTorch 2.11, the oldest in range: without PyTorch's full headers a build takes seconds.
FLAGS = ["-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]

_lock = threading.Lock()
_failures: dict[Path, str] = {}
_loaded = False


def why_not() -> str | None:
    """Reason why the C++ cannot be used, as far as this is known without compiling it; None if it can."""
    if is_turned_off():
        return "NGRPO_CPP=0 turns it off"
    if source_directory() is None:
        return "its sources (csrc) are not installed"
    problem = _missing_tool()
    return problem if problem and not (_loaded or library_path().exists()) else None


def _missing_tool() -> str | None:
    compiler = os.environ.get("CXX", "c++")  # as torch.utils.cpp_extension chooses it
    if not shutil.which(next(iter(shlex.split(compiler)), "")):
        return f"there is no C++ compiler: {compiler!r} is not on PATH (CXX names another)"
    if not shutil.which("ninja"):
        return "ninja is not on PATH (pip install ninja)"
    return None


def load() -> str | None:
    """Load the C++, built first if necessary; return why that failed, or None. A failed build is not tried again."""
    global _loaded
    if _loaded and not is_turned_off():
        return None
    with _lock:
        problem = why_not()
        if problem is not None or _loaded:
            return problem
        library = library_path()
        if library not in _failures:
            try:
                if library.exists():
                    torch.ops.load_library(library)
                else:
                    _build_and_load(library)
                _loaded = True
            except (OSError, RuntimeError) as error:  # no room or no right to write, or the compiler's message
                _failures[library] = f"it could not be built or loaded in {library.parent}: {error}"
        return _failures.get(library)


def is_turned_off() -> bool:
    return os.environ.get("NGRPO_CPP") == "0"


def source_directory() -> Path | None:
    """Directory csrc inside the package, as in a wheel, or beside it, as in a checkout; None if there is neither."""
    package = Path(__file__).parent
    return next((path for path in (package / "csrc", package.parent / "csrc") if (path / "ops.cpp").is_file()), None)


def library_path() -> Path:
    """Path of the library that is built from these sources for this PyTorch, Python and CPU."""
    directory = source_directory()
    assert directory is not None
    built_from = hashlib.sha256(" ".join(_flags()).encode())
    for path in sorted(directory.iterdir()):
        if path.suffix in (".cpp", ".h"):
            built_from.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    names = (
        f"torch{torch.__version__}",
        sys.implementation.cache_tag,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        built_from.hexdigest()[:16],
    )
    return cache_directory() / f"ngrpo_cpp-{'-'.join(names)}{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"


def cache_directory() -> Path:
    """Directory of this user's PyTorch extensions, which TORCH_EXTENSIONS_DIR sets, and ngrpo in it."""
    from torch.utils.cpp_extension import get_default_build_root  # slow to import

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / "ngrpo"


def _flags() -> list[str]:
    return FLAGS + CPU_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])


def _build_and_load(library: Path) -> None:
    from torch.utils.cpp_extension import load as build_extension

    directory = source_directory()
    assert directory is not None
    library.parent.mkdir(parents=True, exist_ok=True)
    # Every process builds in a directory of its own and moves the result into place. So no process waits for another's
    # lock, which would stay behind when that process is killed.
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as build:
        build_extension(
            name="ngrpo_cpp",
            sources=[str(path) for path in sorted(directory.glob("*.cpp"))],
            extra_cflags=_flags(),
            build_directory=build,
            is_python_module=False,
        )
        (built,) = Path(build).glob("ngrpo_cpp*" + library.suffix)
        os.replace(built, library)
