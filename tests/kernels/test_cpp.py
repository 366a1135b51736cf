"""The C++ backend: the same bits whatever the threads, and built, cached and refused as it says.

What it computes is tested in test_backends.py.
"""

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ngrpo_kernels import _cpp, _registry, available_backends, pairwise_sqdist, quasi_norm_advantages

from .cases import assert_identical, draw, make_case, make_walk, run

needs_cpp = pytest.mark.skipif(_cpp.why_not() is not None, reason=f"no C++ backend: {_cpp.why_not()}")


@needs_cpp
@pytest.mark.parametrize("dim", [70_001, 5 * 1024])
def test_threads_and_alignment_change_no_bit(dim: int) -> None:
    case = make_case(2, 3, 7, dim, change=0.1).to(torch.float32)
    walk = make_walk(3, dim).to(torch.float32)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.new_zeros(3), tensor.flatten()])[3:].view_as(tensor)

    shifted_case = case.map(lambda tensor: shifted(tensor) if tensor.is_floating_point() else tensor)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run(case, temperature="neighborhood", backend="cpp")
        want_sqdist = pairwise_sqdist(case.latents, case.candidates, backend="cpp")
        want_draws = draw(walk, backend="cpp")
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert_identical(run(case, temperature="neighborhood", backend="cpp"), want)
            assert_identical(run(shifted_case, temperature="neighborhood", backend="cpp"), want)
            assert pairwise_sqdist(case.latents, case.candidates, backend="cpp").equal(want_sqdist)
            for each in (walk, walk.map(shifted)):
                assert_identical(draw(each, backend="cpp"), want_draws)
    finally:
        torch.set_num_threads(threads)


# -- Finding, building, refusing ---------------------------------------------------------------------------------------


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As in a new process of a new user: nothing loaded, an empty cache directory, no failure remembered."""
    monkeypatch.delenv("NGRPO_CPP", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_cpp, "_loaded", False)
    monkeypatch.setattr(_cpp, "_failures", {})
    _registry._warn_once.cache_clear()
    yield tmp_path
    _registry._warn_once.cache_clear()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of csrc that a test may change."""
    original = _cpp.source_directory()
    assert original is not None
    copy = tmp_path / "sources"
    shutil.copytree(original, copy)
    monkeypatch.setattr(_cpp, "source_directory", lambda: copy)
    return copy


def test_listing_the_backends_compiles_nothing(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in ("c++", "ninja"):
        (unbuilt / tool).write_text("")
        (unbuilt / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(unbuilt))
    monkeypatch.delenv("CXX", raising=False)
    assert available_backends()[0] == "cpp"
    assert not (unbuilt / "cache").exists()


@pytest.mark.parametrize("missing", ["c++", "ninja"])
def test_without_a_compiler(missing: str, unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in {"c++", "ninja"} - {missing}:
        (unbuilt / tool).write_text("")
        (unbuilt / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(unbuilt))
    monkeypatch.delenv("CXX", raising=False)
    case = make_case()
    assert "cpp" not in available_backends()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"backend is 'cpp', which cannot be used here: .*{missing[0]}.* PATH"):
            run(case, backend="cpp")
    with pytest.raises(RuntimeError, match="backend is 'cpp'"):
        quasi_norm_advantages(case.advantages, backend="cpp")

    want = run(case, backend="reference")
    with pytest.warns(UserWarning, match="in plain PyTorch, not with its 'cpp' backend: .* not on PATH"):
        assert_identical(run(case), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_identical(run(case), want)


def test_cxx_names_the_compiler(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler --flag")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler: 'no-such-compiler --flag' is not on PATH"):
        run(make_case(), backend="cpp")


def test_turned_off(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGRPO_CPP", "0")
    assert "cpp" not in available_backends()
    case = make_case()
    with pytest.raises(RuntimeError, match="NGRPO_CPP=0 turns it off"):
        run(case, backend="cpp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what one turns off needs no warning
        assert_identical(run(case), run(case, backend="reference"))


@needs_cpp
def test_turned_off_after_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    run(case, backend="cpp")
    monkeypatch.setenv("NGRPO_CPP", "0")
    with pytest.raises(RuntimeError, match="NGRPO_CPP=0 turns it off"):
        run(case, backend="cpp")


@needs_cpp
def test_a_failed_build_is_an_error_with_the_compilers_message(unbuilt: Path, sources: Path) -> None:
    (sources / "ops.cpp").write_text("#error planted\n")
    case = make_case()
    with pytest.raises(RuntimeError, match=r"backend is 'cpp', which cannot be used here: .* built .*(?s:.*)planted"):
        run(case, backend="cpp")
    (failure,) = _cpp._failures
    assert not list(failure.parent.iterdir())

    _cpp._failures[failure] = "remembered"
    with pytest.raises(RuntimeError, match="remembered"):
        run(case, backend="cpp")


@needs_cpp
def test_a_cache_that_cannot_be_written_is_an_error(unbuilt: Path) -> None:
    (unbuilt / "cache").write_text("a file where the directory should be")
    with pytest.raises(RuntimeError, match=r"could not be built or loaded in .*cache"):
        run(make_case(), backend="cpp")


def test_the_library_is_named_after_what_it_is_built_from(
    unbuilt: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _cpp.library_path()
    assert first.is_relative_to(unbuilt / "cache")
    (sources / "notes.txt").write_text("not compiled")
    assert _cpp.library_path() == first
    names = {first}
    for name in ("ops.cpp", "tiles.h"):
        (sources / name).write_text((sources / name).read_text() + "// changed\n")
        names.add(_cpp.library_path())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    names.add(_cpp.library_path())
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    names.add(_cpp.library_path())
    monkeypatch.setattr(sys.implementation, "cache_tag", "cpython-399")
    names.add(_cpp.library_path())
    monkeypatch.setattr(_cpp, "FLAGS", [*_cpp.FLAGS, "-g"])
    names.add(_cpp.library_path())
    assert len(names) == 7


@pytest.mark.parametrize("places", [["package/csrc"], ["csrc"], ["package/csrc", "csrc"], ["elsewhere/csrc"]], ids=str)
def test_where_sources_are_looked_for(places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "ops.cpp").write_text("")
    monkeypatch.setattr(_cpp, "__file__", str(tmp_path / "package" / "_cpp.py"))
    monkeypatch.chdir(tmp_path / places[0])
    found = places[0] != "elsewhere/csrc"
    assert _cpp.source_directory() == (tmp_path / places[0] if found else None)
    monkeypatch.delenv("NGRPO_CPP", raising=False)
    if not found:
        assert _cpp.why_not() == "its sources (csrc) are not installed"
        assert "cpp" not in available_backends()


@needs_cpp
def test_what_is_built_serves_processes_without_a_compiler(tmp_path: Path) -> None:
    assert _cpp.load() is None
    code = """
import torch
from ngrpo_kernels import available_backends, pairwise_sqdist
print(available_backends()[0], pairwise_sqdist(torch.zeros(1, 3), torch.ones(2, 3), backend="cpp").tolist())
"""
    environment = os.environ | {"CXX": "no-such-compiler", "PYTHONPATH": str(Path(_cpp.__file__).parents[1])}
    environment.pop("NGRPO_CPP", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "cpp [[3.0, 3.0]]"


def test_other_devices_are_refused() -> None:
    tensor = torch.zeros(2, 3, device="meta")
    with pytest.raises(ValueError, match=r"backend is 'cpp', .* here: it computes on the CPU; the tensors are on meta"):
        pairwise_sqdist(tensor, tensor, backend="cpp")
