"""Uploads to the hub, with a stand-in for its client: what it is asked for, in which order, and what a refusal says."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ngrpo_train.parallel import upload


@dataclass
class Hub:
    """A hub that knows one user, `me`, with the real client's way to refuse."""

    repositories: dict[str, bool] = field(default_factory=dict)  # private, by name
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    refusals: dict[str, Exception] = field(default_factory=dict)  # by method

    def whoami(self) -> dict[str, str]:
        self._note("whoami")
        return {"name": "me"}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self._note("create_repo")
        validate_repo_id(repo_id)
        assert exist_ok
        if not repo_id.startswith("me/"):
            raise refusal(403, "Forbidden: pass `create_pr=1`\nto ask")
        self.repositories.setdefault(repo_id, private)

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.repositories[repo_id])

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self._note("upload_folder")
        assert commit_message
        assert repo_id in self.repositories
        found = (path for path in Path(folder_path).rglob("*") if path.is_file())
        self.files[repo_id] = {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in found}

    def _note(self, method: str) -> None:
        self.asked.append(method)
        if method in self.refusals:
            raise self.refusals[method]


def refusal(code: int, message: str, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    return kind(message, response=MagicMock(status_code=code))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(upload, "HfApi", lambda: stand_in)
    return stand_in


def test_a_repository_is_made_once_and_gets_every_file(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "weights").write_bytes(b"1")
    (tmp_path / "README.md").write_bytes(b"2")
    for _ in range(2):
        upload.claim("me/mine", private=True)
        assert upload.push(tmp_path, "me/mine") == "https://huggingface.co/me/mine"
    assert hub.repositories == {"me/mine": True}
    assert hub.files == {"me/mine": {"transformer/weights": b"1", "README.md": b"2"}}


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub) -> None:
    hub.repositories["me/open"] = False
    upload.claim("me/open", private=False)
    with pytest.raises(
        ValueError, match=r"^--push-to-hub = 'me/open' is there already, and public: make it private on"
    ):
        upload.claim("me/open", private=True)


@pytest.mark.parametrize(
    "repository, method, error, answer",
    [
        ("me/x", "whoami", refusal(401, "Invalid user token.\nmore"), "is refused, for the token is not valid: log in"),
        ("you/x", "", None, "is not yours to write to, or the token may only read: log in with `hf auth login`"),
        ("me/x", "create_repo", refusal(404, "?", RepositoryNotFoundError), "is not yours to write to, or the token"),
        ("me/x y", "", None, "is no name of a repository, user/name: Repo id must"),
        (
            "me/x",
            "whoami",
            ConnectionError("Cannot reach the hub:\noffline"),
            "cannot be reached: Cannot reach the hub:",
        ),
        ("me/x", "create_repo", refusal(500, "Internal Error"), "cannot be reached: Internal Error"),
    ],
)
def test_a_refusal_is_one_line(hub: Hub, repository: str, method: str, error: Exception | None, answer: str) -> None:
    if error:
        hub.refusals[method] = error
    with pytest.raises(ValueError, match=r"^[^\n]*$") as raised:
        upload.claim(repository, private=False)
    assert str(raised.value).startswith(f"--push-to-hub = {repository!r} {answer}")


def test_without_a_token_the_real_client_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("nothing is made without a login"))
    with pytest.raises(
        ValueError, match=r"^--push-to-hub = 'me/x' needs a login: log in with `hf auth login`, or set HF_T"
    ):
        upload.claim("me/x", private=False)


def test_an_upload_that_breaks_off_says_so(hub: Hub, tmp_path: Path) -> None:
    upload.claim("me/x", private=False)
    hub.refusals["upload_folder"] = refusal(500, "Bad gateway")
    with pytest.raises(ValueError, match=r"^--push-to-hub = 'me/x' cannot be reached: Bad gateway$"):
        upload.push(tmp_path, "me/x")


# --- by the command


@pytest.fixture
def run(ngrpo: Callable[..., tuple[int, str, str]], tiny_recipe: Path) -> Path:
    code, _, err = ngrpo("train", tiny_recipe, "--model.tuning=lora", "--train.steps=1")
    assert code == 0, err
    return Path("runs/tiny")


def test_the_command_uploads_what_it_exports(hub: Hub, ngrpo: Callable[..., tuple[int, str, str]], run: Path) -> None:
    code, out, err = ngrpo("export", run, "--push-to-hub", "me/mine", "--private")
    assert (code, out.splitlines()[-1]) == (0, "uploaded to https://huggingface.co/me/mine"), err
    assert hub.asked == ["whoami", "create_repo", "upload_folder"]
    assert hub.repositories == {"me/mine": True}
    assert hub.files["me/mine"].keys() == {"README.md", "pytorch_lora_weights.safetensors"}
    assert 'pipe.load_lora_weights("me/mine")' in hub.files["me/mine"]["README.md"].decode()

    code, out, err = ngrpo("export", run, "--push-to-hub", "me/mine", "--out", "kept")
    assert (code, out) == (0, "exported to kept\nuploaded to https://huggingface.co/me/mine\n"), err
    assert hub.files["me/mine"] == {path.name: path.read_bytes() for path in Path("kept").iterdir()}


def test_the_command_refuses_before_it_exports(
    hub: Hub, ngrpo: Callable[..., tuple[int, str, str]], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded first")

    monkeypatch.setattr("ngrpo_train.run.trained.trained_model", never)
    for flags, refused in {
        ("--push-to-hub=you/x", "--out=kept"): "--push-to-hub = 'you/x' is not yours to write to",
        (): "--out must name a directory, or --push-to-hub a repository",
        ("--out=kept", "--private"): "--private is for --push-to-hub, which names no repository",
        ("--checkpoint=7", "--push-to-hub=me/x"): "no checkpoint '7' in runs/tiny",
    }.items():
        code, _, err = ngrpo("export", run, *flags)
        assert code == 2
        assert err.startswith(f"ngrpo export: {refused}")
    assert not Path("kept").exists()
    assert not hub.repositories
