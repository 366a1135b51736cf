"""The command: help, spelling mistakes, bad input refused before any work, and what stops a run."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from ngrpo_train import __main__ as command
from ngrpo_train.recipe.parsing import find_recipe, resolve
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.rewards import shipped
from ngrpo_train.run import loop, prepare, trainer

COMMANDS = ["train", "sample", "eval", "export", "doctor"]


@pytest.fixture
def no_model(monkeypatch):
    """Fails a test that gets as far as loading a model."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(trainer, "FlowModel", load)


# --- help


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_commands_and_recipes(ngrpo, arguments):
    code, out, err = ngrpo(*arguments)
    assert (code, err) == (0, "")
    for name in command.COMMANDS:
        assert f"\n  {name} " in out
    assert "shapes_cpu" in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(ngrpo, monkeypatch, name, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = ngrpo(name, "--help")
    assert code == 0
    assert out.startswith(f"usage: ngrpo {name}")
    if name != "doctor":
        assert max(map(len, out.splitlines())) <= width


def fields_of(section):
    """The names of a section's fields, and of those of a table in it, below its name."""
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            yield from (f"{entry.name}.{inner}" for inner in fields_of(value))
        else:
            yield entry.name


def test_train_help_has_every_field_and_the_recipes_defaults(ngrpo, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = ngrpo("train", "shapes_cpu", "--help")
    for section in dataclasses.fields(Recipe):
        if section.name != "rewards":
            for name in fields_of(getattr(Recipe(), section.name)):
                assert f"--{section.name}.{name.replace('_', '-')} " in out
    assert "--rewards.shapes-verifier.weight" in out
    assert "(default: shapes)" in out
    assert "(default: shapes:train)" in out


def test_version(ngrpo, monkeypatch):
    monkeypatch.setattr(command, "version", lambda name: "1.2.3")
    assert ngrpo("--version") == (0, "ngrpo 1.2.3\n", "")


@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}])
def test_cudas_memory_grows_in_segments_unless_the_user_says_otherwise(ngrpo, monkeypatch, own):
    """Read by PyTorch, which a command imports (see the next test)."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert ngrpo("--version")[0] == 0
    found = {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}
    assert found == (own or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_asking_for_help_does_not_import_torch():
    program = (
        "import sys; from ngrpo_train.__main__ import main\n"
        "for arguments in ([], ['--version'], ['trian']): main(arguments)\n"
        "for name in ('train', 'plan', 'profile', 'embed', 'experiment'): main([name, 'nosuch'])\n"
        "for name in ('sample', 'eval', 'export'): main([name, '--out', 'x'])\n"
        "for name in ('sample', 'eval'): main([name, 'shapes', '--per-prompt=0'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, env=os.environ, check=False)
    assert ended.returncode == 0, ended.stderr


def test_every_file_in_commands_is_a_command_or_what_they_share():
    """So that a new one is found, and is on the page of `ngrpo --help`."""
    files = {path.stem for path in Path(command.__file__).parent.glob("commands/*.py")}
    assert files - {"__init__", "arguments"} == {name.replace("-", "_") for name in command.COMMANDS}


# --- spelling mistakes


@pytest.mark.parametrize(
    "arguments, answer",
    [
        (["trian"], "no command 'trian'; did you mean train?"),
        (["train", "shape_cpu"], "did you mean shapes_cpu?"),
        (["train", "--algorithm.sigm", "0.5"], "--algorithm.sigma"),
        (["train", "--resme", "latest"], "--resume"),
        (["sample", "shapes", "--per-promt", "2"], "--per-prompt"),
        (["eval", "shapes", "--rewrads", "a"], "--rewards"),
        (["train", "--rewards.shapes_verifer.weight", "1"], "did you mean shapes_verifier?"),
        (["eval", "shapes", "--rewards", "shapes_juge"], "did you mean shapes_judge?"),
        (["sample", "shapes", "--algorithm.sigma", "0.5"], "Unrecognized options: --algorithm.sigma"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misspelling_is_answered(ngrpo, no_model, tmp_path, monkeypatch, arguments, answer):
    monkeypatch.chdir(tmp_path)
    code, _, err = ngrpo(*arguments)
    assert code == 2
    assert answer in err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_reward_is_answered_with_the_list(ngrpo, no_model, tiny_recipe):
    code, _, err = ngrpo("train", tiny_recipe, "--rewards.nosuch.weight", "1")
    assert code == 2
    assert err.splitlines() == [
        f"ngrpo train: rewards.nosuch: no reward of that name; there are {', '.join(shipped.NAMES)}, or set "
        "rewards.nosuch.path = 'package.module:callable'"
    ]


def test_a_misspelt_key_in_a_recipe_file(ngrpo, no_model, tiny_recipe):
    tiny_recipe.write_text(tiny_recipe.read_text().replace("num_anchors", "num_anchor"))
    code, _, err = ngrpo("train", tiny_recipe)
    assert code == 2
    assert "--algorithm.num-anchors" in err
    assert err.endswith("in the recipe tiny.toml\n")


# --- bad input


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--prompts.source", "nowhere.txt"], "prompts.source 'nowhere.txt': [Errno 2] No such file"),
        (["--prompts.source", "empty.txt"], "prompts.source 'empty.txt': there are no prompts in it"),
        (["--evaluation.validation", "empty.txt"], "evaluation.validation 'empty.txt': there are no prompts in it"),
        (["--evaluation.test", "shapes:tset"], "evaluation.test 'shapes:tset': unknown split 'tset'"),
        (["--algorithm.sigma", "0"], "algorithm.sigma = 0.0 must be in (0, 1]"),
        (["--algorithm.sigma", "1.5"], "algorithm.sigma = 1.5 must be in (0, 1]"),
        (["--algorithm.p", "2.5"], "algorithm.p = 2.5 must be in (0, 2]"),
        (["--algorithm.num-anchors", "5"], "algorithm.num_anchors = 5 must not exceed algorithm.num_generations = 4"),
        (
            ["--algorithm.num-anchors=4", "--algorithm.updates-per-iteration=3"],
            "algorithm.updates_per_iteration = 3 must divide algorithm.num_anchors = 4",
        ),
        (
            ["--algorithm.num-train-steps", "4"],
            "algorithm.num_train_steps = 4 must not exceed the 3 steps inside algorithm.step_range = (0.0, 0.75) of "
            "sampling.num_inference_steps = 4",
        ),
        (["--optimizer.learning-rate", "-1"], "optimizer.learning_rate = -1.0 must be positive"),
        (["--rewards.brightness.path", "nowhere:score"], "rewards.brightness.path = 'nowhere:score': No module named"),
        (["--rewards.brightness.path", "tiny_scorers:nil"], "rewards.brightness.path = 'tiny_scorers:nil': "),
        (["--rewards.brightness.path", "math:pi"], "rewards.brightness.path = 'math:pi' is not callable"),
        (["--log.output-dir", "taken"], "log.output_dir = 'taken' exists: pass --resume latest, --overwrite, or"),
        (["--log.output-dir", "empty.txt"], "log.output_dir = 'empty.txt' is not a directory"),
        (["--log.output-dir", "taken/mine/run"], "log.output_dir = 'taken/mine/run' cannot be written to: Not a dir"),
        (["--resume", "latest"], "no checkpoint 'latest' in runs/tiny; steps there: none"),
        (["--resume", "latest", "--overwrite"], "--resume latest and --overwrite exclude each other"),
        (["--parallel.device", "cuda"], "parallel.device = 'cuda' but torch sees no CUDA device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_before_any_work(ngrpo, no_model, tiny_recipe, flags, complaint):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    Path("empty.txt").write_text("\n \n")
    Path("taken").mkdir()
    Path("taken/mine").write_text("precious")
    code, out, err = ngrpo("train", tiny_recipe, *flags)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith(f"ngrpo train: {complaint}")
    assert out == ""
    assert not list(Path().glob("runs/*/*"))
    assert Path("taken/mine").read_text() == "precious"


def test_a_directory_without_a_transformer(ngrpo, tiny_recipe, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    code, _, err = ngrpo("train", tiny_recipe, "--model.name-or-path", "model")
    assert code == 2
    complaint = "model.name_or_path = 'model' has no transformer/config.json, as a pipeline's directory has"
    assert err == f"ngrpo train: {complaint}\n"


def test_a_read_only_directory(ngrpo, no_model, tiny_recipe, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # whoever runs the tests may be allowed to write anywhere
    code, _, err = ngrpo("train", tiny_recipe, "--log.output-dir", "out")
    assert (code, err) == (2, "ngrpo train: log.output_dir = 'out' cannot be written to: Permission denied\n")


@pytest.mark.parametrize("name", ["sample", "eval", "export"])
def test_commands_want_a_first_argument(ngrpo, name):
    code, _, err = ngrpo(name, "--out", "x")
    assert code == 2
    assert err == f"ngrpo {name}: the first argument must name a run directory or a model\n"


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["eval", "{model}"], "--prompts.source must name a prompt source: a file, "),
        (["eval", "{model}", "--prompts.source", "shapes:test"], "--rewards must name at least one reward"),
        (["sample", "{model}"], "--prompts.source must name a prompt source: a file, "),
        (["sample", "shapes", "--per-prompt", "0"], "--per-prompt = 0 must be positive"),
        (["sample", "shapes", "--sampling.height", "50"], "sampling.height = 50 must be a positive multiple of 16"),
        (["sample", "shapes", "--checkpoint", "best"], "--checkpoint = 'best' is for a run, and 'shapes' is not a run"),
        (["export", "shapes", "--out", "x"], "'shapes' is not a run directory: it has no recipe.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_to_other_commands(ngrpo, tiny_dev, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    code, _, err = ngrpo(*[argument.format(model=tiny_dev) for argument in arguments])
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith(f"ngrpo {arguments[0]}: {complaint}")


def test_a_failed_start_with_overwrite_deletes_nothing(ngrpo, tiny_recipe):
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/metrics.jsonl").write_text("precious")
    code, _, err = ngrpo("train", tiny_recipe, "--overwrite", "--model.name-or-path", "./nowhere")
    assert code == 2
    assert "./nowhere" in err
    assert Path("runs/tiny/metrics.jsonl").read_text() == "precious"


def test_errors_of_our_own_making_keep_their_traceback(ngrpo, tiny_recipe, monkeypatch):
    monkeypatch.setattr(prepare, "check", lambda *args: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):  # a ValueError, but of code that is no part of this package
        ngrpo("train", tiny_recipe)


# --- a run


def test_a_run_from_a_toml_file(ngrpo, tiny_recipe):
    code, out, _ = ngrpo("train", tiny_recipe, "--algorithm.sigma", "0.7", "--evaluation.test", "prompts.txt")
    assert code == 0
    run = Path("runs/tiny")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert (run / "before_after.png").exists()
    assert "Before and after" in out
    assert re.search(r"redness +0\.", (run / "before_after.txt").read_text())

    # What is written beside the run is the recipe that ran, whole, and reads back the same.
    text = (run / "recipe.toml").read_text()
    expected = tomllib.loads(tiny_recipe.read_text())
    written = resolve(tomllib.loads(text), name="recipe.toml")
    assert written.algorithm.sigma == 0.7
    assert written.rewards["redness"].log_only
    expected["algorithm"]["sigma"] = 0.7
    expected["evaluation"] = {"test": "prompts.txt"}
    expected["parallel"]["attention"] = "native"  # what "auto" came to
    assert written == resolve(expected, name="tiny.toml")
    assert set(tomllib.loads(text)) == {section.name for section in dataclasses.fields(Recipe)}

    # The same command again touches nothing; --overwrite does.
    code, _, err = ngrpo("train", tiny_recipe)
    assert code == 2
    assert "runs/tiny' exists" in err
    assert (run / "recipe.toml").read_text() == text
    code, _, _ = ngrpo("train", tiny_recipe, "--overwrite", "--train.steps", "1")
    assert code == 0
    assert not (run / "before_after.png").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_packaged_name_with_everything_overridden(ngrpo, tiny_recipe, tiny_dev, monkeypatch):
    seen = {}

    def train(recipe, run, **options):
        seen.update(recipe=recipe, run=run, **options)
        return 0

    monkeypatch.setattr(loop, "train", train)
    code, _, _ = ngrpo("train", "shapes_cpu", "--train.steps", "7", "--resume", "latest")
    shipped = resolve(tomllib.loads(find_recipe("shapes_cpu").read_text()), name="shapes_cpu")
    assert code == 0
    assert seen["recipe"] == dataclasses.replace(shipped, train=dataclasses.replace(shipped.train, steps=7))
    assert (seen["run"].parent, seen["resume"], seen["overwrite"]) == (Path("runs"), "latest", False)


def test_a_resumed_run_elsewhere_spares_the_run_that_is_there(ngrpo, tiny_recipe):
    """--resume PATH continues in the run's own directory, or begins a new one; it takes over no other run."""
    flags = ["--checkpoint.every", "1", "--evaluation.test", "prompts.txt"]
    assert ngrpo("train", tiny_recipe, *flags)[0] == 0
    Path("other").mkdir()
    Path("other/metrics.jsonl").write_text("precious")
    resume = ["--resume", "runs/tiny/checkpoints/step_000001"]
    code, _, err = ngrpo("train", tiny_recipe, *flags, *resume, "--log.output-dir", "other")
    assert code == 2
    assert "log.output_dir = 'other' exists" in err
    assert Path("other/metrics.jsonl").read_text() == "precious"

    code, _, _ = ngrpo("train", tiny_recipe, *flags, *resume, "--log.output-dir", "fresh")
    assert code == 0
    # "Before" is the base model there too, and the recipe is written, so that the new run can be sampled from.
    assert json.loads(Path("fresh/before.json").read_text()) == json.loads(Path("runs/tiny/before.json").read_text())
    assert Path("fresh/recipe.toml").exists()
    assert json.loads(Path("fresh/after.json").read_text()) == json.loads(Path("runs/tiny/after.json").read_text())


