"""A world small enough for a CPU: coloured shapes, a FLUX-format pipeline that draws them, two scorers that judge."""

from importlib.resources import files
from pathlib import Path


def shapes_pipeline_dir() -> Path:
    """The shipped, pretrained pipeline: a directory in FLUX.1-dev's layout."""
    return Path(str(files("ngrpo_train.shapes") / "weights" / "pipeline"))
