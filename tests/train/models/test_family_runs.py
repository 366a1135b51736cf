"""Every family of flow models trained for three iterations: resumed, averaged, exported, and on two processes.

The letters are those of the table in docs/models.md.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ngrpo_train.models.model import FlowModel
from ngrpo_train.run.checkpoint import load_weights

from ...stock import draw
from ..runs import Run, figures, saved
from .family_case import SIGMAS, TEXTS, Case, Cases, families_in_full, make_cases, solve

ITERATIONS = 3
NEIGHBOR = {
    "algorithm.num-anchors": "2",
    "algorithm.num-train-steps": "2",
    "algorithm.step-range": "0 0.75",
    "model.ema": "0.5",
}
WALKS = {
    "algorithm.name": "flow_grpo",
    "algorithm.num-generations": "4",
    "algorithm.updates-per-iteration": "1",
    "model.tuning": "lora",
    "model.lora-rank": "4",
    "model.lora-alpha": "8",
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return make_cases(tmp_path_factory.mktemp("families"))


def run(case: Case, name: str, changes: dict[str, str], resume: str = "", **more: str) -> Run:
    """A run of a family's tiny model, by its recipe file."""
    recipe = case.directory.parent / f"{case.directory.name}.toml"
    if not recipe.exists():
        write_recipe(case, recipe)
    return Run(case.directory.parent / name, changes | more, resume, recipe=str(recipe), defaults={})


def write_recipe(case: Case, path: Path) -> None:
    prompts = path.with_suffix(".jsonl")
    fields = "".join(f', "{field}": "{file}"' for field, file in case.prompts[0].row.items())
    prompts.write_text("".join(f'{{"prompt": "{text}"{fields}}}\n' for text in TEXTS))
    sampling = "\n".join(f"{name} = {value!r}" for name, value in case.family.sampling.items())
    path.write_text(f"""
        [model]
        name_or_path = "{case.directory}"
        gradient_checkpointing = "none"
        [prompts]
        source = "{prompts}"
        per_rank = 2
        [sampling]
        num_inference_steps = 4
        {sampling}
        [algorithm]
        num_generations = 4
        [rewards.redness]
        path = "runs:redness"
        [optimizer]
        learning_rate = 1e-3
        [train]
        steps = {ITERATIONS}
        [parallel]
        device = "cpu"
        compute_dtype = "float32"
        [checkpoint]
        every = 1
        keep = 9
        [log]
        trackers = []
        num_images = 2
        images_every = 1000
        """)


def trained_model(case: Case, directory: Path, **model: Any) -> FlowModel:
    loaded = case.load(**model)
    load_weights(loaded, directory / "checkpoints" / f"step_{ITERATIONS:06d}")
    return loaded


def assert_it_learned(case: Case, directory: Path) -> None:
    rows = figures(directory)
    assert len(rows) == ITERATIONS
    assert all(row["update/grad_norm"] > 0 and row["policy/ratio_mean"] == pytest.approx(1, abs=1e-4) for row in rows)


# --- d, e: trained, resumed, averaged; what leaves draws in stock diffusers


@families_in_full
def test_a_full_fine_tune_resumes_to_the_bit_and_leaves_as_a_pipeline(cases: Cases, family: str) -> None:
    case = cases(family)
    full = run(case, f"{family}_full", NEIGHBOR)
    assert full.make() == 0
    assert_it_learned(case, full.directory)
    middle = str(full.directory / "checkpoints" / "step_000002")
    again = run(case, f"{family}_again", NEIGHBOR, resume=middle)
    assert again.make() == 0
    assert_same_tensors(saved(again.directory, ITERATIONS), saved(full.directory, ITERATIONS))

    prompt, noise = case.prompts[0], case.noise(1)
    averaged = trained_model(case, full.directory)
    ours = averaged.decode(solve(averaged, noise, prompt))[0]
    stock = case.load_stock(full.directory / "export")
    theirs = draw(stock, prompt.text, noise, SIGMAS, case.call(prompt))
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert not torch.equal(ours, case.model.decode(solve(case.model, noise, prompt))[0]), "it has moved"


@families_in_full
def test_adapters_leave_as_diffusers_loads_them(cases: Cases, family: str) -> None:
    case = cases(family)
    lora = run(case, f"{family}_lora", WALKS)
    assert lora.make() == 0
    assert_it_learned(case, lora.directory)
    prompt, noise = case.prompts[0], case.noise(1)
    adapted = trained_model(case, lora.directory, tuning="lora", lora_rank=4, lora_alpha=8)
    ours = adapted.decode(solve(adapted, noise, prompt))[0]
    stock = case.load_stock()
    stock.load_lora_weights(lora.directory / "export")
    if (second := lora.directory / "export" / "transformer_2").is_dir():
        stock.load_lora_weights(second, load_into_transformer_2=True)
    theirs = draw(stock, prompt.text, noise, SIGMAS, case.call(prompt))
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert not torch.equal(ours, case.model.decode(solve(case.model, noise, prompt))[0]), "it has moved"


def assert_same_tensors(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value) if isinstance(value, Tensor) else got[name] == value, name
