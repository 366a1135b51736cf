"""Scores of pictures on disk: one reward at a time, shared out over processes, saved as they come."""

# R rewards, N pictures.

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ngrpo_train.comparison.gallery import Picture
from ngrpo_train.parallel import processes
from ngrpo_train.parallel.progress import progress
from ngrpo_train.recipe.rewards import SINCE_0_1_0, own_fields
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import RewardError, Rewards, refuse_non_finite
from ngrpo_train.sampling.videos import bytes_of_sample, read_sample

_IDENTITY = ("path", "backend", "dtype", "processor", "template")  # those of all rewards that scores depend on
_DECODERS = 8
_AT_ONCE = 2**30  # bytes of pixels in a batch; the next one is decoded meanwhile


class ScoreFiles:
    """A directory's scores by reward and picture, a JSON line for every batch; each process appends to its own file.

    Lines of a reward with other settings are ignored, and so is an unfinished last line of a process that was killed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, name: str, reward: Reward) -> dict[str, float]:
        """The scores of a reward: picture's key -> score."""
        scores: dict[str, float] = {}
        for file in sorted(self.directory.glob("scores_*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if row["reward"] == name and row["settings"] == _identity(reward):
                    scores |= row["scores"]
        return scores

    def append(self, name: str, reward: Reward, scores: Mapping[str, float]) -> None:
        row = {"reward": name, "settings": _identity(reward), "scores": scores}
        with (self.directory / f"scores_{processes.rank()}.jsonl").open("a+b") as file:
            file.seek(0, 2)
            if file.tell():
                file.seek(-1, 2)
                torn = file.read(1) != b"\n"  # a killed process left part of a line
                file.write(b"\n" if torn else b"")
            file.write(json.dumps(row).encode() + b"\n")


def _identity(reward: Reward) -> dict[str, Any]:
    """The settings that a reward's scores depend on, as JSON gives them back."""
    later = {name for name, default in SINCE_0_1_0.items() if getattr(reward, name) != default}
    deciding = {*_IDENTITY, *own_fields(type(reward)), *later}
    settings = {name: value for name, value in asdict(reward).items() if name in deciding}
    read_back: dict[str, Any] = json.loads(json.dumps(settings))
    return read_back


def score_missing(
    pictures: Sequence[Picture], rewards: Mapping[str, Reward], files: ScoreFiles, device: torch.device, what: str
) -> None:
    """Compute the scores that `files` lacks; a collective. Pictures that cannot be read are left out.

    Raises RewardError, naming reward and prompt, where a scorer fails or a score is not finite.
    """
    todo = {name: _batches_without(pictures, files.read(name, reward), reward) for name, reward in rewards.items()}
    processes.barrier()  # all processes have looked before one of them writes
    ranks, rank = processes.world_size(), processes.rank()
    for name, reward in rewards.items():
        mine = todo[name][rank::ranks]
        failure = None
        try:
            if todo[name]:  # on every process, since loading a scorer may be a collective
                _score(mine, name, reward, files, device, what)
        except RewardError as error:
            failure = error
        # All stop together. A process that went on alone would wait for the others until its collective timed out.
        if processes.any_rank(failure is not None):
            raise failure or RewardError(f"rewards.{name} failed on another process, which says why")


def _without(pictures: Sequence[Picture], scores: Mapping[str, float]) -> list[Picture]:
    return [picture for picture in pictures if picture.key not in scores]


def _batches_without(pictures: Sequence[Picture], scores: Mapping[str, float], reward: Reward) -> list[list[Picture]]:
    """The pictures without a score, in batches that existing scores and the number of processes do not change."""
    size = 4 * reward.batch  # several times a batch, for scorers elsewhere that take several requests at once
    if pictures and (each := bytes_of_sample(pictures[0].file)):
        size = max(1, min(size, _AT_ONCE // each))
    batches = [_without(pictures[start : start + size], scores) for start in range(0, len(pictures), size)]
    return [batch for batch in batches if batch]


def _score(
    batches: Sequence[Sequence[Picture]],
    name: str,
    reward: Reward,
    files: ScoreFiles,
    device: torch.device,
    what: str,
) -> None:
    rewards = Rewards({name: reward}, device)  # only this reward's weights, and only now
    with progress(f"{what}: {name}", sum(map(len, batches))) as advance:
        for batch, images in _decoded(batches):
            of_batch: dict[str, float] = {}
            readable = [(p, image) for p, image in zip(batch, images, strict=True) if image is not None]
            for _, same_size in groupby(sorted(readable, key=_shape), key=_shape):
                pairs = list(same_size)
                prompts = [picture.prompt for picture, _ in pairs]
                scores = rewards.score(torch.stack([image for _, image in pairs]).to(device), prompts).cpu()
                refuse_non_finite(rewards.names, scores, prompts)
                of_batch |= zip((picture.key for picture, _ in pairs), scores[0].tolist(), strict=True)
            if of_batch:
                files.append(name, reward, of_batch)
            advance(len(batch))


def _shape(pair: tuple[Picture, Tensor]) -> tuple[int, ...]:
    return tuple(pair[1].shape)


def _decoded(batches: Sequence[Sequence[Picture]]) -> Iterator[tuple[Sequence[Picture], list[Tensor | None]]]:
    """Batches with their pictures' pixels; the next batch is decoded while this one is scored."""
    with ThreadPoolExecutor(_DECODERS) as pool:
        ahead = [pool.submit(_read_or_none, picture.file) for batch in batches[:1] for picture in batch]
        for i, each in enumerate(batches):
            now = ahead
            following = batches[i + 1] if i + 1 < len(batches) else []
            ahead = [pool.submit(_read_or_none, picture.file) for picture in following]
            yield each, [future.result() for future in now]


def _read_or_none(file: Path) -> Tensor | None:
    try:
        return read_sample(file)
    except ValueError:
        return None


def unreadable(pictures: Sequence[Picture], rewards: Mapping[str, Reward], files: ScoreFiles) -> dict[str, str]:
    """The pictures that still have no score after scoring, with the reason: file -> reason."""
    lacking = {
        picture.file for name, reward in rewards.items() for picture in _without(pictures, files.read(name, reward))
    }
    reasons = {}
    for file in sorted(lacking):
        try:
            read_sample(file)
            reasons[str(file)] = f"{file}: was still being written when it was to be scored: run the command again"
        except ValueError as error:
            reasons[str(file)] = str(error)
    return reasons


def gather(pictures: Sequence[Picture], rewards: Mapping[str, Reward], files: ScoreFiles) -> Tensor:
    """Scores as float64 [R, N], NaN for pictures without a score."""
    rows = []
    for name, reward in rewards.items():
        scores = files.read(name, reward)
        rows.append([scores.get(picture.key, float("nan")) for picture in pictures])
    return torch.tensor(rows, dtype=torch.float64)
