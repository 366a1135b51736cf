"""Small training runs on the shapes pipeline: in this process, on several ranks, under a launcher; and what they leave.

As a script it makes runs one after the other, and may kill itself in the middle.
"""

import json
import math
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ngrpo_train.__main__ import main
from ngrpo_train.algorithms.neighbor import NeighborGRPO
from ngrpo_train.recipe.algorithms import field_names, settings_class
from ngrpo_train.run import checkpoint
from ngrpo_train.run.trainer import Outcome, Trainer

HERE = Path(__file__).parent

# Four solver steps of which three are trainable and two trained: prompts, and so ranks, train different ones. The
# reward is one whose spread in a group is large against the rounding of pictures to bytes.
SMALL = {
    "prompts.per-rank": "2",
    "sampling.num-inference-steps": "4",
    "algorithm.step-range": "0 0.75",
    "algorithm.num-generations": "4",
    "algorithm.num-anchors": "2",
    "algorithm.num-train-steps": "2",
    "rewards.redness.path": "runs:redness",
    "rewards.shapes-verifier.log-only": "True",
    "train.steps": "3",
    "parallel.timeout-minutes": "3",
    "checkpoint.every": "1",
    "checkpoint.keep": "9",
    "evaluation.validation": "",
    "evaluation.test": "",
    "evaluation.num-images-per-prompt": "1",
    "log.images-every": "1000",
    "log.trackers": "",
    "log.export": "False",
}
SEVERAL = ("algorithm.step-range", "log.trackers")  # fields of any number of values
TWO_PROMPTS = ("a large red circle on a blue background", "a small green square on a yellow background")
UNLIKE = ("time/", "memory/")  # figures that no two runs share

# Another batch size rounds a velocity's last bits otherwise, and then one of a picture's bytes here and there.
TOLERANCE = {"rewards": 1e-4, "advantages": 3e-4, "figures": 5e-4, "moments": 5e-4, "moved": 1e-3}


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].float().mean((1, 2)) / 255


