"""A diffusers pipeline driven one velocity at a time: its own code says what the velocity of its model is.

A pipeline's `__call__` encodes, prepares latents, and loops over the steps of a scheduler. Here it is called for a
single step, without its `no_grad`:
- Its scheduler is a stand-in. It gives the pipeline our sigmas as timesteps, and ends the call at `step`, which gets
  the velocity after guidance, sign and rescaling, with its graph.
- What its methods `encode_...` and `prepare_...` return is recorded once for each prompt, and is their answer from then
  on, so that no step encodes a text or a picture again. The first result of `prepare_latents` is our state.
- What `encode_...` return may also be stored, and be their answer while a prompt is recorded. Then there need be no
  encoder.
- Called for no steps at all, it decodes.
So nothing here depends on how a family packs its latents, guides or decodes.
"""

# N pictures, P prompts, S the dimensions of a latent.

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils import _pytree as pytree

from ngrpo_train.models.feature_cache import rows_within
from ngrpo_train.models.recorded import Call, Form, Recorded
from ngrpo_train.parallel.sending import sent

_ENCODING, _LATENTS = "encode_", "prepare_latents"
_NOT_RECORDED = {"prepare_extra_step_kwargs", "prepare_ip_adapter_image_embeds"}
_PROCESSORS = ("image_processor", "mask_processor", "video_processor")
_LONGER = "a text of more words than the empty one, so that it has another length"

Transformers = Mapping[str, Callable[..., Any]]
"""What computes, by the name of its place in the pipeline: "transformer", "transformer_2"."""


