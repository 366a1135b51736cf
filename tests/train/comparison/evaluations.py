"""`ngrpo eval` in processes of their own, alone or as ranks, which may kill themselves; and what each leaves.

The processes of one command after the other are forked, so that what they need is imported once.
"""

import json
import multiprocessing
import os
import signal
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from ngrpo_train.__main__ import main
from ngrpo_train.comparison.compare import evaluate_model
from ngrpo_train.comparison.scores import ScoreFiles
from ngrpo_train.shapes import verifier

from ..runs import ended, forked, free_ports, hear

# Before any fork.
IMPORTED = (CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast, evaluate_model, verifier)

RUNS = Path(__file__).parents[1]  # where `runs` is, whose scorers commands use


@dataclass(frozen=True)
class Command:
    """Arguments after `ngrpo`; the last rank kills itself as it writes the picture or the scores of that number."""

    arguments: list[str]
    out: Path
    ranks: int = 1
    kill_at_picture: int = 0
    kill_at_scores: int = 0


@dataclass(frozen=True)
class Ended:
    """Exit codes and outputs by rank; the files then in `out`: when they were written, and their bytes' hash."""

    codes: list[int]
    outputs: list[str]
    files: dict[str, tuple[int, int]]


def run_all(commands):
    """Every command in turn."""
    with TemporaryDirectory() as directory:
        jobs = Path(directory) / "jobs.json"
        ports = free_ports(len(commands))
        rows = [asdict(command) | {"port": port} for command, port in zip(commands, ports, strict=True)]
        jobs.write_text(json.dumps(rows, default=str))
        log = jobs.with_name("parent.txt")
        ended(forked(log, _run, jobs), log)
        return [Ended(**row) for row in json.loads(jobs.with_name("ended.json").read_text())]


def _rank(job, rank, log):
    hear(log)
    sys.path.insert(0, str(RUNS))
    if job["ranks"] > 1:
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "MASTER_PORT": job["port"]}
        os.environ |= {name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"}
    if rank == job["ranks"] - 1:
        _die_at(Image.Image, "save", job["kill_at_picture"], _half_a_picture)
        _die_at(ScoreFiles, "append", job["kill_at_scores"], _half_a_line)
    try:
        code = main(job["arguments"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    os._exit(code)


def _die_at(owner, name, number, half):
    """The `number`th call does `half` of its work."""
    original, calls = getattr(owner, name), 0

    def counted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            half(original, *arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    mock.patch.object(owner, name, counted).start()


def _half_a_picture(save, image, path, format):
    save(image, path, format=format)
    os.truncate(path, path.stat().st_size // 2)


def _half_a_line(append, files, name, reward, scores):
    append(files, name, reward, scores)
    file = max(files.directory.glob("scores_*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    os.truncate(file, file.stat().st_size - 9)


def _files(out):
    return {
        str(path.relative_to(out)): (path.stat().st_mtime_ns, hash(path.read_bytes()))
        for path in sorted(Path(out).rglob("*"))
        if path.is_file()
    }


def _run(jobs):
    context = multiprocessing.get_context("fork")
    ends = []
    for number, job in enumerate(json.loads(jobs.read_text())):
        logs = [jobs.with_name(f"{number}_{rank}.txt") for rank in range(job["ranks"])]
        ranks = [context.Process(target=_rank, args=(job, rank, log)) for rank, log in enumerate(logs)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
            process.kill()
            process.join()
        codes, outputs = [process.exitcode for process in ranks], [log.read_text() for log in logs]
        ends.append(asdict(Ended(codes, outputs, _files(job["out"]))))
    jobs.with_name("ended.json").write_text(json.dumps(ends))
