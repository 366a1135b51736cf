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

# Each is a module of that name in `commands`, which is imported when the command is asked for.
COMMANDS = ("train", "plan", "profile", "embed", "sample", "eval", "experiment", "reward-server", "export", "doctor")

USAGE = """\
usage: ngrpo COMMAND ...

Neighbor GRPO, and the baselines it is compared with: align flow models of pictures and videos with human preference.

  train  [RECIPE] [--section.field value ...]   train by a recipe (a packaged name or a TOML file; default shapes_cpu)
  plan   [RECIPE] --gpu NAME --gpus N           show if a recipe fits a GPU, and what an iteration costs
  profile [RECIPE] --iterations N               measure the stages of an iteration; command lines for Nsight
  embed  [RECIPE] --out DIRECTORY               encode the prompts once, so that training needs no text encoders
  sample RUN_OR_MODEL --prompt TEXT ...         generate pictures
  eval   RUN_OR_MODEL --rewards NAMES ...       score pictures of a model beside its base: the paper's Table 1
  experiment NAME [--base RECIPE]               train a grid of runs: algorithms, sigma, anchors, cost, ...
  reward-server [RECIPE] --rewards NAMES        compute rewards for trainers elsewhere, over HTTP
  export RUN --out DIRECTORY                    write a run's weights for diffusers
  doctor                                        list what is installed, what works, and how to get what is missing

`ngrpo COMMAND --help` explains each; `ngrpo train --help` lists every setting of a recipe.
{recipes}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 2 for what the user can mend before any work, 1 for a failed reward."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _set_up_messages()
    _set_up_memory()
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
    """Set up logging: rank 0 on stderr, without what libraries say, at import, of parts that are not used here."""
    logging.basicConfig(
        level=logging.INFO if rank_at_launch() == 0 else logging.ERROR,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # they warn of a missing torchvision and of moved parts of torchao
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for chatty in ("httpx", "accelerate", "torch", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for alarmist in ("torchao", "torch.utils._pytree"):  # they warn of each other's versions
        logging.getLogger(alarmist).setLevel(logging.ERROR)


def _set_up_memory() -> None:
    """Let CUDA's allocator keep memory in segments that grow: the phases of an iteration need blocks of unlike sizes.

    PyTorch reads this once, and nothing has imported it yet. A user's own settings, under either name, stay.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _raised_here(error: BaseException) -> bool:
    """True where our code raised it, about what a user can mend. Any other error is a bug and keeps its traceback."""
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
