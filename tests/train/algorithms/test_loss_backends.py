"""Whole runs with the loss computed by every backend: the same rewards, gradient norms and weights."""

from pathlib import Path

import pytest
import torch

from ngrpo_kernels import available_backends

from ..runs import TOLERANCE, Run, assert_close, figures, observed

# Kernels for the CPU on a machine without a GPU, where Triton's run in its interpreter.
BACKENDS = [name for name in available_backends() if name != ("cpp" if torch.cuda.is_available() else None)]
B_UPDATES = "2"  # one for each of the two anchors


def train(directory: Path, backend: str, updates: str) -> Path:
    changes = {
        "algorithm.backend": backend,
        "algorithm.updates-per-iteration": updates,
        "algorithm.clip-range": "0.2",  # no ratio is near it: one within rounding of the bound is clipped by chance
    }
    assert Run(directory / f"{backend}-{updates}", changes).make() == 0
    return directory / f"{backend}-{updates}"


@pytest.fixture(scope="module", params=["1", B_UPDATES], ids=lambda updates: f"updates={updates}")
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run in plain PyTorch, and its updates per iteration."""
    return train(tmp_path_factory.mktemp("plain"), "reference", request.param), request.param


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_backends_train_alike(backend: str, plain: tuple[Path, str], tmp_path: Path) -> None:
    want, updates = plain
    got = train(tmp_path, backend, updates)
    for name in ("rewards", "advantages"):
        torch.testing.assert_close(observed(got)[name], observed(want)[name], rtol=0, atol=TOLERANCE[name])
    for theirs, mine in zip(figures(got), figures(want), strict=True):
        assert theirs["update/grad_norm"] == pytest.approx(mine["update/grad_norm"], rel=TOLERANCE["figures"])
        assert mine["update/grad_norm"] > 0
    assert_close(got, want)


def test_the_setting_reaches_the_loss(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        Run(tmp_path, {"algorithm.backend": "metal"}).make()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can use it")
def test_a_backend_that_cannot_compute_here_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = Run(tmp_path / "run", {"algorithm.backend": "triton"})
    assert run.make() != 0
    assert "algorithm.backend: backend is 'triton', which cannot be used here" in capsys.readouterr().err
    assert not run.directory.exists()
