"""The model that is trained: an `Adapter` describes a family of models, and `FlowModel` does what is the same for all.

A model is a velocity v_theta(x, sigma, text) on latents x at flow time sigma in [0, 1], a text encoder before it and a
decoder behind it. An adapter brings these as plain modules. `FlowModel` places, shards and adapts the weights, cuts
forwards into chunks, keeps weights gathered or gives them up, explores with a float8 copy, and lets another model draw
beside this one.
"""

# N pictures, P prompts, S the dimensions of a latent.

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from ngrpo_train.draws import stream
from ngrpo_train.models import coarse, frozen
from ngrpo_train.models.blocks_of import adapted_layers
from ngrpo_train.models.directory import is_driven
from ngrpo_train.models.feature_cache import FeatureCache
from ngrpo_train.models.float8 import Float8Copy
from ngrpo_train.models.flux import Flux
from ngrpo_train.models.loading import quiet_diffusers
from ngrpo_train.models.pipeline import Pipeline
from ngrpo_train.parallel import blocks, sharding
from ngrpo_train.parallel.layout import base_storage, compiles
from ngrpo_train.parallel.sharding import trained_parts
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.named import import_named
from ngrpo_train.recipe.sections import Model, Parallel, Sampling


class Conditioning(Protocol):
    """Encoded prompts, a row for each, in the form that an adapter's `velocity` takes."""

    def rows(self, index: Tensor) -> Self:
        """The rows that `index` [N] (int64, on the device) asks for, repeats allowed."""
        ...

    @staticmethod
    def cat(parts: Sequence[Any]) -> Any:
        """The rows of all parts, joined."""
        ...