class Driven:
    """A pipeline, changed in place for this use alone. Call `learn` before anything else."""

    latent_shape: tuple[int, ...]
    """S, known once a prompt is recorded."""
    form: Form
    encoded_form: Form
    """Of the methods `encode_...` alone."""
    encodes_pictures: bool
    """True where one of these methods is given a picture."""
    takes_rows: bool
    """True where the pipeline bears a timestep for each picture, and gives each picture its own."""
    takes_batch: bool
    """True where it bears several pictures at once."""

    def __init__(
        self,
        pipeline: Any,
        fixed: Mapping[str, Any],
        transformers: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Take over a pipeline whose encoders and VAE are placed; its transformers may be missing.

        `fixed` are arguments of every call: size, guidance, lengths. `transformers` are on the meta device and only
        tell their configs. `dtype` is that of the transformers' arithmetic.
        """
        kind = type(pipeline)
        self._call: Callable[..., Any] = inspect.unwrap(kind.__call__)
        self.pipeline, self.device, self.dtype = pipeline, device, dtype
        self._fixed = dict(fixed)
        self.parameters = inspect.signature(self._call).parameters
        self._scheduler = _Steps(pipeline.scheduler.config)
        self._seen = {name: _Seen(module, device, dtype) for name, module in transformers.items()}
        pipeline.__class__ = type(kind.__name__, (_Quiet, kind), {"_execution_device": device, "device": device})
        # `object`, because a pipeline notes the classes of its parts for `save_pretrained`, and these have none.
        for name, part in {"scheduler": self._scheduler, **self._seen}.items():
            object.__setattr__(pipeline, name, part)
        for name in dir(kind):
            if name.startswith((_ENCODING, "prepare_")) and name not in _NOT_RECORDED:
                object.__setattr__(pipeline, name, self._answering(name, getattr(pipeline, name)))
        for processor in filter(None, (getattr(pipeline, name, None) for name in _PROCESSORS)):
            for name in ("preprocess", "preprocess_video", "resize"):
                if hasattr(processor, name):
                    setattr(processor, name, self._remembering(getattr(processor, name)))
        self._pictures: Mapping[str, Any] = {}
        self._recording: list[Call] | None = None
        self._stored: Iterator[Call] | None = None  # answers of `encode_...` while a prompt is recorded
        self._depth = 0  # of methods that call others
        self._answers: Iterator[Call] = iter(())
        self._state = torch.empty(0)
        self._latent_dtype = dtype
        self._processed: list[Any] = []
        self._remembered: Iterator[Any] = iter(())

    # -- Prompts -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def learn(self, pictures: Mapping[str, Any], stored: Sequence[Recorded] | None = None) -> Recorded:
        """Learn the form of what the pipeline prepares for prompts with such pictures; the record of the empty text.

        `pictures` are arguments of the pipeline's call by name, for one prompt; later ones may differ in their pixels.
        With `stored`, which `examples` gave, nothing is encoded. Raises ValueError where it has other calls than the
        pipeline makes.
        """
        self.encodes_pictures = False
        rows: Sequence[Recorded | None] = [None] * 3
        if stored:
            rows = stored[0], Recorded.cat([stored[0], stored[0]]), Recorded.cat(stored)
        try:
            several = self._recorded(["", ""], pictures, rows[1]), self._recorded(["", _LONGER], pictures, rows[2])
        except ValueError:
            if not pictures:
                raise
            several = None  # an encoder that sees pictures may want one for each text
        one = self._recorded([""], pictures, rows[0])  # last: what it remembers of pictures is of one prompt
        if several:
            self.form = Form.of(one, *several)
            self.encoded_form = Form.of(_encoded(one), *map(_encoded, several))
        else:
            self.form, self.encoded_form = Form.of_single(one), Form.of_single(_encoded(one))
        record = self.form.record(one)
        self.takes_rows = self._takes_rows(record)
        self.takes_batch = self.takes_rows or self._is_taken(record, torch.tensor([0.75])) is not None
        return record

    @torch.no_grad()
    def record(self, text: str, pictures: Mapping[str, Any], stored: Recorded | None = None) -> Recorded:
        """What the pipeline prepares for a prompt: one row. With `stored`, from `encode`, nothing is encoded."""
        return self.form.record(self._recorded([text], pictures, stored))

    @torch.no_grad()
    def encode(self, text: str, pictures: Mapping[str, Any]) -> Recorded:
        """What the pipeline's `encode_...` give for a prompt: one row."""
        return self.encoded_form.record(_encoded(self._recorded([text], pictures)))

    def examples(self, pictures: Mapping[str, Any]) -> list[Recorded]:
        """What `encode` gives for the empty text and for a longer one: from these, `learn` can learn."""
        return [self.encode("", pictures), self.encode(_LONGER, pictures)]

    def _recorded(
        self, texts: Sequence[str], pictures: Mapping[str, Any], stored: Recorded | None = None
    ) -> list[Call]:
        self._recording, self._processed, self._pictures = [], [], pictures
        self._stored = stored.calls() if stored else None
        try:
            # Drawing the latents of a video model at full size would take a moment and is no use: they are replaced.
            self._run(texts, torch.ones(1), torch.ones(1), {}, generator=torch.Generator().manual_seed(0))
            return self._recording
        finally:
            self._recording = self._stored = None

    def _is_taken(self, record: Recorded, sigmas: Tensor) -> list[Tensor] | None:
        """The tensors that a transformer is given for two pictures of a prompt; None if the pipeline fails on them."""
        seen: list[Tensor] = []

        def look(*arguments: Any, **named: Any) -> None:
            seen.extend(value for value in pytree.tree_leaves((arguments, named)) if isinstance(value, Tensor))
            raise _Ended

        rows = record.rows(torch.zeros(2, dtype=torch.int64, device=self.device))
        x_NS = torch.zeros(2, *self.latent_shape, device=self.device)
        try:
            self._replay(dict.fromkeys(self._seen, look), x_NS, sigmas, rows, "latent")
        except (RuntimeError, TypeError, ValueError):  # each pipeline fails in its own way
            return None
        return seen

    def _takes_rows(self, record: Recorded) -> bool:
        seen = self._is_taken(record, self._rows(torch.tensor([0.75, 0.25], device=self.device)))
        # Guidance may have doubled them.
        own = [value for value in seen or () if value.is_floating_point() and value.ndim == 1 and len(value) in (2, 4)]
        return any(bool(value[0] != value[1]) for value in own)

    # -- Pictures ------------------------------------------------------------------------------------------------------

    def velocity(self, transformers: Transformers, x_NS: Tensor, sigma_N: Tensor, rows: Recorded) -> Tensor:
        """The velocity [N, *S] at states `x_NS`, with gradients, of rows that may go together (`Recorded.unlike`).

        Unless the pipeline `takes_rows`, all sigmas are the same, and on the CPU.
        """
        return self._step(transformers, x_NS, self._rows(sigma_N) if self.takes_rows else sigma_N[:1], rows)

    def is_early(self, sigma: float) -> bool:
        """True where the first of two transformers computes this noise level; always for a pipeline that has one.

        It is compared as the pipeline compares it: a sigma at the very boundary is rounded to a timestep.
        """
        boundary = self.pipeline.config.get("boundary_ratio")
        return boundary is None or bool(torch.tensor(sigma) * self._scheduler.scale >= boundary * self._scheduler.scale)

    @staticmethod
    def _rows(sigma_N: Tensor) -> Tensor:
        return sigma_N.as_subclass(_Row)[None]

    def _step(self, transformers: Transformers, x_NS: Tensor, sigmas: Tensor, rows: Recorded) -> Tensor:
        self._replay(transformers, x_NS, sigmas, rows, "latent")
        velocity, self._scheduler.velocity = self._scheduler.velocity, None  # else it would keep the graph
        assert velocity is not None, "the pipeline made no step"
        return velocity

    @torch.no_grad()
    def decode(self, x_NS: Tensor, rows: Recorded) -> Tensor:
        """What the pipeline makes of latents, in [0, 1]: pictures [N, 3, H, W] or videos [N, F, 3, H, W]."""
        returned = self._replay({}, x_NS, torch.empty(0), rows, "pt")
        decoded: Tensor = returned[0]
        return decoded

    @torch.no_grad()
    def before_vae(self, rows: Recorded) -> Tensor | None:
        """The latents of N pictures as the VAE would decode them; None if there is no VAE. Nothing is decoded."""
        seen: list[Tensor] = []

        def look(latents: Tensor, *_: Any, **__: Any) -> None:
            seen.append(latents)
            raise _Ended

        vae = getattr(self.pipeline, "vae", None)
        if vae is not None:
            vae.decode = look
            try:
                x_NS = torch.zeros(rows.count, *self.latent_shape, device=self.device)
                self._replay({}, x_NS, torch.empty(0), rows, "pt")
            finally:
                del vae.decode
        return seen[0] if seen else None

    def _replay(
        self, transformers: Transformers, x_NS: Tensor, sigmas: Tensor, rows: Recorded, output_type: str
    ) -> Any:
        assert tuple(x_NS.shape[1:]) == self.latent_shape, (x_NS.shape, self.latent_shape)
        self._answers, self._state = rows.calls(), x_NS.to(self._latent_dtype)
        try:
            return self._run(
                [""] * len(x_NS), sigmas * self._scheduler.scale, sigmas, transformers, output_type=output_type
            )
        finally:
            self._answers, self._state = iter(()), torch.empty(0)

    # -- The pipeline's own code ---------------------------------------------------------------------------------------

    def _run(
        self, texts: Sequence[str], timesteps: Tensor, sigmas: Tensor, transformers: Transformers, **more: Any
    ) -> Any:
        """Call the pipeline for these texts; None where the call ends before it has made anything."""
        self._scheduler.timesteps, self._scheduler.sigmas = timesteps, sigmas
        self._remembered = iter(self._processed)
        for name, seen in self._seen.items():
            seen.compute = transformers.get(name)
        arguments = {**self._fixed, **self._pictures, **more}
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(texts)
        try:
            return self._call(self.pipeline, prompt=list(texts), num_inference_steps=1, return_dict=False, **arguments)
        except _Ended:
            return None
        finally:
            for seen in self._seen.values():
                seen.compute = None

    def _answering(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method that is recorded for a prompt, and answers from its record in a step."""

        def answer(*arguments: Any, **named: Any) -> Any:
            if self._recording is None:
                recorded, value = next(self._answers)
                assert recorded == name, f"{name} is called where {recorded} was"
                if name == _LATENTS:
                    return self._state if value is None else (self._state, *value)
                return value
            encodes = name.startswith(_ENCODING) and not self._depth
            if encodes and self._stored:
                stored, value = next(self._stored, ("", None))
                if stored != name:  # another version of diffusers stored it
                    raise ValueError(f"the pipeline calls {name} where {stored or 'nothing'} is stored of a prompt")
            else:
                self._depth += 1
                try:
                    value = method(*arguments, **named)
                finally:
                    self._depth -= 1
            if self._depth:
                return value
            if encodes:  # text encoders may have another dtype than the transformer
                value = pytree.tree_map(self._cast, value)
                self.encodes_pictures |= any(map(_is_picture, pytree.tree_leaves((arguments, named))))
            kept = value
            if name == _LATENTS:
                first, kept = (value[0], value[1:]) if isinstance(value, tuple) else (value, None)
                self.latent_shape, self._latent_dtype = tuple(first.shape[1:]), first.dtype
            self._recording.append((name, kept))
            return value

        return answer

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _remembering(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of a picture processor, whose last results stand in for pictures in a step: it reads their sizes."""

        def answer(*arguments: Any, **named: Any) -> Any:
            if self._recording is None:
                return next(self._remembered)
            self._depth += 1  # it may call others of its processor
            try:
                value = method(*arguments, **named)
            finally:
                self._depth -= 1
            if not self._depth:
                self._processed.append(sent(value, self.device) if isinstance(value, Tensor) else value)
            return value

        return answer


def _encoded(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if call[0].startswith(_ENCODING)]


def _is_picture(value: Any) -> bool:
    return isinstance(value, (Image.Image, Tensor))


class _Ended(Exception):
    """The pipeline's call has given what it was made for."""


class _Steps:
    """The scheduler that a driven pipeline sees."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, config: Any) -> None:
        self.config = config
        self.scale = float(config.get("num_train_timesteps", 1000))  # timesteps are this many sigmas
        self.timesteps = self.sigmas = torch.empty(0)
        self.velocity: Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Leave them as they are. Pipelines look for these arguments by name."""

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Nothing to do: there is one step."""

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The noise: nothing is left of a picture where all steps are made."""
        return noise

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> None:
        self.velocity = model_output
        raise _Ended


class _Seen:
    """A transformer as a pipeline sees it: what it says of itself, and a call to what computes at the moment."""

    def __init__(self, described: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.described, self.device, self.dtype = described, device, dtype
        self.compute: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.compute is None:
            raise _Ended

        def moved(value: Any) -> Any:
            # Some pipelines make small tensors on the CPU. Weights say nothing: offloaded ones wait in host memory.
            return sent(value, self.device) if isinstance(value, Tensor) else value

        arguments, named = pytree.tree_map(moved, (arguments, named))
        return self.compute(*arguments, **named)

    def cache_context(self, name: str, **_: Any) -> AbstractContextManager[None]:
        return nullcontext() if self.compute is None else rows_within([self.compute], name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.described, name)


class _Quiet:
    """A pipeline without progress bars and hooks. The device is ours: some of its parts may be elsewhere."""

    def progress_bar(self, *_: Any, **__: Any) -> AbstractContextManager[_Quiet]:
        return nullcontext(self)

    def update(self, *_: Any) -> None:
        """As a progress bar has it."""

    def maybe_free_model_hooks(self) -> None:
        """There are none."""

    def get_timesteps(self, *_: Any) -> tuple[Tensor, int]:
        """The steps that remain where a picture is changed with some strength: all; their number is asked for too."""
        timesteps: Tensor = self.scheduler.timesteps  # type: ignore[attr-defined]
        return timesteps, 1


class _Row(Tensor):
    """A timestep for each of N pictures in place of one: where a pipeline expands one to its batch, each has its own.

    Guidance by a doubled batch has them twice.
    """

    def expand(self, *sizes: Any, **_: Any) -> Tensor:
        plain, size = self.as_subclass(Tensor), sizes[0] if isinstance(sizes[0], int) else sizes[0][0]
        return plain if size == len(plain) else plain.repeat(size // len(plain))

    def __float__(self) -> float:
        """Not a number, as these are several. Wan's pipeline asks, for a cache of features that nobody keeps here."""
        return math.nan
