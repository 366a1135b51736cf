"""What the pages name exists: files, modules, link targets and anchors, commands and their flags, recipes' settings."""

# Text here is a page in Markdown, or a script with comments: README.md, docs/, examples/ and the GPU machine's script.

import contextlib
import io
import pkgutil
import re
import runpy
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from ngrpo_train.__main__ import COMMANDS, main
from ngrpo_train.recipe.algorithms import ALGORITHMS
from ngrpo_train.recipe.rewards import REWARDS
from ngrpo_train.recipe.sections import Recipe, Reward

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SCRIPTS = sorted(
    [ROOT / "Makefile", ROOT / "benchmarks" / "gpu.sh"]
    + [path for path in ROOT.glob("examples/**/*") if path.suffix in (".py", ".sbatch")]
)

FOLDERS = ("benchmarks", "csrc", "docs", "examples", "ngrpo_kernels", "ngrpo_train", "tests")  # of the tree
OURS = (".py", ".cpp", ".h", ".sh", ".sbatch")  # a name with such an end is a file of ours, not a user's
PACKAGES = ("benchmarks", "ngrpo_kernels", "ngrpo_train")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def quoted(text: str) -> Iterator[str]:
    """What stands in backticks outside blocks of code, each in one line."""
    for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", without_blocks(text)):
        yield " ".join(found.split())


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks(text: str) -> str:
    return "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))


# -- Files and modules -------------------------------------------------------------------------------------------------


def missing_files(text: str) -> set[str]:
    """Paths and Python names of this repository that `text` names and the tree does not have."""
    words = {word for each in quoted(text) for word in each.split()}
    words |= {word for word in blocks(text).split() if word.partition("/")[0] in FOLDERS}
    missing = set()
    for word in (word.strip("(),;:\"'") for word in words):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]*)*", word):
            continue
        first, _, rest = word.partition("/")
        if rest and first in FOLDERS:
            there = (ROOT / word).exists()
        elif word.endswith(OURS):
            there = any(path.as_posix().endswith(f"/{word}") for folder in FOLDERS for path in files_of(folder))
        elif word.partition(".")[0] in PACKAGES and "." in word and not rest:
            there = resolves(word)
        else:
            continue
        if not there:
            missing.add(word)
    return missing


@cache
def files_of(folder: str) -> tuple[Path, ...]:
    return tuple(path for path in (ROOT / folder).rglob("*") if path.is_file())


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one. Scripts are looked up and not run."""
    if (ROOT / name.replace(".", "/")).with_suffix(".py").exists() or (ROOT / name.replace(".", "/")).is_dir():
        return True
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=name_of)
def test_files_and_modules_exist(page: Path) -> None:
    assert not missing_files(page.read_text("utf-8"))


@pytest.mark.parametrize(
    "text, missing",
    [
        ("see `docs/flux.md`, `csrc/` and `ngrpo_train/`", set()),
        ("rows are in `benchmarks/results/no_such.csv`", {"benchmarks/results/no_such.csv"}),
        ("`ngrpo_train/no_wing/`", {"ngrpo_train/no_wing/"}),
        ("`plan/memory.py` and `memory.py`, `plan/no_such.py`", {"plan/no_such.py"}),
        ("`ngrpo_train.plan.memory`, `ngrpo_train.plan.no_such`", {"ngrpo_train.plan.no_such"}),
        ("a run's `recipe.toml`, `metrics.jsonl` and `checkpoints/`, `watch/grid`", set()),
        ("```\nbash benchmarks/no_such.sh all OUT\npython -m x --out rows.csv\n```\n", {"benchmarks/no_such.sh"}),
    ],
)
def test_a_missing_file_would_be_seen(text: str, missing: set[str]) -> None:
    assert missing_files(text) == missing


# -- Links -------------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    anchors = set()
    for heading in re.findall(r"^#+ +(.+?) *$", without_blocks(text), flags=re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = found[anchor] = found.get(anchor, -1) + 1
        anchors.add(f"{anchor}-{count}" if count else anchor)
    return anchors


def broken_links(text: str, page: Path) -> set[str]:
    """Targets of links in `page`, which has this `text`, that are no file or no heading of it."""
    broken = set()
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(text)):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        if not path.exists() or (anchor and anchor not in anchors(text if path == page else path.read_text("utf-8"))):
            broken.add(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page.read_text("utf-8"), page)


def test_a_broken_link_would_be_seen() -> None:
    text = "# Two `words`, here\n[a](flux.md) [b](#two-words-here) [c](#nowhere) [d](no_such.md) [e](flux.md#nowhere)"
    assert broken_links(text, ROOT / "docs" / "flux.md") == {"#nowhere", "no_such.md", "flux.md#nowhere"}


# -- Commands and settings ---------------------------------------------------------------------------------------------

USER_FILES = (".csv", ".json", ".jsonl", ".png", ".toml", ".txt")  # prompts.txt is no setting of [prompts]
OF_VLLM = {"--served-model-name"}
PLACEHOLDER = "--section.field"
RECIPES, GRIDS = (ROOT / "ngrpo_train" / folder for folder in ("recipe/packaged", "experiments/grids"))
# What takes the name of a shipped file as its first argument.
SHIPPED = dict.fromkeys(("train", "plan", "profile", "embed", "benchmarks.train_step"), RECIPES) | {"experiment": GRIDS}


def code_of(path: Path) -> str:
    """Blocks and quotes of a page, a line each; all of a script; lines that a backslash continues in one."""
    text = path.read_text("utf-8")
    code = "\n".join([blocks(text), *quoted(text)]) if path in PAGES else text
    return re.sub(r"\\\n", " ", code)


def calls(code: str) -> Iterator[tuple[str, str, set[str]]]:
    """What is called, a command of `ngrpo` or a module of ours; its first argument; the flags that it is given."""
    ngrpo = r"(?:(?:^ *|[`(])ngrpo +|-m ngrpo_train +)(?P<command>[a-z][a-z-]*)"
    module = rf"-m (?P<module>(?:{'|'.join(PACKAGES)})\.[\w.]*\w)"
    for call in re.finditer(rf"(?:{ngrpo}|{module})(?P<rest>[^`#\n]*)", code, flags=re.MULTILINE):
        first = (call["rest"].split() or [""])[0]
        yield call["command"] or call["module"], first, flags_in(call["rest"])


def flags_in(text: str) -> set[str]:
    flags = {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text)}
    return flags - {PLACEHOLDER}


@cache
def flags_of(called: str) -> set[str]:
    """The flags in what `--help` prints; those of a recipe, with every algorithm's."""
    modes = [["--algorithm.name", name] for name in ALGORITHMS] if called == "train" else [[]]
    out = io.StringIO()
    for mode in modes:
        with mock.patch.dict("os.environ", COLUMNS="400"), contextlib.redirect_stdout(out):
            assert status(called, [*mode, "--help"]) == 0
    return flags_in(out.getvalue()) | {"--help"}


