"""`ngrpo doctor`: what is installed, what this machine has, what is missing and how to get it. It uses no network."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from diffusers.models.attention_dispatch import AttentionBackendName

TESTED_TORCH = "2.14.1"
"""The newest PyTorch that the whole test suite has passed on; constraints.txt pins it for development and CI."""

Status = Literal["ok", "absent", "missing", "too old", "too new", "broken"]  # absent: optional, and not installed


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the report. A required row that is not ok makes the command fail."""

    section: str
    name: str
    found: str
    status: Status = "ok"
    note: str = ""
    """Purpose, the reason why it cannot be used, or the command that installs or repairs it."""
    required: bool = False


# Packages that ngrpo needs for only one feature: name, purpose, how to install it.
OPTIONAL = (
    ("ftfy", "for prompts repaired as CLIP's own tokenizer repairs them", 'pip install "ngrpo[rewards]"'),
    ("rapidocr", "for the reward ocr", 'pip install "ngrpo[ocr]"'),
    ("starlette", "for ngrpo reward-server", 'pip install "ngrpo[server]"'),
    ("xformers", "for the attention backend xformers", 'pip install "ngrpo[xformers]"'),
    ("flash-attn", "for the attention backend flash; needs nvcc", "pip install flash-attn --no-build-isolation"),
    ("torchao", "for 8-bit AdamW and float8 rollouts", 'pip install "ngrpo[torchao]"'),
    ("nvtx", "for named ranges in Nsight", 'pip install "ngrpo[profile]"'),
    ("wandb", "for the Weights & Biases tracker", 'pip install "ngrpo[wandb]"'),
    ("pyarrow", "for prompts from parquet files", 'pip install "ngrpo[parquet]"'),
)


def report() -> list[Row]:
    """All rows that `main` prints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complaints of a driver or a backend become rows
        return [
            *_packages(),
            *_optional_packages(),
            *_devices(),
            *_loss_backends(),
            *_attention_backends(),
            *_reward_weights(),
        ]


def main(arguments: Sequence[str] = ()) -> int:
    """Print the report. Returns 0 if everything required is in order, 1 otherwise, and 2 for an argument."""
    if arguments:
        print(f"usage: ngrpo doctor [-h]\n\n{__doc__}")
        return 0 if arguments[0] in ("-h", "--help") else 2
    rows, console = report(), Console()
    colours: dict[str, str] = {"ok": "green", "absent": "yellow"}
    for section in dict.fromkeys(row.section for row in rows):
        table = Table(title=section, title_justify="left", title_style="bold", show_header=False, box=SIMPLE)
        for column in range(4):
            table.add_column(overflow="fold", no_wrap=column == 2)
        for row in (row for row in rows if row.section == section):
            status = Text(row.status, style=colours.get(row.status, "red"))
            table.add_row(Text(row.name), Text(row.found), status, Text(row.note))
        console.print(table)
    problems = [row for row in rows if row.required and row.status != "ok"]
    for row in problems:
        console.print(Text(f"{row.name} is {row.status}: {row.note}", style="red"), soft_wrap=True)
    if not problems:
        console.print(Text("Everything that ngrpo requires is in order.", style="green"))
    return 1 if problems else 0


def compare(requirement: Requirement, version: str | None, section: str = "Packages") -> Row:
    """The row of one required distribution; `version` is the installed one, None if it is not installed."""
    install = f'pip install "{requirement.name}{requirement.specifier}"'
    if version is None:
        return Row(section, requirement.name, "", "missing", install, required=True)
    for bound in requirement.specifier:
        if not SpecifierSet(str(bound)).contains(version, prereleases=True):
            status: Status = "too new" if bound.operator.startswith("<") else "too old"
            return Row(section, requirement.name, version, status, install, required=True)
    return Row(section, requirement.name, version, note=str(requirement.specifier), required=True)


def beside_tested(torch_row: Row) -> Row:
    """The row of torch, with the version that was tested. A newer one is no problem, but the row mentions it."""
    if torch_row.status != "ok":
        return torch_row
    # Without the build's suffix: 2.13.0+cpu is 2.13.0.
    newer = Version(Version(torch_row.found).base_version) > Version(TESTED_TORCH)
    tested = f"newer than {TESTED_TORCH}, the newest that ngrpo was tested with" if newer else f"tested: {TESTED_TORCH}"
    return replace(torch_row, note=f"{torch_row.note}; {tested}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Row]:
    section, python, version = "Packages", platform.python_version(), _version("ngrpo")
    yield Row(section, "platform", f"{platform.system()} {platform.release()} {platform.machine()}")
    if version is None:
        yield Row(section, "Python", python, note=sys.executable)
        yield Row(section, "ngrpo", "", "missing", "pip install ngrpo, in a checkout pip install -e .", required=True)
    else:
        supported = importlib.metadata.metadata("ngrpo")["Requires-Python"]
        status: Status = "ok" if SpecifierSet(supported).contains(python, prereleases=True) else "too old"
        yield Row(section, "Python", python, status, f"{supported}, {sys.executable}", required=True)
        yield Row(section, "ngrpo", version, required=True)
        for requirement in map(Requirement, importlib.metadata.requires("ngrpo") or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                row = compare(requirement, _version(requirement.name), section)
                yield beside_tested(row) if requirement.name == "torch" else row
    cuda, rocm = torch.version.cuda, torch.version.hip
    yield Row(section, "torch build", f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPU")
    if importlib.util.find_spec("torchvision") is not None:
        yield _torchvision()


def _torchvision() -> Row:
    """The row of torchvision. A build that does not match torch fails at import, with transformers' T5 and CLIP."""
    row = ("Packages", "torchvision", _version("torchvision") or "unknown version")
    imported = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    if imported.returncode == 0:
        return Row(*row, note="ngrpo does not use it")
    error = imported.stderr.strip().rpartition("\n")[2]
    return Row(*row, "broken", f"pip uninstall torchvision (it breaks the text encoders: {error})", required=True)


