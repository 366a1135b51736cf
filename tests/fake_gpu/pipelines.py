"""Published pipelines on the fake device: real configs and modules, no weights, and tokens that mean nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from ngrpo_train.models.published import published

if TYPE_CHECKING:
    from ngrpo_train.models.sizes import Architecture
    from ngrpo_train.recipe.sections import Sampling

INDEX, SCHEDULER, TOKENIZER = "model_index", "scheduler", "tokenizer"


def write(directory: Path, name: str, **changes: Mapping[str, Any]) -> None:
    """Write the directory of a published model, by its short name: configs only, with changes by part."""
    configs = dict(published(f"random:{name}") or {})
    index: dict[str, Any] = {**configs.pop(INDEX), TOKENIZER: ["transformers", "PreTrainedTokenizerFast"]}
    for part, config in configs.items():
        found = {key: _changed(value, changes.get(part, {}).get(key)) for key, value in config.items()}
        kind = config.get("_class_name")
        index[part] = ["diffusers", kind] if kind else ["transformers", config["architectures"][0]]
        file = f"{SCHEDULER}_config.json" if part == SCHEDULER else "config.json"
        (directory / part).mkdir(parents=True)
        (directory / part / file).write_text(json.dumps(found))
    (directory / TOKENIZER).mkdir()
    (directory / TOKENIZER / "tokenizer.json").touch()
    (directory / f"{INDEX}.json").write_text(json.dumps(index))


def velocity_arguments(architecture: Architecture, sampling: Sampling, pictures: int, device: Any) -> dict[str, Any]:
    """What a transformer in FLUX.1's layout is called with for so many pictures, on the device and without values."""
    import torch

    from ngrpo_train.models.inputs import inputs_of

    [call] = inputs_of(architecture, sampling, torch.bfloat16, pictures).velocity
    return {
        name: torch.empty(x.shape, dtype=x.dtype, device=device) if isinstance(x, torch.Tensor) else x
        for name, x in call.named.items()
    }


def _changed(value: Any, change: Any) -> Any:
    if change is None:
        return value
    return {**value, **change} if isinstance(value, Mapping) else change


@contextmanager
def without_weights() -> Iterator[None]:
    """Load such directories: parts are made on the device, and the transformer's weights are drawn at random."""
    import torch
    from torch._subclasses import FakeTensor

    from ngrpo_train.models import driven, loading, outline, pipeline, sizes

    def loaded(self: pipeline.Pipeline, absent: Any) -> Any:
        architecture = sizes.find_architecture(str(self.directory))
        dtypes = {"vae": self._compute_dtype}
        parts: dict[str, Any] = {
            part: sizes.part_on(architecture, part, str(self.device), dtypes.get(part, torch.bfloat16))
            for part in ("vae", *architecture.encoders)
        }
        parts |= dict.fromkeys(self.folders)
        return outline._assembled(self.kind, architecture.configs, parts, self.sampling)

    class Row(FakeTensor):
        expand, __float__ = driven._Row.expand, driven._Row.__float__  # type: ignore[assignment]

    class Rows(list[torch.Tensor]):
        """A step whose timestep is a `driven._Row`, for fake tensors, which cannot become a subclass by a view."""

        def __init__(self, sigma_N: torch.Tensor) -> None:
            super().__init__([sigma_N.clone()])
            self[0].__class__ = Row

        def __mul__(self, scale: Any) -> Rows:
            return Rows(self[0] * scale)

    rows = mock.patch.object(driven.Driven, "_rows", staticmethod(Rows))
    drawn = mock.patch.object(pipeline, "fill", lambda weights, *_: loading._randomize(weights))
    with mock.patch.object(pipeline.Pipeline, "_load_frozen", loaded), rows, drawn:
        yield