class Adapter(Protocol):
    """A family of models, as the trainer knows it; a recipe's `model.adapter` names its class.

    Beside these methods, the class is called as `Adapter(spec, sampling, settings, device, embeddings=directory)` with
    the recipe's [model], [sampling] and [parallel] and `prompts.embeddings` ("" for none). It then loads everything but
    the weights of the transformer. It raises ValueError, naming the field, its value and the remedy, for what it cannot
    load. It decides about modules that are not trained; `settings` says how it should place them.

    An adapter may also have the methods of `ngrpo_train.models.coarse.Coarsening`, for `algorithm.explore.scale`.

    An adapter of videos may have an attribute `frame_rate`, the frames per second in files; None, like no such
    attribute, stands for 16.
    """

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """S, the shape of the latent of one picture: (T, C) for packed tokens, with more dimensions for others."""
        ...

    @property
    def kind(self) -> Any:
        """The class of diffusers' pipelines that reads what `save` writes; None where there is none."""
        ...

    @property
    def lora_targets(self) -> str | list[str]:
        """Linear layers that `tuning = "lora"` adapts: a regular expression for their whole names, or ends of names."""
        ...

    @property
    def pictures(self) -> tuple[str, ...]:
        """Fields of a prompt's row that name the pictures that a model takes: () for a text alone, ("image",) to edit.

        The class of an adapter of the user's own has it, as prompts are looked at before anything is loaded: each row
        must name them all.
        """
        ...

    def empty_transformer(self) -> nn.Module:
        """The module that is trained, on the "meta" device; a new one at each call."""
        ...

    def blocks(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """The repeated blocks of the transformer, in the order of their calls, by names for tables.

        Each is sharded, recomputed and compiled by itself, and must draw no random numbers.
        """
        ...

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Give these weights of the transformer their first values: each process its own shards. A collective.

        They are all that `empty_transformer` has in its state dict, or some, by their names there, on the device.
        """
        ...

    def velocity(self, transformer: nn.Module, x_NS: Tensor, sigma_N: Tensor, conditioning: Any) -> Tensor:
        """v_theta [N, *S] by this transformer, at `x_NS` and `sigma_N` (both float32), in its arithmetic's dtype."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Encode P prompts, without gradients: texts and, for a model that takes them, the pictures of their rows."""
        ...

    def decode(self, latents_NS: Tensor) -> Tensor:
        """Pictures as every scorer sees them: uint8 [N, 3, H, W]; videos are [N, F, 3, H, W]."""
        ...

    def beside(self, spec: Model) -> Adapter:
        """An adapter of another model of this family, which shares this one's text encoders and decoder."""
        ...

    def save(self, directory: Path, transformer: nn.Module, trained: Mapping[str, Tensor]) -> None:
        """Write the `trained` weights by name (whole, on the CPU) for other programs; on one process only."""
        ...


def of_diffusers(spec: Model) -> Any:
    """The adapter of a model in diffusers' layout, by the class of its pipeline: FLUX.1 has its own."""
    return Pipeline if is_driven(spec.name_or_path) else Flux


def load_adapter(
    spec: Model, sampling: Sampling, settings: Parallel, device: torch.device, embeddings: str = ""
) -> Adapter:
    """The adapter that `model.adapter` names. Raises ValueError if it cannot be imported, or refuses the recipe."""
    if spec.adapter == "auto":
        return of_diffusers(spec)(spec, sampling, settings, device, embeddings=embeddings)
    make = import_named("model.adapter", spec.adapter, form='"auto" or "package.module:Name"')
    try:
        adapter: Adapter = make(spec, sampling, settings, device, embeddings=embeddings)
        return adapter
    except ValueError as error:  # by the protocol, about something that a user can mend
        raise ValueError(f"model.adapter = {spec.adapter!r}: {error}") from error


class FlowModel:
    """A model on one device whose transformer is trained, sharded over processes where there are several."""

    def __init__(
        self,
        spec: Model,
        sampling: Sampling,
        settings: Parallel,
        device: torch.device,
        *,
        embeddings: str = "",
        seed: int = 0,
    ) -> None:
        """Load the model. Raises ValueError, naming the field, if it, or `embeddings` of its prompts, cannot be loaded.

        `settings.attention` is a backend's name, or "auto" for diffusers' choice. `seed` draws LoRA's first weights.
        """
        self.spec, self.sampling, self.settings, self.device = spec, sampling, settings, device
        self.compute_dtype: torch.dtype = getattr(torch, settings.compute_dtype)
        self.compiled = compiles(settings, device.type)
        self.adapter = load_adapter(spec, sampling, settings, device, embeddings)
        self.transformer: Any = self._prepared_transformer(seed)
        self._float8 = self._float8_copy() if settings.rollout_dtype == "float8" else None
        self._cache = self._feature_cache() if settings.rollout_cache.kind != "none" else None
        self._coarser: dict[int, FlowModel] = {}

    def beside(self, spec: Model) -> FlowModel:
        """Another model's transformer, whole, with this one's encoders and decoder: two models in one memory."""
        other = copy.copy(self)
        other.spec = replace(spec, tuning="full", base_dtype="same")
        other.adapter = self.adapter.beside(other.spec)
        other.transformer = other._prepared_transformer(seed=0)
        other._float8 = other._cache = None
        other._coarser = {}
        return other

    def coarser(self, factor: int) -> FlowModel:
        """This model for pictures of 1 / factor of the height and width, with this one's weights; itself for 1.

        Raises ValueError, naming `algorithm.explore.scale`, where the adapter draws no such pictures.
        """
        if factor == 1:
            return self
        if factor not in self._coarser:
            other = copy.copy(self)
            other.adapter = coarse.coarsening(self.adapter, factor).coarser(factor)
            other.sampling = coarse.smaller(self.sampling, factor)
            self._coarser[factor] = other
        return self._coarser[factor]

    def averaged(self, noise_NS: Tensor, factor: int) -> Tensor:
        """The noise for `coarser(factor)` that stands for the same pictures."""
        return noise_NS if factor == 1 else coarse.coarsening(self.adapter, factor).averaged(noise_NS, factor)

    # -- Placed --------------------------------------------------------------------------------------------------------

    def _prepared_transformer(self, seed: int) -> nn.Module:
        """The transformer, on the meta device up to its sharding, then filled shard by shard."""
        transformer, settings = self.adapter.empty_transformer(), self.settings
        repeated = list(self.adapter.blocks(transformer).values())
        if self.spec.tuning == "lora":
            _store_as(transformer.requires_grad_(False), self.compute_dtype)
            targets = list(self.spec.lora_targets) or self.adapter.lora_targets
            for part in trained_parts(transformer):
                _add_adapters(part, self.spec, targets)
            if storage := base_storage(self.spec, settings):
                frozen.keep_in(storage, repeated)
        else:
            _store_as(transformer.requires_grad_(True), getattr(torch, settings.master_dtype))
        transformer.train()  # diffusers returns models in evaluation mode
        self._set_attention(transformer)
        blocks.prepare(repeated, self.spec, settings, self.device)
        for part in trained_parts(transformer):
            inside = {id(module) for module in part.modules()}
            own = [block for block in repeated if id(block) in inside]
            sharding.shard(part, own, self.spec, settings, self.device)
        _allocate(transformer, torch.device("cpu") if settings.offload else self.device, self.device)
        weights = transformer.state_dict(keep_vars=True)  # without buffers that are computed
        adapters = {name: weights.pop(name) for name in list(weights) if ".lora_" in name}
        self._fill(weights)
        frozen.fill(transformer, repeated, self.device, self._fill)
        for name, parameter in adapters.items():
            _draw_adapter(name, parameter, seed)
        return transformer

    def _fill(self, weights: Mapping[str, Tensor]) -> None:
        """Give weights of the base their values, whether or not peft has put them below its adapters."""
        self.adapter.fill({name.replace(".base_layer.", "."): weight for name, weight in weights.items()})

    def _float8_copy(self) -> Float8Copy:
        empty = self.adapter.empty_transformer()
        self._set_attention(empty)
        repeated = list(self.adapter.blocks(empty).values())
        blocks.prepare(repeated, replace(self.spec, gradient_checkpointing="none"), self.settings, self.device)
        # What LoRA would adapt are products over tokens. A layer that has one row for each picture, such as a
        # modulation, would gain no time from float8, and lose digits.
        products = {
            part.get_submodule(name)
            for part in trained_parts(empty)
            for name in adapted_layers(part, self.adapter.lora_targets)
        }
        inside = {module for block in repeated for module in block.modules()}
        return Float8Copy(self.transformer, empty, products & inside, self.compute_dtype, self.device)

    def _feature_cache(self) -> FeatureCache:
        exploring = self.transformers[-1]
        blocks = list(self.adapter.blocks(exploring).values())
        inside = {part: set(part.modules()) for part in trained_parts(exploring)}
        own = {part: [block for block in blocks if block in modules] for part, modules in inside.items()}
        return FeatureCache(self.settings.rollout_cache, own)

    def _set_attention(self, transformer: nn.Module) -> None:
        name, parts = self.settings.attention, list[Any](trained_parts(transformer))
        for part in parts:
            if hasattr(part, "set_attention_backend"):
                if name != "auto":
                    with quiet_diffusers():
                        part.set_attention_backend(name)
            elif name not in ("auto", "native"):
                raise ValueError(
                    f"parallel.attention = {name!r} is for models of diffusers, and model.adapter = "
                    f'{self.spec.adapter!r} brings one with its own attention: it must be "auto" or "native"'
                )

    @property
    def transformers(self) -> list[Any]:
        """The transformers that compute: the trained one and, if rollouts have one, its float8 copy."""
        return [self.transformer, *([self._float8.model] if self._float8 else [])]

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

    # -- Asked ---------------------------------------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """S, the shape of the latent of one picture: (T, C) for packed tokens, with more dimensions for others."""
        return self.adapter.latent_shape

    @property
    def pictures(self) -> tuple[str, ...]:
        """Fields of a prompt's row that name the pictures that the model takes; () for a text alone."""
        return self.adapter.pictures

    @property
    def frame_rate(self) -> float:
        """Frames per second of the model's videos."""
        return float(getattr(self.adapter, "frame_rate", None) or 16)

    def encode(self, prompts: Sequence[Prompt | str]) -> Conditioning:
        """Encode P prompts, or texts without rows; a collective where text encoders are sharded."""
        return self.adapter.encode([Prompt(each) if isinstance(each, str) else each for each in prompts])

    def velocity(self, x_NS: Tensor, sigma_N: Tensor, conditioning: Conditioning) -> Tensor:
        """v_theta [N, *S] at `x_NS` (float32) and `sigma_N`, in the compute dtype. `conditioning` has N rows.

        Rollout and update both call this: the model rounds its timestep, and the ratio is only right if both round
        alike.
        """
        return self.adapter.velocity(self.transformer, x_NS, sigma_N, conditioning)

    @torch.no_grad()
    def sampling_velocity(
        self, x_NS: Tensor, sigma_N: Tensor, conditioning: Conditioning, *, explore: bool = False, batch: int = 0
    ) -> Tensor:
        """`velocity` without gradients, `batch` pictures at a time, or `rollout_batch`.

        To `explore`, it is computed by the rollout's means: in its dtype, with its cache.
        """
        transformer = self._float8.model if explore and self._float8 else self.transformer
        cache, chunks = self._cache if explore else None, itertools.count()

        def run(rows: Tensor | None) -> Tensor:
            with cache.rows(f"chunk {next(chunks)}") if cache else nullcontext():
                if rows is None:
                    return self.adapter.velocity(transformer, x_NS, sigma_N, conditioning)
                return self.adapter.velocity(transformer, x_NS[rows], sigma_N[rows], conditioning.rows(rows))

        return self._in_chunks(run, x_NS, batch or self.settings.rollout_batch)

    @torch.no_grad()
    def decode(self, latents_NS: Tensor) -> Tensor:
        """Pictures as scorers see them: uint8 [N, 3, H, W], or videos [N, F, 3, H, W]; `decode_batch` at a time."""

        def run(rows: Tensor | None) -> Tensor:
            return self.adapter.decode(latents_NS if rows is None else latents_NS[rows])

        return self._in_chunks(run, latents_NS, self.settings.decode_batch)

    def _in_chunks(self, run: Callable[[Tensor | None], Tensor], x: Tensor, batch: int) -> Tensor:
        """Call `run` with the row numbers of `x`, `batch` at a time (0: all), and join the results.

        Where all rows go together, it gets None, so that nothing is picked and copied.

        If blocks are compiled, every chunk is filled up to `batch` with rows whose results are dropped, because another
        size would be compiled anew.
        """
        count = len(x)
        batch = batch or count
        if batch == count or (batch > count and not self.compiled):
            return run(None)
        results = []
        for start in range(0, count, batch):
            stop = start + batch if self.compiled else min(start + batch, count)
            rows = torch.arange(start, stop, device=x.device) % count
            results.append(run(rows)[: count - start])
        return torch.cat(results)

    # -- For a while ---------------------------------------------------------------------------------------------------

    @contextmanager
    def exploring(self, *, changed: bool = True) -> Iterator[None]:
        """Hold the weights ready for a rollout, during which they do not change; a collective.

        `changed` says whether they have since the last rollout.
        """
        if self._float8 and changed:
            self._float8.refresh()
        with self.gathered("rollout"), self._cache.acting() if self._cache else nullcontext():
            yield

    def forwards(self) -> tuple[int, int] | None:
        """Forwards of rollouts since the last call that went through all blocks, and all; None where all do."""
        return self._cache.forwards() if self._cache else None

    def begin_rollout(self) -> None:
        """Forget the features that the last rollout kept for the next solver step, where they are kept."""
        if self._cache:
            self._cache.begin()

    @contextmanager
    def gathered(self, phase: Literal["rollout", "iteration"]) -> Iterator[None]:
        """Keep sharded weights gathered after their first use, within the phase that `parallel.keep_gathered` names.

        Code that changes the weights within the block calls `sharding.release`.
        """
        if phase != self.settings.keep_gathered:
            yield
            return
        sharding.keep_gathered(self.transformer, True)
        try:
            yield
        finally:
            sharding.keep_gathered(self.transformer, False)

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """Switch LoRA's adapters off within the block, which leaves the model before training."""
        _switch_adapters(self.transformer, on=False)
        try:
            yield
        finally:
            _switch_adapters(self.transformer, on=True)


def _store_as(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights. Buffers stay as they are: rotary embeddings would lose too much."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _allocate(module: nn.Module, home: torch.device, device: torch.device) -> None:
    """Give weights on the meta device memory at `home`, without values; buffers keep theirs and go to `device`."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.to_empty(device=home)
    for name, buffer in buffers.items():
        place, _, own = name.rpartition(".")
        if buffer.device.type != "meta":
            module.get_submodule(place)._buffers[own] = buffer.to(device)


# -- Adapted -----------------------------------------------------------------------------------------------------------


def _add_adapters(transformer: nn.Module, spec: Model, targets: str | list[str]) -> None:
    """Put LoRA's adapters, float32 and trainable, into a frozen transformer."""
    from diffusers.loaders import PeftAdapterMixin
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=spec.lora_rank, lora_alpha=spec.lora_alpha, init_lora_weights=False, target_modules=targets)
    if isinstance(transformer, PeftAdapterMixin):  # this method also marks the model as adapted
        transformer.add_adapter(config)
    else:
        inject_adapter_in_model(config, transformer)
    for parameter in transformer.parameters():
        if parameter.requires_grad:  # peft made them in the base's dtype
            parameter.data = parameter.data.float()


def _switch_adapters(transformer: nn.Module, *, on: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled=on)


def _draw_adapter(name: str, adapter: Tensor, seed: int) -> None:
    """Draw as peft's "gaussian": A ~ N(0, 1/rank), B = 0; the same for every sharding."""
    values = torch.zeros(adapter.shape)
    if ".lora_A." in name:
        values.normal_(std=1 / adapter.shape[0], generator=stream(seed, 0, 0, name))
    sharding.assign(adapter, values)