def _optional_packages() -> Iterator[Row]:
    for name, purpose, install in OPTIONAL:
        version = _version(name)
        if version is None:
            yield Row("Optional packages", name, "", "absent", f"{purpose}: {install}")
        else:
            yield Row("Optional packages", name, version, note=purpose)
    row, purpose = ("Optional packages", "tesseract"), 'a program, for reader = "tesseract" of the reward ocr'
    if program := shutil.which("tesseract"):
        yield Row(*row, program, note=purpose)
    else:
        yield Row(*row, "", "absent", f"{purpose}: apt install tesseract-ocr")


def _devices() -> Iterator[Row]:
    section = "Devices"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Row(section, "CPU", f"{cores} cores, {memory_gib:.1f} GiB", note=platform.processor() or platform.machine())
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            found = f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, capability {gpu.major}.{gpu.minor}"
            yield Row(section, f"GPU {index}", found, note="" if gpu.major >= 8 else "slow: no bfloat16 tensor cores")
    elif torch.version.cuda is None and shutil.which("nvidia-smi"):
        yield Row(
            section,
            "GPU",
            "not visible to torch",
            "absent",
            "this torch is built for the CPU only: install a CUDA build",
        )
    elif torch.version.cuda is not None:
        yield Row(
            section, "GPU", "none", "absent", f"CUDA {torch.version.cuda} finds no GPU that it can use: see nvidia-smi"
        )
    else:
        yield Row(section, "GPU", "none", "absent", "the shapes recipes run on the CPU; FLUX.1-dev needs a GPU")


