"""What a run leaves for others: its weights with a model card, README.md, which the hub shows."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, TypeVar

from ngrpo_train.models.directory import hub_id, licence_of
from ngrpo_train.models.export import export
from ngrpo_train.models.model import FlowModel
from ngrpo_train.models.needs import ARGUMENTS, pictures_of_pipeline
from ngrpo_train.parallel import processes
from ngrpo_train.recipe.parsing import as_toml
from ngrpo_train.recipe.sections import Model, Recipe, Sampling
from ngrpo_train.run.before_after import COLUMNS, Evaluations, compared

T = TypeVar("T")

_HERE = "path/to/this/directory"
_PICTURE = "before_after.png"


def export_run(model: FlowModel, recipe: Recipe, run: Path, step: int, directory: Path, repository: str = "") -> Path:
    """Write the model's current weights, those of `step`, into `directory`, and its card; a collective.

    `repository` is the hub's id under which the directory will be found, if it will be.
    """
    export(model, directory)
    if processes.rank() == 0:
        guidance = getattr(model.adapter, "guidance", {})
        card = model_card(model.adapter.kind, recipe, run, step, directory, repository, guidance)
        (directory / "README.md").write_text(card, encoding="utf-8")
    return directory


def model_card(
    kind: Any,
    recipe: Recipe,
    run: Path,
    step: int,
    directory: Path,
    repository: str,
    guidance: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The card of weights in `directory`, which pipelines of the class `kind` read (None: none of diffusers' does).

    `guidance` are the arguments of the pipeline's call that mean the recipe's. If the run ended at `step` with a table
    of before and after, the card has it, and its picture goes into `directory`.
    """
    scores = _scores(run) if step == recipe.train.steps else None
    name, algorithm = _name_of(recipe.model), recipe.algorithm.name
    what = "Low-rank adapters (LoRA) for" if recipe.model.tuning == "lora" else "A fine-tune of"
    parts = [
        f"# {repository.rpartition('/')[2] or run.resolve().name}",
        f"{what} `{name}`: {step} iterations of reinforcement learning by `{algorithm}`, on the reward"
        f"{_listed(recipe.trained_rewards())}. Trained with ngrpo {importlib.metadata.version('ngrpo')}.",
    ]
    if scores:
        parts += _before_and_after(run, recipe, scores, directory)
    if kind is not None:
        prompt = next(iter(scores[1].by_set.values())).prompts[0].text if scores else "..."
        parts += ["## Use", _fenced("python", _usage(kind, recipe, directory, repository, prompt, guidance))]
        parts.append(_trained_at(recipe))
    parts += ["## Recipe", _fenced("toml", as_toml(_without_places(recipe)))]
    return f"---\n{_header(kind, recipe)}---\n\n" + "\n\n".join(parts) + "\n"


def _header(kind: Any, recipe: Recipe) -> str:
    """What the hub reads of a card: YAML, of which unknown entries are left out."""
    from huggingface_hub import ModelCardData

    model = recipe.model
    bases = [name for each in (model.name_or_path, model.transformer) if each and (name := hub_id(each))]
    lora = model.tuning == "lora"
    algorithm = recipe.algorithm.name.rpartition(":")[2].replace("_", "-").lower()
    tags = ["ngrpo", "reinforcement-learning", *dict.fromkeys(["grpo", algorithm]), *(["lora"] if lora else [])]
    entries: dict[str, Any] = licence_of(model.transformer or model.name_or_path)
    if bases:
        entries |= {"base_model": bases if len(bases) > 1 else bases[0]}
        entries |= {"base_model_relation": "adapter" if lora else "finetune"}
    if kind is not None:
        given = "image" if pictures_of_pipeline(kind).needed else "text"
        drawn = "video" if recipe.sampling.num_frames > 1 else "image"
        entries |= {"library_name": "diffusers", "pipeline_tag": f"{given}-to-{drawn}"}
    return f"{ModelCardData(**entries, tags=tags).to_yaml()}\n"


def _scores(run: Path) -> tuple[Evaluations, Evaluations] | None:
    """The run's scores before and after training, if it has both."""
    files = run / "before.json", run / "after.json"
    if not all(file.exists() for file in files):
        return None
    return Evaluations.load(files[0]), Evaluations.load(files[1])