@pytest.mark.parametrize(
    "body, complaint",
    [
        ("raise KeyError('palette')", "failed on 8 pictures, the first for {prompt}: KeyError: 'palette'"),
        ("return None", "failed on 8 pictures, the first for {prompt}: "),
        ("return images.float().mean((1, 2, 3)) / 0 * 0", "= nan for the prompt {prompt}"),
        ("return [float('inf')] * len(prompts)", "= inf for the prompt {prompt}"),
        (
            "return images.float().mean((0, 1, 2))",
            "returned a tensor of shape [32] for 8 pictures, the first for {prompt}",
        ),
    ],
)
def test_a_failing_reward_stops_the_run(ngrpo, tiny_recipe, tmp_path, monkeypatch, body, complaint):
    monkeypatch.syspath_prepend(tmp_path)
    module = f"failing_scorers_{tmp_path.name}"
    Path(f"{module}.py").write_text(f"def score(images, prompts):\n    {body}\n")
    code, _, err = ngrpo("train", tiny_recipe, "--rewards.brightness.path", f"{module}:score")
    [line] = [line for line in err.splitlines() if line.startswith("ngrpo train: ")]
    prompts = Path("prompts.txt").read_text().splitlines()
    named = [f"{prompt!r} (row {row} of its file)" for row, prompt in enumerate(prompts, 1)]
    expected = [f"ngrpo train: rewards.brightness {complaint.format(prompt=prompt)}" for prompt in named]
    assert code == 1
    assert line.startswith(tuple(expected))
    assert "Traceback" not in err
    assert Path("runs/tiny/metrics.jsonl").read_text() == ""


def test_a_long_prompt_warns_once_in_a_run(ngrpo, tiny_recipe, caplog):
    Path("prompts.txt").write_text("\n".join(f"{number} " + "circle " * 20 for number in range(4)))
    assert ngrpo("train", tiny_recipe)[0] == 0
    assert sum("is cut to sampling.max_sequence_length = 16" in record.getMessage() for record in caplog.records) == 1
