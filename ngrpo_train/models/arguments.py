"""The arguments of a pipeline's call that a recipe's [sampling] means; what a pipeline cannot do is refused."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from ngrpo_train.models.driven import Driven
from ngrpo_train.models.recorded import Recorded
from ngrpo_train.recipe.sections import Sampling

_CONSTANT = {  # of every pipeline that has them
    "use_resolution_binning": False,  # draw the size that is asked for, and no other near it
    "_auto_resize": False,  # take a source picture as it is fitted here
    "cfg_truncation": None,  # guide all steps, as by default; a number would be compared with timesteps on the host
}


def pipeline_class(directory: Path, name: str) -> Any:
    """The class of diffusers that the model_index.json of a model's directory names.

    Raises ValueError, naming `model.name_or_path`, for one that the installed diffusers lacks, and for one without
    transformers or latents of its own.
    """
    index = json.loads((directory / "model_index.json").read_text("utf-8"))
    wanted = str(index.get("_class_name"))
    kind = getattr(diffusers, wanted, None)
    setting = f"model.name_or_path = {name!r}"
    if kind is None:
        saved = index.get("_diffusers_version")
        by = f": it was saved by version {saved}" if saved else ""
        raise ValueError(f"{setting} needs diffusers' {wanted}, which version {diffusers.__version__} here lacks{by}")
    if index.get("transformer", [None])[0] is None:
        raise ValueError(f"{setting} is a {wanted}, which has no transformer: it is no flow model that can be trained")
    if not hasattr(kind, "prepare_latents"):
        raise ValueError(f"{setting} is a {wanted}, which does not prepare latents by a method: it cannot be driven")
    return kind


def refuse_other_scheduler(scheduler: Any, name: str) -> None:
    """Raise ValueError, naming `model.name_or_path`, for a scheduler of a model whose output is no flow's velocity."""
    kind, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type", "")
    if "FlowMatch" in kind or prediction == "flow_prediction":
        return
    predicts = f"predicts {prediction!r}" if prediction else "is for another kind of diffusion"
    raise ValueError(f"model.name_or_path = {name!r} is no flow model: its scheduler, {kind}, {predicts}")


def fixed_arguments(pipeline: Any, sampling: Sampling) -> dict[str, Any]:
    """The arguments of every call, but for guidance.

    Raises ValueError, naming the field and its value, for what this pipeline does not take.
    """
    taken = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    wanted = {
        "height": sampling.height,
        "width": sampling.width,
        "max_area": sampling.height * sampling.width,
        "num_frames": sampling.num_frames,
        "max_sequence_length": sampling.max_sequence_length,
        **_CONSTANT,
    }
    if sampling.num_frames > 1 and "num_frames" not in taken:
        raise ValueError(
            f"sampling.num_frames = {sampling.num_frames}: a {type(pipeline).__name__} draws pictures, of 1 frame"
        )
    fixed = {name: value for name, value in wanted.items() if name in taken}
    return fixed


def guidance_arguments(pipeline: Any, described: Mapping[str, Any], sampling: Sampling) -> dict[str, Any]:
    """The arguments of every call that say how it is guided; `described` are the transformers, for their configs.

    Raises ValueError, naming the field and its value, for what this pipeline does not take.
    """
    taken = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    scale, negative = sampling.guidance_scale, sampling.negative_prompt
    kind = type(pipeline).__name__
    if _is_input(taken, described):
        _refuse_negative(negative, f"a {kind} takes its guidance as an input, and draws by one forward")
        return {"guidance_scale": scale}
    name = _argument(taken)
    if name is None or not is_guided(pipeline, described, sampling):
        if scale > 1:
            raise ValueError(f"sampling.guidance_scale = {scale:g}: this {kind} takes no guidance; set it to 1")
        _refuse_negative(negative, f"a {kind} draws by one forward at guidance_scale = {scale:g}")
        return {} if name is None else {name: scale}
    if "negative_prompt" in taken:
        return {name: scale, "negative_prompt": negative}
    _refuse_negative(negative, f"a {kind} guides away from the empty text alone")
    return {name: scale}


def is_guided(pipeline: Any, described: Mapping[str, Any], sampling: Sampling) -> bool:
    """True where a second forward leads away from a negative prompt, which is then encoded too."""
    taken = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    if _is_input(taken, described) or not _argument(taken):
        return False
    scale = sampling.guidance_scale
    pipeline._guidance_scale = scale  # a property of most pipelines says by it whether there is a second forward
    return bool(getattr(pipeline, "do_classifier_free_guidance", scale > 1))


def _is_input(taken: Mapping[str, Any], described: Mapping[str, Any]) -> bool:
    return "guidance_scale" in taken and any(each.config.get("guidance_embeds") for each in described.values())


def _argument(taken: Mapping[str, Any]) -> str | None:
    """The argument that is the scale of a second forward."""
    return next((name for name in ("true_cfg_scale", "guidance_scale") if name in taken), None)


def _refuse_negative(negative: str, why: str) -> None:
    if negative:
        raise ValueError(f"sampling.negative_prompt = {negative!r} has no use: {why}")


def refuse_other_size(driven: Driven, row: Recorded, sampling: Sampling) -> None:
    """Raise ValueError, naming `sampling.height`, `width` or `num_frames`, where the pipeline would draw another size.

    Nothing is decoded. `row` is of one prompt.
    """
    pipeline, latents = driven.pipeline, driven.before_vae(row)
    drawn = {}
    spatial = _first(pipeline, "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
    if latents is not None and spatial:
        drawn = {"height": latents.shape[-2] * spatial, "width": latents.shape[-1] * spatial}
        temporal = _first(pipeline, "vae_scale_factor_temporal", "vae_temporal_compression_ratio")
        if temporal and latents.ndim == 5 and "num_frames" in driven.parameters:
            drawn["num_frames"] = (latents.shape[2] - 1) * temporal + 1
    for name, size in drawn.items():
        if size != (asked := getattr(sampling, name)):
            raise ValueError(
                f"sampling.{name} = {asked}: a {type(pipeline).__name__} would draw {size} instead; choose a number "
                "that it draws"
            )


def _first(pipeline: Any, *names: str) -> int:
    return next((int(value) for name in names if (value := getattr(pipeline, name, None))), 0)
