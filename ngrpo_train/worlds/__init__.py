"""What the worlds that ship with ngrpo share: a small FLUX, how it is pretrained, and where their weights lie.

A world is a set of prompts whose pictures can be drawn and judged, and a FLUX-format pipeline of a few million weights
that draws them. It is small enough to be trained on a CPU.
"""

from importlib.resources import files
from pathlib import Path

WORLDS = ("shapes", "spelling")


def pipeline_dir(world: str) -> Path:
    """The shipped, pretrained pipeline of a world: a directory in FLUX.1-dev's layout."""
    return Path(str(files(f"ngrpo_train.{world}") / "weights" / "pipeline"))
