"""The package as it is shipped: what the wheel holds, what an import costs, and the one direction of its imports."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ngrpo_kernels
from ngrpo_train.commands.doctor import TESTED_TORCH

ROOT = Path(__file__).parents[1]

# -- The direction of imports ------------------------------------------------------------------------------------------

# A module imports from the lines above its own only; a folder, a wing, counts as one module and is free inside.
ORDER = {
    "ngrpo_kernels": """
        reference
        _inputs _tiles _cpp
        _library
        _triton
        _registry
        distances leaping advantages objective gaussian
        __init__
    """,
    "ngrpo_train": """
        __init__
        draws
        recipe
        worlds
        shapes
        spelling
        motion
        parallel
        prompts
        models
        rewards
        plan
        sampling
        update
        algorithms
        run
        profiling
        comparison
        experiments
        commands
        __main__
    """,
}
# What may come from outside: for the kernels torch and triton; for the trainer any dependency that pyproject.toml
# declares, and of ngrpo_kernels only `from ngrpo_kernels import` of names in its __all__.
KERNELS_THIRD_PARTY = {"torch", "triton"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))}


def imports(module: str, source: str, *, is_package: bool = False) -> Iterator[tuple[str, set[str], bool]]:
    """(module imported, names taken from it, whether at the top level) of every import statement in `source`."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, set(), node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = module if is_package else module.rpartition(".")[0]
            target = importlib.util.resolve_name("." * node.level + (node.module or ""), here)
            names = {alias.name for alias in node.names}
            submodules = {name for name in names if f"{target}.{name}" in SOURCES}
            yield from ((f"{target}.{name}", set(), node in tree.body) for name in submodules)
            if names - submodules:
                yield target, names - submodules, node in tree.body


def place(module: str) -> tuple[int, str]:
    """The line of a module in its package's table, and the name it goes by there."""
    package, _, rest = module.partition(".")
    stage = rest.partition(".")[0] or "__init__"
    lines = [line.split() for line in ORDER[package].strip().splitlines()]
    found = [index for index, stages in enumerate(lines) if stage in stages]
    assert found, f"{module} has no place in ORDER"
    return found[0], stage


def wrong_imports(module: str, source: str, *, is_package: bool = False) -> list[str]:
    package, wrong = module.partition(".")[0], []
    line, stage = place(module)
    for target, names, _ in imports(module, source, is_package=is_package):
        outside = target.partition(".")[0]
        if outside == package:
            target_line, target_stage = place(target)
            allowed = target_stage == stage or target_line < line
        elif outside == "ngrpo_kernels":
            allowed = target == "ngrpo_kernels" and bool(names) and names <= set(ngrpo_kernels.__all__)
        else:
            allowed = package == "ngrpo_train" or outside in KERNELS_THIRD_PARTY | sys.stdlib_module_names
        if not allowed:
            wrong.append(f"{module} imports {', '.join(sorted(names)) or 'all'} of {target}")
    return wrong


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module: str) -> None:
    path = SOURCES[module]
    assert not wrong_imports(module, path.read_text("utf-8"), is_package=path.name == "__init__.py")


@pytest.mark.parametrize(
    "module, source, allowed",
    [
        ("ngrpo_train.sampling.rollout", "from ngrpo_train.sampling.solvers import step", True),
        ("ngrpo_train.sampling.rollout", "from ngrpo_train.models.model import FlowModel", True),
        ("ngrpo_train.models.model", "from ngrpo_train.sampling.rollout import generate", False),
        ("ngrpo_train.models.model", "def step():\n    from ..sampling.rollout import generate", False),
        ("ngrpo_train.draws", "from ngrpo_train.recipe import parsing", False),
        ("ngrpo_train.run.loop", "import ngrpo_train.commands.train", False),
        ("ngrpo_train.__main__", "import ngrpo_train.commands.train", True),
        ("ngrpo_train.rewards.shapes", "from ngrpo_train.rewards.base import Reward", True),
        ("ngrpo_train.shapes.world", "from ..models.model import FlowModel", False),
        ("ngrpo_train.update.policy", "from ngrpo_kernels import LossOutput", True),
        ("ngrpo_train.update.policy", "from ngrpo_kernels import _registry", False),
        ("ngrpo_train.update.policy", "from ngrpo_kernels.reference import loss", False),
        ("ngrpo_train.update.policy", "import ngrpo_kernels", False),
        ("ngrpo_kernels.objective", "from ngrpo_kernels import reference", True),
        ("ngrpo_kernels.objective", "from ngrpo_kernels.distances import pairwise_sqdist", False),
        ("ngrpo_kernels.objective", "from . import _inputs\nfrom .leaping import ratio", False),
        ("ngrpo_kernels.objective", "import triton.language as tl", True),
        ("ngrpo_kernels.objective", "import numpy as np", False),
        ("ngrpo_kernels.reference", "from ngrpo_train.recipe import Recipe", False),
    ],
)
def test_a_wrong_import_would_be_seen(module: str, source: str, allowed: bool) -> None:
    assert (not wrong_imports(module, source)) == allowed