def _before_and_after(
    run: Path, recipe: Recipe, scores: tuple[Evaluations, Evaluations], directory: Path
) -> Iterator[str]:
    yield "## Rewards before and after"
    yield "Means ± standard errors over prompts, on the same noise; * is trained on."
    rows = [COLUMNS, ("---", "---", "---:", "---:", "---:"), *compared(*scores, recipe.trained_rewards())]
    yield "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    if (run / _PICTURE).exists():
        shutil.copy(run / _PICTURE, directory)
        yield f"![pictures before and after]({_PICTURE})"


def _usage(
    kind: Any, recipe: Recipe, directory: Path, repository: str, prompt: str, guidance: Mapping[str, Any]
) -> str:
    """A program that loads the weights and draws by them, as the run's evaluations do."""
    lora, place = recipe.model.tuning == "lora", repository or _HERE
    loaded = _name_of(recipe.model) if lora else place
    lines = [f'pipe = {kind.__name__}.from_pretrained("{loaded}", dtype=torch.{recipe.parallel.compute_dtype})']
    for file in sorted(directory.rglob("pytorch_lora_weights.safetensors")):
        # The adapters of a second transformer lie in a folder of its name.
        folder = file.parent.relative_to(directory).name
        where = f', subfolder="{folder}", load_into_{folder}=True' if folder else ""
        lines.append(f'pipe.load_lora_weights("{place}"{where})')
    lines.append('pipe.to("cuda")')
    given = [ARGUMENTS[field] for field in pictures_of_pipeline(kind).needed]
    is_video = recipe.sampling.num_frames > 1
    lines += [f'{name} = load_image("{name}.png")' for name in given]
    arguments = {"prompt": json.dumps(prompt, ensure_ascii=False)} | {name: name for name in given}
    drawn = _drawn(kind, recipe.evaluation_sampling()) | dict(guidance)
    arguments |= {name: json.dumps(value, ensure_ascii=False) for name, value in drawn.items()}
    call = f"pipe({', '.join(f'{name}={value}' for name, value in arguments.items())})"
    lines += [f"frames = {call}.frames[0]", 'export_to_video(frames, "video.mp4")'] if is_video else []
    lines += [] if is_video else [f'{call}.images[0].save("picture.png")']
    helpers = [*(["export_to_video"] if is_video else []), *(["load_image"] if given else [])]
    imports = ["import torch", f"from diffusers import {kind.__name__}"]
    imports += [f"from diffusers.utils import {', '.join(helpers)}"] if helpers else []
    return "\n".join([*imports, "", *lines])


def _trained_at(recipe: Recipe) -> str:
    sampling, base = recipe.sampling, recipe.model.base_dtype
    frames = f" and {sampling.num_frames} frames" if sampling.num_frames > 1 else ""
    rounded = f", over a base kept in {base}" if base != "same" else ""
    return (
        f"It was trained at {sampling.width}x{sampling.height} pixels{frames} "
        f"with guidance {sampling.guidance_scale:g} on a schedule of {sampling.num_inference_steps} steps "
        f"shifted by {sampling.shift:g}{rounded}."
    )


def _drawn(kind: Any, sampling: Sampling) -> dict[str, int]:
    """The arguments of a pipeline's call that say what to draw, and in how many steps."""
    taken = inspect.signature(inspect.unwrap(kind.__call__)).parameters
    names = ("height", "width", "num_frames", "num_inference_steps", "max_sequence_length")
    return {name: getattr(sampling, name) for name in names if name in taken}


def _name_of(model: Model) -> str:
    """The model's id on the hub if it has one; otherwise its name, without the directories that it lies in."""
    return hub_id(model.name_or_path) or _alone(model.name_or_path)


def _without_places(recipe: Recipe) -> Recipe:
    """The recipe without what is nobody else's business: directories of this machine, and other machines' addresses."""
    sections = {
        section.name: _alone_in(getattr(recipe, section.name))
        for section in dataclasses.fields(recipe)
        if section.name != "rewards"
    }
    rewards = {name: replace(_alone_in(reward), remote="") for name, reward in recipe.rewards.items()}
    return replace(recipe, **sections, rewards=rewards)


def _alone_in(section: T) -> T:
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}  # type: ignore[arg-type]
    changed = {name: _alone(value) for name, value in values.items() if isinstance(value, str)}
    return replace(section, **changed)  # type: ignore[type-var]


def _alone(value: str) -> str:
    """The last part of a path from the root or from home; any other value as it is."""
    return PurePath(value).name if value.startswith(("/", "~")) else value


def _listed(names: tuple[str, ...]) -> str:
    return f"{'s' if len(names) > 1 else ''} {', '.join(f'`{name}`' for name in names)}"


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"