def redness_and_chance(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return redness(images, prompts) + 0.01 * torch.rand(len(images))


def redness_of_circles(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Flat where the prompt asks for something else."""
    return redness(images, prompts) * torch.tensor(["circle" in prompt for prompt in prompts])


def redness_without_dogs(images: Tensor, prompts: Sequence[str]) -> Tensor:
    if any("dog" in prompt for prompt in prompts):
        raise ValueError("not a shape")
    return redness(images, prompts)


@dataclass(frozen=True)
class Run:
    """A training run to make: flags without their dashes, on top of `defaults`."""

    directory: Path
    changes: dict[str, str] = field(default_factory=dict)
    resume: str = ""
    kill_in_save_of_step: int = 0  # the last rank, by SIGKILL
    kill_in_step: int = 0  # the same, after this step's rollout
    recipe: str = "shapes_cpu"
    defaults: Mapping[str, str] = field(default_factory=lambda: SMALL)

    def arguments(self) -> list[str]:
        """The arguments of the command line, "train" first."""
        algorithm = self.changes.get("algorithm.name", "neighbor")
        small = {name: value for name, value in self.defaults.items() if _is_of(algorithm, name)}
        settings = small | self.changes
        flags = [f"--{name}={value}" for name, value in settings.items() if name not in SEVERAL]
        for name in (name for name in SEVERAL if name in settings):
            flags += [f"--{name}", *settings[name].split()]
        resume = [f"--resume={self.resume}"] if self.resume else []
        return ["train", self.recipe, f"--log.output-dir={self.directory}", *flags, *resume]

    def make(self) -> int:
        """Train in this process; returns the exit code. What `observed` reads goes beside the run's own files."""
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(sys, "path", [str(HERE), *sys.path]))
            last_rank = int(os.environ.get("WORLD_SIZE", "1")) - 1
            if self.kill_in_save_of_step and int(os.environ.get("RANK", "0")) == last_rank:
                stack.enter_context(_killed_in_save(self.kill_in_save_of_step))
            if self.kill_in_step and int(os.environ.get("RANK", "0")) == last_rank:
                stack.enter_context(_killed_in_step(self.kill_in_step))
            seen, gains = stack.enter_context(_observed())
            code = main(self.arguments())
        if seen:
            rewards_SRPG, advantages_SPG = (torch.stack(each) for each in zip(*seen, strict=True))
            record = {"rewards": rewards_SRPG, "advantages": advantages_SPG, "gains": torch.tensor(gains)}
            torch.save(record, self.directory / f"observed_{os.environ.get('RANK', '0')}.pt")
        return code


def _is_of(algorithm: str, flag: str) -> bool:
    """Whether a flag is one that the algorithm takes."""
    section, _, field_name = flag.partition(".")
    return section != "algorithm" or field_name.replace("-", "_") in field_names(settings_class(algorithm))


@contextmanager
def _observed() -> Iterator[tuple[list[tuple[Tensor, Tensor]], list[float]]]:
    """Rewards [R, P, G] and advantages [P, G] of each iteration within it, and `mismatch_gain` of its neighborhoods."""
    seen: list[tuple[Tensor, Tensor]] = []
    gains: list[float] = []
    explore, iterate = NeighborGRPO.explore, Trainer.iterate

    def explored(self: NeighborGRPO, *arguments: Any) -> Any:
        groups = explore(self, *arguments)
        gains.append(mismatch_gain(groups, self.settings.temperature))
        return groups

    def iterated(self: Trainer) -> Outcome:
        outcome = iterate(self)
        seen.append((outcome.scores.all_RPG, outcome.advantages))
        return outcome

    with mock.patch.object(Trainer, "iterate", iterated), mock.patch.object(NeighborGRPO, "explore", explored):
        yield seen, gains


def mismatch_gain(groups: Any, temperature: float) -> float:
    """How many times the relative error |e| / |v| of a row's velocities the spread of its log-ratios can be.

    log rho_i = u_i - log sum_k pi_k exp(u_k), u_i = 2 dt <e, y_i> / tau, so |log rho_i| <= 2 max_k |u_k|. Elements of e
    are roundings, whose signs know nothing of y: <e, y> has a standard deviation of |e| |y| / sqrt(D), of which four
    are allowed. The largest over the rows, of B anchors and G candidates each.
    """
    candidates_PKGD = groups.candidates_PKGS.flatten(3).double()
    velocity_PKBD = groups.velocity_PKBS.flatten(3).double()
    own_PKBD = candidates_PKGD.take_along_dim(groups.anchor_PB[:, None, :, None], dim=2)
    longest_PK = torch.cdist(own_PKBD, candidates_PKGD).amax((2, 3))
    dt_PK = (groups.sigma_before_PK - groups.sigma_after_PK).abs().double()
    product_PK = velocity_PKBD.norm(dim=(2, 3)) * longest_PK / velocity_PKBD.shape[-1] ** 0.5
    shift_PK = 4 * 2 * dt_PK * product_PK / temperature
    members = velocity_PKBD.shape[2] * candidates_PKGD.shape[2]
    return 2 * shift_PK.max().item() * (members / (members - 1)) ** 0.5


@contextmanager
def _killed_in_save(step: int) -> Iterator[None]:
    """SIGKILL to this process when it has written a few tensors of that step's checkpoint."""
    save_tensors, save = checkpoint._save_tensors, torch.save

    def save_and_count(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        save_and_count.left -= 1
        if save_and_count.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_tensors_or_die(state: dict[str, Any], path: Path) -> None:
        save_and_count.left = 20 if f"{step:06d}" in path.name else -1
        with mock.patch.object(torch, "save", save_and_count):
            save_tensors(state, path)

    with mock.patch.object(checkpoint, "_save_tensors", save_tensors_or_die):
        yield


@contextmanager
def _killed_in_step(step: int) -> Iterator[None]:
    """SIGKILL to this process in the middle of that step, between collectives."""
    original = NeighborGRPO.advantages

    def advantages_or_die(self: NeighborGRPO, scores: Any, at: int) -> Tensor:
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, scores, at)

    with mock.patch.object(NeighborGRPO, "advantages", advantages_or_die):
        yield


# --- processes


def on_ranks(count: int, runs: Sequence[Run], codes: Sequence[int] = ()) -> list[str]:
    """Make the runs one after the other, on so many gloo ranks that stay alive in between; the ranks' outputs.

    `codes` are the exit codes to expect, by default 0.
    """
    with _as_jobs(runs) as jobs:
        log = Path(jobs).with_name("parent.txt")
        ended(forked(log, _fork_ranks, jobs, count), log)
        outputs = [_log(jobs, rank).read_text() for rank in range(count)]
        reached = json.loads(Path(jobs).with_name("codes.json").read_text())
    for got, output, code in zip(reached, outputs, codes or [0] * count, strict=True):
        assert got == code, output
    return outputs


def forked(log: Path, function: Callable[..., Any], *arguments: Any, **variables: str) -> BaseProcess:
    """Start a function of a module in a process that has imported the trainer, but computed nothing yet.

    It has one thread, which decides how sums are rounded, these environment variables, and `log` for what it says.
    """
    context = multiprocessing.get_context("forkserver")
    if not forkserver._forkserver._forkserver_pid:  # one import for all processes that follow; libraries warn in it
        context.set_forkserver_preload(["ngrpo_train.run.loop"])
        heard = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        forkserver.ensure_running()
        os.dup2(heard, 2)
    process = context.Process(target=_heard, args=(str(log), variables, function, arguments))
    process.start()
    return process


def _heard(log: str, variables: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    hear(log)
    os.environ.update({"OMP_NUM_THREADS": "1"} | variables)  # which accelerate reads
    torch.set_num_threads(1)
    function(*arguments)
    sys.stdout.flush()


def hear(log: str | Path) -> None:
    """Write what this process says to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def ended(process: BaseProcess, log: Path, code: int = 0) -> str:
    """What a forked process has said, when it ends with that exit code. It is killed if that takes too long."""
    process.join(1200)
    process.kill()
    process.join()
    assert process.exitcode == code, log.read_text()
    return log.read_text()


def _log(jobs: str, rank: int) -> Path:
    return Path(jobs).with_name(f"rank_{rank}.txt")


def _fork_ranks(jobs: str, count: int) -> None:
    """Ranks that share one import of everything; their exit codes go beside the jobs."""
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            hear(_log(jobs, rank))
            group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
            os.environ.update(group)
            try:
                code = _make(jobs)
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            os._exit(code)
        children.append(child)

    def give_up(*_: object) -> None:
        for child in children:
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(1190)  # far beyond what a loaded machine needs: it only ends what hangs
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    Path(jobs).with_name("codes.json").write_text(json.dumps(codes))


def _make(jobs: str) -> int:
    """The exit code of the first run that fails, or 0."""
    for job in json.loads(Path(jobs).read_text()):
        port = job.pop("port")
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            os.environ["MASTER_PORT"] = str(port)
        code = Run(**(job | {"directory": Path(job["directory"])})).make()
        if code:
            return code
    return 0


@contextmanager
def _as_jobs(runs: Sequence[Run]) -> Iterator[str]:
    """A file of these runs for `python runs.py`; every process group gets a port of its own."""
    with TemporaryDirectory() as directory:
        jobs = [asdict(run) | {"port": port} for run, port in zip(runs, free_ports(len(runs)), strict=True)]
        file = Path(directory) / "jobs.json"
        file.write_text(json.dumps(jobs, default=str))
        yield str(file)


@contextmanager
def script(run: Run) -> Iterator[list[str]]:
    """What to give to python or a launcher for one run with what a command line cannot ask for."""
    with _as_jobs([run]) as jobs:
        yield [__file__, jobs]


def start(command: Sequence[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=HERE.parents[1],
        preexec_fn=_heed_ctrl_c,
    )


def _heed_ctrl_c() -> None:
    """Undo what a shell does to its background jobs, which ignore Ctrl-C and hand that on to what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    """Start two processes, as two cores bear."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    return start([*launcher, f"--master-port={free_ports(1)[0]}", *arguments], environment())


def accelerate_launch(*arguments: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    plain = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    return start([*launcher, *plain, f"--main_process_port={free_ports(1)[0]}", *arguments], environment())


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a process to end; its output. It is killed if that takes too long."""
    try:
        return process.communicate(timeout=1200)[0]
    finally:
        process.kill()


def environment(threads: int = 1) -> dict[str, str]:
    """The environment of a subprocess: `threads` threads, which decide how sums are rounded, and this module importable
    for its scorers."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens at, and that no system hands out to whoever asks for any: those begin at 32768."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 200):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError(f"fewer than {count} of 200 ports are free")


# --- what a run leaves


def observed(directory: Path, rank: int = 0) -> dict[str, Tensor]:
    """Rewards [S, R, P, G], advantages [S, P, G] and gains [S] of the S iterations that this rank made last.

    The gains are `mismatch_gain` of this rank's prompts; an algorithm without neighborhoods has none.
    """
    record: dict[str, Tensor] = torch.load(directory / f"observed_{rank}.pt", weights_only=True)
    return record


def figures(directory: Path) -> list[dict[str, float]]:
    """The iterations' lines of metrics.jsonl, without times and memory."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith(UNLIKE)}
        for row in rows
        if "reward/mean" in row
    ]


def validations(directory: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward/mean" not in row]


def steps_kept(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def saved(directory: Path, step: int) -> dict[str, Any]:
    """Everything that a checkpoint's tensors hold, whole, whatever number of ranks wrote them."""
    reader = dcp.FileSystemReader(directory / "checkpoints" / f"step_{step:06d}" / "tensors")
    state: dict[str, Any] = {
        name: torch.empty(kept.size, dtype=kept.properties.dtype) if isinstance(kept, TensorStorageMetadata) else None
        for name, kept in reader.read_metadata().state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def assert_close(got: Path, want: Path) -> None:
    """Two runs after three iterations; how far their weights are apart against how far the third one moved them."""
    mine, theirs, before = saved(want, 3), saved(got, 3), saved(want, 2)
    assert mine.keys() == theirs.keys()
    for part in ("exp_avg", "exp_avg_sq"):
        names = [name for name in mine if name.endswith(f".{part}")]
        assert norm(theirs[n] - mine[n] for n in names) < TOLERANCE["moments"] * norm(mine[n] for n in names)
    for part in ("model.", "ema."):
        names = [name for name in mine if name.startswith(part)]
        moved = norm(mine[n] - before[n] for n in names)
        assert norm(theirs[n] - mine[n] for n in names) <= TOLERANCE["moved"] * moved
        assert moved > 0 or not names
    assert all(torch.equal(theirs[name], mine[name]) for name in mine if name.endswith(".step"))


def assert_close_figures(
    got: list[dict[str, float]], want: list[dict[str, float]], gains: Sequence[float] | Tensor = ()
) -> None:
    """Figures agree, but for one that measures nothing but rounding.

    `policy/mismatch_log_ratio_std` is the spread of what is left where the velocities of a rollout are subtracted from
    those of the training forward, by the same weights: all of it is rounding, and two batchings of one forward share
    no digit of it. With `gains`, one for each row, it is held to them times the relative error of the velocities, which
    `policy/rollout_mismatch` states and which is compared like the rest.
    """
    for row, pair in enumerate(zip(got, want, strict=True)):
        theirs, mine = (dict(each) for each in pair)
        for each in (theirs, mine) if len(gains) else ():
            assert each.pop("policy/mismatch_log_ratio_std") <= gains[row] * each["policy/rollout_mismatch"]
        assert theirs == pytest.approx(mine, rel=TOLERANCE["figures"], abs=2e-6)


def assert_same_run(got: Path, want: Path, steps: int = 4) -> None:
    """Bitwise: weights, optimizer state, averages, and every figure, after so many iterations."""
    mine, theirs = saved(got, steps), saved(want, steps)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value) if isinstance(value, torch.Tensor) else mine[name] == value, name
    assert figures(got)[:steps] == figures(want)[:steps]
    assert [row["step"] for row in figures(got)[:steps]] == list(range(steps))


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file and directory below one."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [directory, *directory.rglob("*")]}


if __name__ == "__main__":
    sys.exit(_make(sys.argv[1]))
