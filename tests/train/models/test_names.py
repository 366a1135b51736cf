"""Only `models/` and the worlds, which have models of their own, know a model by the name of its class."""

import re
from pathlib import Path

import diffusers

import ngrpo_train

PACKAGE = Path(ngrpo_train.__file__).parent
AT_HOME = {"models", "worlds", "shapes", "spelling", "motion"}
CLASSES = re.compile(r"\w+(Pipeline|Transformer\w*Model)|Autoencoder\w+")


def classes_in(file: Path) -> set[str]:
    """The classes of diffusers' models and pipelines that a file names."""
    words = set(re.findall(r"\w+", file.read_text()))
    return {name for name in words & set(dir(diffusers)) if CLASSES.fullmatch(name)} - {"DiffusionPipeline"}


def test_nothing_else_knows_a_model_by_name() -> None:
    assert "FluxTransformer2DModel" in classes_in(PACKAGE / "models" / "loading.py"), "names are found"
    files = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in AT_HOME]
    assert len(files) > 100
    assert {str(file.relative_to(PACKAGE)): found for file in files if (found := classes_in(file))} == {}
