"""What the worlds that ship with ngrpo share: how they are pretrained, a small FLUX, and where their weights lie.

A world is a set of prompts whose pictures or clips can be drawn and judged, and a pipeline of a few million weights, in
the format of a large model, that draws them. It is small enough to be trained on a CPU.
"""

from importlib.resources import files
from pathlib import Path

WORLDS = ("shapes", "spelling", "motion")


def pipeline_dir(world: str) -> Path:
    """The shipped, pretrained pipeline of a world: a directory in the layout of diffusers."""
    return Path(str(files(f"ngrpo_train.{world}") / "weights" / "pipeline"))
