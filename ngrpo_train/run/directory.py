"""The directory of a run: found for `--resume`, claimed before any work, never overwritten by accident."""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate import PartialState

from ngrpo_train.parallel import processes
from ngrpo_train.run.checkpoint import find_checkpoint


def find_resume(run: Path, resume: str) -> Path:
    """The checkpoint that `--resume` means. Raises ValueError if it does not exist."""
    if resume == "latest":
        return find_checkpoint(run, "latest")
    path = Path(resume)
    return path if (path / "record.json").exists() else find_checkpoint(path, "latest")


def claim(
    run: Path,
    launch: PartialState,
    *,
    may_exist: bool = False,
    setting: str = "log.output_dir",
    otherwise: str = "pass --resume latest, --overwrite, or another directory",
) -> None:
    """Make a directory that `setting` names, or refuse, so that an earlier run is never lost by accident."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"{setting} = {str(run)!r} is not a directory")
    if run.exists() and any(run.iterdir()) and not may_exist:
        raise ValueError(f"{setting} = {str(run)!r} exists: {otherwise}")
    processes.barrier()  # all ranks have looked before one of them writes
    refused = ""
    if launch.is_main_process:
        try:
            run.mkdir(parents=True, exist_ok=True)
            probe = run / ".probe"
            probe.write_bytes(bytes(1 << 20))
            probe.unlink()
        except OSError as error:
            refused = f": {error.strerror}"
    if processes.any_rank(bool(refused)):
        raise ValueError(f"{setting} = {str(run)!r} cannot be written to{refused}")


def clear(run: Path, launch: PartialState) -> None:
    """Delete an earlier run, after everything that the new one needs has loaded."""
    if launch.is_main_process:
        shutil.rmtree(run)
        run.mkdir()
    processes.barrier()
