"""Errors of the hub in one line, with the command that puts them right."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from huggingface_hub import constants
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

HUB_ERRORS = (DryRunError, HfHubHTTPError, LocalEntryNotFoundError)
"""Errors that the hub's library raises if it cannot give what is asked of it; `why_missing` explains them."""


def download_command(repository: str, fetch: Sequence[str], *, dataset: bool = False) -> str:
    """Command that brings a repository into the hub's cache; `fetch` are arguments of `hf download`, such as files."""
    kind = ["--repo-type", "dataset"] if dataset else []
    return shlex.join(["hf", "download", *kind, repository, *fetch])


def why_missing(repository: str, error: BaseException | None, fetch: Sequence[str], *, dataset: bool = False) -> str:
    """Reason, in one line, why the hub did not give a repository, with the remedy.

    `error` is what the hub's library raised. `fetch` says what is wanted, as arguments of `hf download`.
    """
    error = error.__cause__ if isinstance(error, DryRunError) else error
    if isinstance(error, GatedRepoError):
        return f"{repository} is gated: accept its licence on its hub page, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        kind = "dataset" if dataset else "model"
        return f"there is no {kind} {repository} on the hub, or it is private: check the spelling"
    if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{repository} cannot be fetched from the hub: {reason:.200}"
    cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    command = download_command(repository, fetch, dataset=dataset)
    return f"{repository} is not in the cache, and {cause}: fetch it with `{command}`"