def test_what_is_imported_is_declared() -> None:
    """A fresh install has all that is imported at the top level; what only an extra brings is imported where used."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [text for name, texts in project["optional-dependencies"].items() if name != "dev" for text in texts]
    core = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    everything = core | {canonicalize_name(Requirement(text).name) for text in extras}
    distributions = importlib.metadata.packages_distributions()
    undeclared = set()
    for module, path in SOURCES.items():
        for target, _, at_top in imports(module, path.read_text("utf-8"), is_package=path.name == "__init__.py"):
            name = target.partition(".")[0]
            if name not in sys.stdlib_module_names and name not in ORDER:
                providers = {canonicalize_name(provider) for provider in distributions.get(name, [name])}
                if not providers & (core if at_top else everything):
                    undeclared.add((module, name))
    assert not undeclared


def test_development_stays_on_one_torch_that_was_tested_and_users_need_not() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    constraints = {
        each.name: each.specifier for each in map(Requirement, filter(None, (_bare(line) for line in lines)))
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    required = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    [pinned] = constraints["torch"]
    assert pinned.operator == "=="
    assert Version(pinned.version) <= Version(TESTED_TORCH)
    assert pinned.version in required["torch"]
    assert TESTED_TORCH in required["torch"]
    assert "999.0" in required["torch"], "no upper bound"
    assert constraints.keys() <= required.keys()


def _bare(line: str) -> str:
    return line.partition("#")[0].strip()


def test_make_installs_by_the_constraints_and_again_when_they_change(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()

    def installs(*changed: str) -> bool:
        what_if = [flag for name in changed for flag in ("--what-if", name)]
        command = ["make", "--dry-run", *what_if, ".venv/.installed"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return (
            re.search(r"-m pip install .*--constraint constraints\.txt.*--editable", done.stdout, re.DOTALL) is not None
        )

    assert not installs()
    assert installs("constraints.txt")
    assert installs("pyproject.toml")


# -- The wheel ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", directory, ROOT], check=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(directory)
    return directory


def run_outside_the_checkout(code: str, unpacked: Path, tmp_path: Path) -> str:
    """What `code` prints in a Python that finds both packages in the unpacked wheel, as a user's does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(unpacked)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    files = {item.filename: item.file_size for item in zipfile.ZipFile(wheel).infolist()}
    folders = {"ngrpo_kernels": "ngrpo_kernels", "ngrpo_train": "ngrpo_train", "csrc": "ngrpo_kernels/csrc"}
    expected = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in folders.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in files if ".dist-info/" not in name} == expected
    assert "ngrpo_train/recipe/packaged/shapes_cpu.toml" in files
    assert any(name.startswith("ngrpo_kernels/csrc/") and name.endswith(".cpp") for name in files)
    weights = {name: size for name, size in files.items() if name.startswith("ngrpo_train/shapes/weights/")}
    assert any(name.endswith(".safetensors") for name in weights)
    assert sum(weights.values()) <= 12e6


def test_the_wheel_works_outside_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    code = """
from importlib.resources import files
import ngrpo_kernels, ngrpo_train
for package in ngrpo_kernels, ngrpo_train:
    print(package.__file__)
print(files("ngrpo_train.recipe") / "packaged" / "shapes_cpu.toml")
print(files("ngrpo_train.shapes") / "weights")
print(files("ngrpo_kernels") / "csrc")
"""
    found = [Path(line) for line in run_outside_the_checkout(code, unpacked, tmp_path).splitlines()]
    assert len(found) == 5
    assert all(path.exists() and path.is_relative_to(unpacked) for path in found)


def test_no_import_touches_cuda(unpacked: Path, tmp_path: Path) -> None:
    """Every module of both packages; the recorder shows an attempt on a machine without a GPU as well."""
    code = """
import importlib, pkgutil, torch, ngrpo_kernels, ngrpo_train
attempts = []
torch.cuda._lazy_init = lambda: attempts.append(name)
for package in ngrpo_kernels, ngrpo_train:
    for _, name, _ in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(name)
assert not torch.cuda.is_initialized() and not attempts, attempts
assert callable(importlib.import_module("ngrpo_train.__main__").main)
"""
    run_outside_the_checkout(code, unpacked, tmp_path)


def test_kernels_add_under_a_second_to_torch(unpacked: Path, tmp_path: Path) -> None:
    code = "import time, torch; start = time.process_time(); import ngrpo_kernels; print(time.process_time() - start)"
    assert min(float(run_outside_the_checkout(code, unpacked, tmp_path)) for _ in range(3)) < 1
