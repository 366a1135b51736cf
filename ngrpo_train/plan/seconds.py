"""Seconds of an iteration, part by part: operations and bytes that are counted, at the rates that `rates` assumes."""

# N trained weights, S processes that share a copy of them.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ngrpo_train.models.counts import parameters, weight_sizes
from ngrpo_train.models.sizes import Architecture
from ngrpo_train.parallel.layout import Layout
from ngrpo_train.plan import rates
from ngrpo_train.plan.elementwise import Pass, elementwise_bytes
from ngrpo_train.plan.flops import TransformerFlops, iteration_flops, transformer_flops
from ngrpo_train.plan.layout import Batches, Weights, bytes_of, coarsely, compiled, exactly, shape_of
from ngrpo_train.plan.links import Links
from ngrpo_train.plan.machines import Machine
from ngrpo_train.plan.rates import Rates
from ngrpo_train.plan.scorers import Scoring
from ngrpo_train.plan.trace import traced
from ngrpo_train.plan.traffic import Traffic, calls_of, iteration_traffic, update_passes
from ngrpo_train.recipe.sections import Recipe

LINKS, FLOAT8_COPY, MADE_WHOLE = "links", "float8 copy", "weights made whole"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an iteration."""

    stage: str
    """The stage of training's stopwatch that it belongs to: coarse, rollout, decode, reward or update."""
    name: str
    seconds: float
    """Estimated."""
    floor: float = 0.0
    """Seconds of its arithmetic at the full speed of large products, or at that of float8 or float32."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of one iteration."""

    compute: float
    """Arithmetic, at `matmul_tflops` or the rates of float8 and float32."""
    links: float
    """Transfers between processes, at full speed."""
    host: float
    """Transfers to and from host memory, at full speed, and the optimizer's steps there."""
    gathers: float
    """Gathers of weights at the assumed speed of links, hidden behind arithmetic or not."""
    reductions: float
    """Sums of gradients, likewise."""
    parts: tuple[Part, ...]

    @property
    def floor(self) -> float:
        """Arithmetic and transfers happen at the same time, so the longer of them counts."""
        return max(self.compute, self.links, self.host)

    @property
    def estimate(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def waiting(self) -> float:
        """Seconds of the estimate in which the device waits for links."""
        return sum(part.seconds for part in self.parts if part.name == LINKS)


def iteration_seconds(
    recipe: Recipe, architecture: Architecture, machine: Machine, layout: Layout, traffic: Traffic
) -> Seconds:
    """Seconds of the first iteration on each process. All that a recipe leaves open must be settled."""
    exact, coarse = _Iteration(exactly(recipe), architecture, machine, layout), coarsely(recipe)
    parts = [*exact.rollout(), *exact.looked_at(), *exact.update()]
    if coarse:
        parts = [*_of_coarse(_Iteration(coarse, architecture, machine, layout)), *parts]
    links, sent = Links.of(machine, layout), traffic.gathered_bytes + traffic.reduced_bytes
    return Seconds(
        compute=sum(part.floor for part in parts),
        links=sent / links.shared + traffic.all_reduced_bytes / links.copied,
        host=traffic.host_bytes / exact.host + (exact.step if recipe.parallel.offload else 0.0),
        gathers=traffic.gathers * exact.gather,
        reductions=traffic.reduces * exact.reduction + exact.batches.updates * exact.sum_over_copies,
        parts=tuple(part for part in parts if part.seconds),
    )


def _of_coarse(iteration: _Iteration) -> Iterator[Part]:
    """Coarse exploration: a rollout, its decoding and rewards. A float8 copy is made for both rollouts together."""
    once = (FLOAT8_COPY, MADE_WHOLE, LINKS) if iteration.recipe.parallel.rollout_dtype == "float8" else ()
    for part in (*iteration.rollout(), *iteration.looked_at()):
        if part.name not in once:
            yield replace(part, stage="coarse")


@dataclass(frozen=True, slots=True)
class _Pass:
    """Seconds of passes through the transformer."""

    products: float
    attention: float
    elementwise: float

    @property
    def all(self) -> float:
        return self.products + self.attention + self.elementwise


class _Iteration:
    """The parts of an iteration, and what they are made of."""

    def __init__(self, recipe: Recipe, architecture: Architecture, machine: Machine, layout: Layout) -> None:
        self.recipe, self.architecture, self.machine, self.layout = recipe, architecture, machine, layout
        self.flops, self.traffic = (
            iteration_flops(recipe, architecture),
            iteration_traffic(recipe, architecture, layout),
        )
        self.rates, self.links = Rates.of(machine), Links.of(machine, layout)
        self.peak, self.host = machine.matmul_tflops * 1e12, machine.host_gbps * 1e9
        self.batches, self.weights = Batches.of(recipe), Weights.of(recipe, architecture, layout)
        self.trace, self.compiled = traced(architecture, shape_of(recipe)), compiled(recipe)
        self.calls = calls_of(recipe, architecture)
        self.trained = transformer_flops(architecture, shape_of(recipe))
        self.base = replace(self.trained, adapters=0)
        self.states = self.flops.hardware_stages["forward"] / self.trained.forward

    def looked_at(self) -> Iterator[Part]:
        yield self._part("decode", "decode", self.flops.hardware_stages.get("decode", 0) / self.rates.decode)
        yield self._reward()

    def _part(self, stage: str, name: str, seconds: float) -> Part:
        """A part whose arithmetic is that of the stage of `Flops` with its name."""
        return Part(stage, name, seconds, self.flops.hardware_stages.get(name, 0) / self.peak)

    # -- Passes through the transformer --------------------------------------------------------------------------------

    def _forward(self, flops: TransformerFlops, pictures: float, of: Pass) -> _Pass:
        fast = flops.products if of == "float8 rollout" else 0
        products = fast / self.rates.float8 + (flops.forward - flops.attention - fast) / self.rates.products
        return _Pass(
            pictures * products, pictures * flops.attention / self.rates.attention, pictures * self._elementwise(of)
        )

    def _backward(self, states: float) -> _Pass:
        """Without what it computes again."""
        attention = 2 * self.trained.attention
        products = (self.trained.backward - attention) / self.rates.products
        again = 5 / 4  # flash attention keeps no scores: beside four products, its backward computes them again
        return _Pass(
            states * products,
            states * again * attention / self.rates.attention_backward,
            states * self._elementwise("backward", "none"),
        )

    def _recomputation(self, states: float) -> _Pass:
        """What `model.gradient_checkpointing` computes again: whole blocks, or elementwise parts alone."""
        flops, share = self.flops.hardware_stages.get("recomputation", 0), self.trained.attention / self.trained.blocks
        more = self._elementwise("backward") - self._elementwise("backward", "none")
        return _Pass(
            flops * (1 - share) / self.rates.products, flops * share / self.rates.attention, states * max(0.0, more)
        )

    def _elementwise(self, of: Pass, keep: str = "") -> float:
        """Seconds of one picture's elementwise traffic in all blocks."""
        kept = keep or self.recipe.model.gradient_checkpointing
        moved = (
            kind.layers * elementwise_bytes(kind, of, kept, compiled=self.compiled)  # type: ignore[arg-type]
            for kind in self.trace.kinds
        )
        return sum(moved) / self.rates.memory

    def _host(self, passes: float, device: float, forwards: int = 1) -> float:
        """Seconds for which the device waits for the host in passes that take it `device` seconds together."""
        block = rates.HOST_BLOCK if self.compiled else rates.HOST_EAGER_BLOCK
        return max(0.0, passes * forwards * block * sum(kind.layers for kind in self.trace.kinds) - device)

    # -- Stages --------------------------------------------------------------------------------------------------------

    def rollout(self) -> Iterator[Part]:
        float8 = self.recipe.parallel.rollout_dtype == "float8"
        flops = self.base if float8 else self.trained  # the float8 copy has adapters merged in
        pictures = self.flops.hardware_stages["rollout"] / flops.forward
        seconds = self._forward(flops, pictures, "float8 rollout" if float8 else "rollout")
        text = self.flops.hardware_stages.get("text", 0)
        yield self._part("rollout", "text", text / self.rates.products + self.traffic.text_bytes / self.host)
        fast = pictures * self.base.products * float8 * (1 - 1 / self.machine.float8_speedup)
        products = pictures * (flops.forward - flops.attention) - fast
        yield Part("rollout", "products", seconds.products, products / self.peak)
        yield Part("rollout", "attention", seconds.attention, pictures * flops.attention / self.peak)
        yield Part("rollout", "elementwise", seconds.elementwise)
        if float8:
            yield Part("rollout", FLOAT8_COPY, self._float8_copy())
        copied = self.traffic.copied_bytes * self._share_of_rollout() / self.rates.memory
        yield Part("rollout", MADE_WHOLE, copied)
        one_call = 0.0 if float8 else seconds.all / (self.batches.forwards * self.calls)  # a copy is made before them
        yield Part("rollout", LINKS, self._gathers(self.traffic.rollout_gathers, one_call))
        yield Part("rollout", "host", self._host(self.batches.forwards, seconds.all))

    def _reward(self) -> Part:
        scoring = Scoring.of(self.recipe)
        quick = (scoring.flops - scoring.float32_flops) / self.rates.products
        seconds = quick + scoring.float32_flops / self.rates.float32 + scoring.moved / self.host
        slow = scoring.float32_flops * (rates.FLOAT32_SLOWDOWN - 1)
        return Part("reward", "reward", seconds, (scoring.flops + slow) / self.peak)

    def update(self) -> Iterator[Part]:
        stages, batches = self.flops.hardware_stages, self.batches
        forward = self._forward(self.trained, self.states, "forward").all
        recomputation, backward = self._recomputation(self.states).all, self._backward(self.states).all
        old = self._forward(self.trained, stages.get("old policy", 0) / self.trained.forward, "rollout").all
        reference = self._forward(self.base, stages.get("reference", 0) / self.base.forward, "rollout").all
        # What is retained is computed in the rollout.
        yield self._part("rollout" if batches.retained else "update", "forward", forward)
        yield self._part("update", "old policy", old)
        yield self._part("update", "reference", reference)
        yield self._part("update", "recomputation", recomputation)
        yield self._part("update", "backward", backward)
        yield Part("update", "gradients", self._gradients())
        yield Part("update", "optimizer", 0.0 if self.recipe.parallel.offload else self.step)
        copied = self.traffic.copied_bytes * (1 - self._share_of_rollout()) / self.rates.memory
        yield Part("update", MADE_WHOLE, copied)
        count = batches.updates * batches.count
        all_passes, back = old + reference + forward + recomputation + backward, recomputation + backward
        one_call = all_passes / (update_passes(self.recipe, batches) * self.calls)
        gathers = self._gathers(self.traffic.gathers - self.traffic.rollout_gathers, one_call)
        yield Part("update", LINKS, gathers + self._reductions(back / count))
        yield Part("update", "host", self._host(count, all_passes, 3))
        if self.recipe.parallel.offload:
            moved = self.traffic.host_bytes - self.traffic.text_bytes - Scoring.of(self.recipe).moved
            hidden = sum(part.seconds for part in self.rollout() if part.name != "text") + all_passes
            yield Part("update", "host memory", max(0.0, moved / (rates.LINKS * self.host) - hidden) + self.step)

    # -- Weights and gradients -----------------------------------------------------------------------------------------

    @cached_property
    def tensors(self) -> int:
        """Weights of the transformers, without adapters."""
        return sum(len(weight_sizes(self.architecture, part)) for part in self.architecture.transformers)

    @cached_property
    def step(self) -> float:
        """Seconds of the optimizer's steps: gradients, weights and states are read, and the latter two written."""
        shard, updates = self.weights.trained / self.layout.shares, self.batches.updates
        master = bytes_of(self.recipe.parallel.master_dtype) if self.recipe.model.tuning == "full" else 4
        if self.recipe.parallel.offload:
            return updates * 28 * shard * self.layout.per_node / rates.HOST_MEMORY
        if self.recipe.optimizer.name == "adamw":
            return updates * (3 * master + 4 * 4) * shard / self.rates.memory
        # Two states of a byte, and what their scales add. The host steps weight by weight.
        device = (3 * master + 5.1) * shard / self.rates.memory
        return updates * max(device, self.tensors * rates.HOST_CALL)

    def _float8_copy(self) -> float:
        """Seconds to make the copy that explores: each weight read, and written in fewer bits, by a call of its own."""
        counts = parameters(self.architecture)
        written = counts.token_matrices + 2 * (counts.transformer - counts.token_matrices)
        device = (2 * counts.transformer + written) / self.rates.memory
        return max(device, self.tensors * rates.HOST_CALL)

    def _gradients(self) -> float:
        """Seconds in which gradients are added to those of earlier batches, their norm is found, and they are clipped.

        FSDP casts to float32 what it reduces, and adds there.
        """
        whole, shard, count = self.weights.trained, self.weights.trained / self.layout.shares, self.batches.count
        settings = self.recipe.parallel
        master = bytes_of(settings.master_dtype) if self.recipe.model.tuning == "full" else 4
        clipped = 3 * master * shard  # read for the norm, then read and written
        added: float
        if self.layout.plain:
            added = 3 * master * whole * (count - 1)
        elif settings.reduce_gradients == "step":
            added = (6 + 10 * (count - 1) + 8) * whole  # cast, added to, and copied into the buffer of a reduction
        else:
            added = count * (6 * whole + 12 * shard)
        return self.batches.updates * (added + clipped) / self.rates.memory

    def _share_of_rollout(self) -> float:
        """The rollout's share of all passes for which weights are made whole."""
        if self.traffic.gathers:
            return self.traffic.rollout_gathers / self.traffic.gathers
        passes = self.batches.forwards + update_passes(self.recipe, self.batches)
        return self.batches.forwards / passes

    # -- Links ---------------------------------------------------------------------------------------------------------

    @property
    def collectives(self) -> int:
        """Collectives of a gather or a reduction: one for each block, and one for the rest."""
        return round(sum(kind.layers for kind in self.trace.kinds) / self.calls) + 1

    @cached_property
    def gather(self) -> float:
        """Seconds of one gather of all weights."""
        if self.layout.shares == 1 or not self.traffic.gathers:
            return 0.0
        each = self.traffic.gathered_bytes / self.traffic.gathers
        return each / (rates.LINKS * self.links.shared) + self.collectives * self.links.shared_delay

    @cached_property
    def reduction(self) -> float:
        """Seconds of one sum of all gradients among the processes that share the weights."""
        each = self.traffic.reduced_bytes / self.traffic.reduces
        return each / (rates.LINKS * self.links.shared) + self.collectives * self.links.shared_delay

    @cached_property
    def sum_over_copies(self) -> float:
        """Seconds of one sum over the copies of the weights: once for an optimizer step."""
        each = self.traffic.all_reduced_bytes / self.batches.updates
        return each / (rates.LINKS * self.links.copied) + self.collectives * self.links.copied_delay

    def _gathers(self, count: float, one_call: float) -> float:
        """Seconds for which gathers are waited for. Each happens during a pass, a block ahead: only its first shows."""
        return count * max(self.gather / self.collectives, self.gather - one_call)

    def _reductions(self, backward: float) -> float:
        """Seconds for which sums of gradients are waited for. Each happens during a backward, a block behind."""
        if self.recipe.parallel.keep_gathered != "iteration":
            backward = max(0.0, backward - self.gather)  # which the same links do meanwhile
        updates, last = self.batches.updates, self.reduction + self.sum_over_copies
        each, most = (max(sums / self.collectives, sums - backward) for sums in (self.reduction, last))
        return (self.traffic.reduces - updates) * each + updates * most