def status(called: str, arguments: list[str]) -> int | str | None:
    try:
        if "." not in called:
            return main([called, *arguments])
        with mock.patch("sys.argv", [called, *arguments]):
            runpy.run_module(called, run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as end:
        return end.code or 0


def wrong_calls(code: str) -> set[str]:
    """Calls of what is not there, recipes and grids that are not shipped, and flags that the called does not have."""
    wrong = set()
    for called, first, given in calls(code):
        if not (resolves(called) if "." in called else called in COMMANDS):
            wrong.add(called)
            continue
        named = called in SHIPPED and re.fullmatch(r"[a-z][a-z0-9_]*", first)
        if named and not (SHIPPED[called] / f"{first}.toml").exists():
            wrong.add(f"{called} {first}")
        known = flags_of(called) | (flags_of("train") if called == "benchmarks.train_step" else set())
        wrong |= {f"{called} {flag}" for flag in given - known if not of_a_reward(flag)}
    return wrong


def of_a_reward(flag: str) -> bool:
    """Whether a flag chooses rewards, or is a setting of one."""
    names = {field.name for settings in (Reward, *REWARDS.values()) for field in fields(settings)}
    settings = "|".join(name.replace("_", "-") for name in names)
    return re.fullmatch(rf"--rewards(\.[\w-]+\.({settings}))?", flag) is not None


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=name_of)
def test_commands_and_their_flags_exist(page: Path) -> None:
    assert not wrong_calls(code_of(page))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_named_alone_exist(page: Path) -> None:
    of_pytest = flags_in((ROOT / "benchmarks" / "conftest.py").read_text("utf-8"))
    known = OF_VLLM.union(
        of_pytest, *(flags_of(called) for called in {"train"} | {call[0] for call in calls(code_of(page))})
    )
    alone = {flag for each in quoted(page.read_text("utf-8")) if each.startswith("--") for flag in flags_in(each)}
    assert not {flag for flag in alone - known if not of_a_reward(flag)}


def wrong_settings(text: str) -> set[str]:
    """`section.field` of no recipe."""
    settings = {flag.removeprefix("--").replace("-", "_") for flag in flags_of("train")}
    sections = {field.name for field in fields(Recipe)} - {"rewards"}
    named = {found[0] for each in quoted(text) if (found := re.match(r"[a-z]+\.[a-z][a-z0-9_.]*", each))}
    return {name for name in named if name.partition(".")[0] in sections and not name.endswith(USER_FILES)} - settings


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_exist(page: Path) -> None:
    assert not wrong_settings(page.read_text("utf-8"))


def test_a_wrong_command_flag_or_setting_would_be_seen() -> None:
    code = """
torchrun --nproc-per-node 8 -m ngrpo_train train flux_lora --train.steps 3 --train.step 3  # --no-such-flag
ngrpo plan flux_lora --gpu h100-80 --no-such-flag
ngrpo eval runs/x --rewards A --rewards.A.path m:f --rewards.A.paths m:f
ngrpo no-such-command --flag
ngrpo train flux_loro
ngrpo experiment sigma --table-only
ngrpo experiment sigmas
ngrpo train RECIPE
python -m benchmarks.no_such
"""
    assert wrong_calls(code) == {
        "train --train.step",
        "plan --no-such-flag",
        "eval --rewards.A.paths",
        "no-such-command",
        "train flux_loro",
        "experiment sigmas",
        "benchmarks.no_such",
    }
    text = "`train.steps` or `train.step`, `algorithm.eta = 0.3`, `algorithm.branch_steps`, `prompts.txt`, `x.y`"
    assert wrong_settings(text) == {"train.step"}


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"^ *make ([a-z]+)", code_of(page), flags=re.MULTILINE)}
    assert named
    assert named <= targets
