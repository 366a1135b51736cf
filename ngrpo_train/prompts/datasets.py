"""The prompt files of a dataset on the hub: which files it has, which of them a split means, where they lie here."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import tqdm

from ngrpo_train.parallel.hub import HUB_ERRORS, why_missing
from ngrpo_train.prompts.files import READERS, is_prompt_file
from ngrpo_train.recipe.parsing import suggestion

logger = logging.getLogger(__name__)

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-(?P<count>\d{5})(?:-[0-9a-f]+)?")  # the hub's own names


class _NoBar(tqdm):
    """A progress bar that shows nothing, for looking a dataset up, which downloads nothing."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **(settings | {"disable": True}))


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset on the hub, or, where the hub cannot be reached, the part of it in the cache."""

    repository: str
    files: dict[str, int]  # prompt files: path in the dataset -> bytes to download
    commit: str = ""  # on the hub; empty where only the cache is known

    @staticmethod
    def find(repository: str, wanted: Sequence[str] = ()) -> Dataset:
        """Look a dataset up. Raises ValueError, with the command that fetches `wanted`, if hub and cache lack it."""
        try:
            found = snapshot_download(
                repository,
                repo_type="dataset",
                dry_run=True,
                allow_patterns=[f"*{suffix}" for suffix in READERS],
                tqdm_class=_NoBar,
            )
        except HUB_ERRORS as error:
            if not (files := _in_cache(repository)):
                raise _refusal(repository, error, wanted) from error
            logger.warning("the hub does not give %s: its files in the cache are used", repository)
            return Dataset(repository, dict.fromkeys(files, 0))
        sizes = {file.filename: 0 if file.is_cached else file.file_size or 0 for file in found}
        return Dataset(repository, sizes, found[0].commit_hash if found else "main")

    def fetch(self, names: Sequence[str]) -> Path:
        """The directory that has these files; those that are missing are downloaded.

        Raises ValueError where they cannot be found or downloaded.
        """
        for name in names:
            if name not in self.files:
                raise self.without(name)
        if size := sum(self.files[name] for name in names):
            logger.info("downloading %d prompt files of %s, %.2f GiB", len(names), self.repository, size / 2**30)
        try:
            # By pattern, not file by file, so that downloads are parallel. A file's name must not act as a pattern.
            folder = snapshot_download(
                self.repository,
                repo_type="dataset",
                revision=self.commit or None,
                local_files_only=not self.commit,
                allow_patterns=[glob.escape(name) for name in names],
            )
        except HUB_ERRORS as error:
            raise _refusal(self.repository, error, names) from error
        return Path(folder)

    def without(self, path: str) -> ValueError:
        """The error to raise for a file or folder that the dataset does not have."""
        if not self.commit:
            return _refusal(self.repository, None, [path] if is_prompt_file(path) else ["--include", f"{path}/*"])
        return ValueError(f"{self.repository} has no {path}; {listing(self.files)}{suggestion(path, self.files)}")


def choose(files: Collection[str], split: str) -> list[str]:
    """The files of a split, in order. Where no split is named, those of the only split.

    Raises ValueError, which lists the splits or files, for a choice that is not clear.
    """
    by_split: dict[str, list[str]] = {}
    for name in sorted(files):
        by_split.setdefault(split_of(name), []).append(name)
    splits = [name for name in by_split if name]
    if not split and len(splits) > 1:
        raise ValueError(f"there are splits {', '.join(splits)}: add one of them, such as :{splits[0]}")
    wanted = split or splits[0]
    if wanted not in splits:  # perhaps by another name of it
        wanted = next((name for name, synonyms in _SPLITS.items() if wanted in synonyms), wanted)
    if wanted not in splits:
        known = f"known are {', '.join(splits)}{suggestion(split, splits)}" if splits else listing(files)
        raise ValueError(f"no split {split!r}; {known}")
    chosen = by_split[wanted]
    folders = {PurePosixPath(name).parent.as_posix() for name in chosen}
    if len(folders) > 1:
        raise ValueError(
            f"the split is in several folders: add one of them, such as /{min(folders)}; {listing(chosen)}"
        )
    shards = [shard for name in chosen if (shard := _SHARD.fullmatch(PurePosixPath(name).stem))]
    if shards and len(shards) != int(shards[0]["count"]):
        raise ValueError(f"only {len(shards)} of its {int(shards[0]['count'])} files are here: {listing(chosen)}")
    return chosen


def split_of(name: str) -> str:
    """The split that a file belongs to, by its name or its folders' names; "" where the names do not say."""
    path = PurePosixPath(name)
    if shard := _SHARD.fullmatch(path.stem):
        return shard["split"]
    for part in (path.stem, *reversed(path.parent.parts)):
        words = re.split(r"[^a-z0-9]+", part.lower())
        for split, synonyms in _SPLITS.items():
            if any(word in synonyms for word in words):
                return split
    return ""


def listing(files: Collection[str]) -> str:
    if not files:
        return f"it has no prompt files ({', '.join(READERS)})"
    others = f" and {len(files) - 10} others" if len(files) > 10 else ""
    return f"its prompt files are {', '.join(sorted(files)[:10])}{others}"


def _in_cache(repository: str) -> list[str]:
    try:
        # No pattern matches, so that no file counts as missing: it is not yet known which files are wanted.
        folder = Path(snapshot_download(repository, repo_type="dataset", local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return []
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if is_prompt_file(path.name)]


def _refusal(repository: str, error: Exception | None, wanted: Sequence[str]) -> ValueError:
    return ValueError(why_missing(repository, error, wanted, dataset=True))
