import importlib.metadata
import socket
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ngrpo_train.commands import doctor


@pytest.fixture(autouse=True)
def _no_network_and_a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("ngrpo doctor opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("COLUMNS", "240")


@pytest.mark.parametrize(
    "requirement, version, status",
    [
        ("torch<=2.13.0,>=2.11", "2.11.0", "ok"),
        ("torch<=2.13.0,>=2.11", "2.13.0+cpu", "ok"),
        ("torch<=2.13.0,>=2.11", "2.9.1+cu128", "too old"),
        ("torch<=2.13.0,>=2.11", "2.13.1", "too new"),
        ("diffusers>=0.42", "0.43.0.dev0", "ok"),
        ("diffusers>=0.42", "0.42.0.dev0", "too old"),
        ("diffusers>=0.42", None, "missing"),
    ],
)
def test_a_version_is_held_against_its_range(requirement: str, version: str | None, status: str) -> None:
    row = doctor.compare(Requirement(requirement), version)
    assert (row.status, row.required) == (status, True)
    assert status == "ok" or row.note == f'pip install "{requirement}"'


@pytest.mark.parametrize(
    "found, said",
    [
        ("2.11.0", "tested: 2.13.0"),
        ("2.13.0+cu130", "tested: 2.13.0"),
        ("2.13.1", "newer than 2.13.0, the newest that ngrpo was tested with"),
        ("2.15.0.dev20261101+cpu", "newer than 2.13.0, the newest that ngrpo was tested with"),
    ],
)
def test_a_torch_newer_than_the_tested_one_is_in_order_and_said(
    found: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "TESTED_TORCH", "2.13.0")
    row = doctor.beside_tested(doctor.compare(Requirement("torch>=2.11"), found))
    assert (row.status, row.note) == ("ok", f">=2.11; {said}")


def test_a_torch_that_is_too_old_is_named_with_the_command_alone() -> None:
    row = doctor.compare(Requirement("torch>=2.11"), "2.10.0")
    assert doctor.beside_tested(row) == row


def test_this_environment_is_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    shown = capsys.readouterr().out
    for name in ("Python", "torch", "diffusers", "transformers", "xformers", "CPU", "C++ compiler", "native"):
        assert f"  {name} " in shown
    assert f"; tested: {doctor.TESTED_TORCH}" in shown or f"newer than {doctor.TESTED_TORCH}" in shown


def test_the_readers_of_text_are_named_with_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: "/bin/tesseract" if name == "tesseract" else None)
    rows = {row.name: row for row in doctor.report()}
    assert rows["rapidocr"].note.startswith("for the reward ocr")
    assert (rows["tesseract"].status, rows["tesseract"].found) == ("ok", "/bin/tesseract")
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    rows = {row.name: row for row in doctor.report()}
    assert (rows["tesseract"].status, rows["rapidocr"].status) == ("absent", "absent")
    assert rows["tesseract"].note.endswith("of the reward ocr: apt install tesseract-ocr")
    assert rows["rapidocr"].note == 'for the reward ocr: pip install "ngrpo[ocr]"'


def test_what_is_wrong_is_named_with_the_command_that_mends_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    required = ["numpy>=1", "rich>=999", "no-such-package>=2", 'never>=1; extra == "never"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    assert doctor.main() == 1
    closing = capsys.readouterr().out.splitlines()[-2:]
    assert closing == [
        'rich is too old: pip install "rich>=999"',
        'no-such-package is missing: pip install "no-such-package>=2"',
    ]


def test_a_torchvision_that_does_not_import_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = "RuntimeError: operator torchvision::nms does not exist"
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (row,) = (row for row in doctor.report() if row.name == "torchvision")
    assert (row.status, row.required) == ("broken", True)
    assert error in row.note


def test_broken_kernels_are_a_problem_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> tuple[str, ...]:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr("ngrpo_kernels.available_backends", fail)
    (row,) = (row for row in doctor.report() if row.name == "ngrpo_kernels")
    assert (row.status, row.required) == ("broken", True)
    assert row.note == "OSError: libcuda.so.1: cannot open shared object file"


def test_attention_backends_are_tried_not_assumed() -> None:
    found = {name: row for row in doctor.report() if row.section.startswith("Attention") for name in row.name.split()}
    assert found["native"].status == "ok"
    assert found["native"].note == "forward and backward"
    assert not any(row.status == "ok" for name, row in found.items() if name.endswith("_hub"))
