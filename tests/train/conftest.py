"""Fixtures: tiny FLUX pipelines in directories, and what loads and trains them in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from ngrpo_train.__main__ import main
from ngrpo_train.models.model import FlowModel
from ngrpo_train.recipe.sections import Model, Parallel, Sampling

from ..tiny import PROMPTS, SCORERS, SIZE, save_pipeline, write_recipe


@pytest.fixture(autouse=True)
def _attention_as_it_was() -> Iterator[None]:
    """diffusers keeps the last attention backend that a model was given for all models of the process."""
    backend, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(backend)


@pytest.fixture(scope="session")
def tiny_dev(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a pipeline like FLUX.1-dev: guidance embedding, dynamic shifting."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return save_pipeline(tmp_path_factory.mktemp("dev"), guidance_embeds=True, scheduler=scheduler)


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a pipeline like FLUX.1-schnell: no guidance embedding, shift 1."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return save_pipeline(tmp_path_factory.mktemp("schnell"), guidance_embeds=False, scheduler=scheduler)


@pytest.fixture(scope="session")
def load_flux() -> Callable[..., FlowModel]:
    """Loads a pipeline for training at a tiny size; keywords are fields of Model, Sampling or Parallel."""

    def load(directory: str, **changes: object) -> FlowModel:
        sections = []
        defaults = {
            Model: {"name_or_path": directory, "gradient_checkpointing": "none", "lora_rank": 4, "lora_alpha": 4},
            Sampling: {"height": SIZE, "width": SIZE, "max_sequence_length": 16, "num_inference_steps": 4},
            Parallel: {"device": "cpu", "compute_dtype": "float32"},
        }
        for section, values in defaults.items():
            names = section.__dataclass_fields__.keys() & changes.keys()
            sections.append(section(**values | {name: changes.pop(name) for name in names}))
        assert not changes, changes
        return FlowModel(*sections, torch.device("cpu"))

    return load


@pytest.fixture(scope="session")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A module of scorers, by name: `brightness` and `redness` of pictures."""
    directory = tmp_path_factory.mktemp("scorers")
    (directory / "tiny_scorers.py").write_text(SCORERS)
    return str(directory)


@pytest.fixture
def tiny_recipe(tiny_dev: str, scorers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of two iterations on `tiny_dev`, in `tmp_path`, where runs go too."""
    monkeypatch.syspath_prepend(scorers)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    return write_recipe(Path("tiny.toml"), tiny_dev, "prompts.txt")


@pytest.fixture
def ngrpo(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