def _loss_backends() -> Iterator[Row]:
    section = "Loss kernels"
    try:
        from ngrpo_kernels import available_backends

        backends = available_backends()
    except Exception as error:  # this command looks for errors of any kind
        yield Row(section, "ngrpo_kernels", "", "broken", f"{type(error).__name__}: {error}", required=True)
        return
    for index, backend in enumerate(backends):
        yield Row(section, backend, "available" if index else "in use")
    for variable in ("TRITON_INTERPRET", "NGRPO_CPP"):
        if variable in os.environ:
            yield Row(section, variable, os.environ[variable], note="set in the environment")
    purpose, beside_python = "builds the C++ kernels for the CPU", Path(sys.executable).parent
    for name, command, install in (
        ("C++ compiler", os.environ.get("CXX", "c++"), "install g++ or clang++"),
        ("ninja", "ninja", "pip install ninja"),
    ):
        if path := shutil.which(command):
            yield Row(section, name, path, note=purpose)
        elif path := shutil.which(command, path=str(beside_python)):
            yield Row(section, name, path, "absent", f"{purpose}; not on PATH: activate this Python's environment")
        else:
            yield Row(section, name, "", "absent", f"{purpose}; no {command} on PATH: {install}")


def _attention_backends() -> Iterator[Row]:
    """Rows of all backends that diffusers knows, tried forward and backward; one row for each reason of failure."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    section = f"Attention backends of diffusers, tried on the {'GPU' if device == 'cuda' else 'CPU'}"
    try:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        backends = _AttentionBackendRegistry.list_backends()
        in_use, _ = _AttentionBackendRegistry.get_active_backend()
    except Exception as error:  # diffusers cannot be imported, or moved its registry
        yield Row(section, "diffusers", "", "broken", f"{type(error).__name__}: {error}", required=True)
        return
    unusable: dict[str, list[str]] = {}
    for backend in backends:
        usable, note = _try_attention(backend, device)
        if usable:
            yield Row(section, backend.value, "in use" if backend == in_use else "usable", note=note)
        else:
            unusable.setdefault(note, []).append(backend.value)
    for note, names in unusable.items():
        yield Row(section, "\n".join(names), "", "absent", note)


def _reward_weights() -> Iterator[Row]:
    """Rows of all shipped scorers: the files that each reads from the hub, and whether they are in the cache."""
    from huggingface_hub import try_to_load_from_cache

    from ngrpo_train.parallel.hub import download_command
    from ngrpo_train.rewards import shipped

    section = "Weights of the rewards, in the cache of the Hugging Face hub"
    for reward in shipped.NAMES:
        try:
            ours = shipped.find(reward)
        except Exception as error:  # a library that it needs cannot be imported
            yield Row(section, reward, "", "broken", f"{type(error).__name__}: {error}")
            continue
        for repository, names in ours.hub_files if ours else ():
            cached = all(isinstance(try_to_load_from_cache(repository, name), str) for name in names)
            if cached:
                yield Row(section, reward, repository)
            else:
                yield Row(section, reward, "", "absent", download_command(repository, names))


def _try_attention(backend: "AttentionBackendName", device: str) -> tuple[bool, str]:
    """True if `backend` runs on `device`, and its limits; else False and the reason."""
    from diffusers.models.attention_dispatch import _check_attention_backend_requirements, dispatch_attention_fn

    try:
        _check_attention_backend_requirements(backend)
    except RuntimeError as error:
        return False, str(error).rpartition("Please ")[2].replace("`", "").rstrip(".")  # "... Please install `this`."
    if backend.value.endswith("_hub"):
        return False, "not tried: downloads its kernel on first use"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key, value = torch.zeros(3, 1, 128, 2, 64, device=device, dtype=dtype)  # batch, tokens, heads, channels
    try:
        dispatch_attention_fn(query, key, value, backend=backend)
    except Exception as error:  # each backend refuses in its own way
        return False, str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    try:
        dispatch_attention_fn(query.requires_grad_(), key, value, backend=backend).sum().backward()
    except Exception:
        return True, "forward only: no gradient on this device"
    return True, "forward and backward"
