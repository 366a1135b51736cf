"""Uploads to the hub: a repository is claimed before any work, and gets a directory after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def claim(repository: str, *, private: bool) -> None:
    """Make the model repository, unless it is there.

    Raises ValueError, naming `--push-to-hub`, without a login, for a name that is none, for a repository that is not
    the user's, and for a public one that ought to be private.
    """
    with _explained(repository):
        api = HfApi()
        api.whoami()
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise ValueError("is there already, and public: make it private on its page, or leave out --private")


def push(directory: Path, repository: str) -> str:
    """Upload all files of a directory; returns the address of the repository's page. Raises ValueError as `claim`."""
    with _explained(repository):
        HfApi().upload_folder(repo_id=repository, folder_path=directory, commit_message="Upload of ngrpo export")
    return f"{constants.ENDPOINT}/{repository}"


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn an error of the hub's library into a ValueError of one line that says what to do."""
    try:
        yield
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise ValueError(f"--push-to-hub = {repository!r} {_reason(error)}") from error


def _reason(error: Exception) -> str:
    code = getattr(getattr(error, "response", None), "status_code", 0)
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, LocalTokenNotFoundError):
        return f"needs a login: {_LOG_IN}"
    if code == 401:
        return f"is refused, for the token is not valid: {_LOG_IN}"
    if code in (403, 404):
        return f"is not yours to write to, or the token may only read: {_LOG_IN}"
    if isinstance(error, HFValidationError):
        return f"is no name of a repository, user/name: {first:.200}"
    if isinstance(error, ValueError):
        return first
    return f"cannot be reached: {first:.200}"
