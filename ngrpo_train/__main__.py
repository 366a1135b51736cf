"""The `ngrpo` command: train, plan, profile, embed, sample, eval, experiment, reward-server, export, doctor."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from ngrpo_train.parallel.launch import rank_at_launch
from ngrpo_train.recipe.parsing import suggestion

# Each is the module of that name in `commands`, imported when it is asked for.
COMMANDS = ("train", "plan", "profile", "embed", "sample", "eval", "experiment", "reward-server", "export", "doctor")

USAGE = """\
usage: ngrpo COMMAND ...

Neighbor GRPO, and the baselines it is compared with: align FLUX-architecture flow models with human preference.

  train  [RECIPE] [--section.field value ...]   train by a recipe (a packaged name or a TOML file; default shapes_cpu)
  plan   [RECIPE] --gpu NAME --gpus N           whether a recipe fits a GPU, and what an iteration costs there
  profile [RECIPE] --iterations N              where an iteration's time goes; command lines for Nsight
  embed  [RECIPE] --out DIRECTORY               encode the prompts once, so that training needs no text encoders
  sample RUN_OR_MODEL --prompt TEXT ...         generate pictures
  eval   RUN_OR_MODEL --rewards NAMES ...       score pictures of a model beside its base: the paper's Table 1
  experiment NAME [--base RECIPE]               a grid of runs side by side: algorithms, sigma, anchors, cost, ...
  reward-server [RECIPE] --rewards NAMES        compute rewards for trainers elsewhere, over HTTP
  export RUN --out DIRECTORY                    write a run's weights for diffusers
  doctor                                        what is installed, what works here, what is missing and how to get it

`ngrpo COMMAND --help` explains each; `ngrpo train --help` lists every setting of a recipe.
{recipes}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 2 for what the user can mend before any work, 1 for a failed reward."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _set_up_messages()
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE.format(recipes=textwrap.fill(f"packaged recipes: {', '.join(_packaged())}", 116)))
        return 0
    if command == "--version":
        print(f"ngrpo {_version()}")
        return 0
    if command not in COMMANDS:
        print(f"ngrpo: no command {command!r}{suggestion(command, COMMANDS)}; see ngrpo --help", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"ngrpo_train.commands.{command.replace('-', '_')}")
        code: int = module.main(rest)
        return code
    except ValueError as error:
        if not _raised_here(error):
            raise
        print(f"ngrpo {command}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from ngrpo_train.rewards import RewardError

        if not isinstance(error, RewardError):
            raise
        print(f"ngrpo {command}: {error}", file=sys.stderr)
        return 1


def _set_up_messages() -> None:
    """Log of rank 0 on stderr; without what libraries say, at import, of parts that nothing here uses."""
    logging.basicConfig(
        level=logging.INFO if rank_at_launch() == 0 else logging.ERROR,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # of a missing torchvision, of parts of torchao that moved
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for chatty in ("httpx", "accelerate", "torch", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for alarmist in ("torchao", "torch.utils._pytree"):  # of each other's versions
        logging.getLogger(alarmist).setLevel(logging.ERROR)


def _raised_here(error: BaseException) -> bool:
    """Whether our own code raised it, about what a user can mend. Anything else is a bug and keeps its traceback."""
    innermost = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return Path(innermost.f_code.co_filename).is_relative_to(Path(__file__).parent)


def _version() -> str:
    try:
        return version("ngrpo")
    except PackageNotFoundError:
        return "(not installed: run from a source tree)"


def _packaged() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "recipe" / "packaged").glob("*.toml"))


if __name__ == "__main__":
    sys.exit(main())
