"""Everything a user can set, as one frozen `Recipe`. `checks` says what can run; `parsing` reads TOML and flags."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ngrpo_train.recipe.algorithms import Algorithm, Neighbor, Workload
from ngrpo_train.recipe.ranges import Finite, NotNegative, Positive, Range

_BELOW_ONE = Range("must be in [0, 1)", lambda value: 0 <= value < 1)
_EACH_BELOW_ONE = Range("must be in [0, 1)", lambda values: all(0 <= value < 1 for value in values))
_SEED = Range("must be less than 2**63", lambda value: value < 2**63)
_NAMED_OR_POSITIVE = Range(
    'must be "first", "middle", "last", "all" or a positive number', lambda value: isinstance(value, str) or value > 0
)

Frames = Literal["first", "middle", "last", "all"] | int
"""Frames of a video, by name or by their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model that is trained: a flow pipeline of diffusers, from a directory or the hub."""

    name_or_path: str = "black-forest-labs/FLUX.1-dev"
    """Directory or hub id of the model, or "shapes", "spelling" or "motion" for those that ship with ngrpo.
    "random:flux-dev" and "random:flux-schnell" have random weights at that model's size, made on the device.
    They are for measurements without a download; "random:flux-dev:2+4" has 2 double and 4 single blocks."""
    transformer: str = ""
    """Directory or hub id of another transformer in diffusers' layout, in place of the model's own.
    It may be one that others trained, to evaluate it or to train on."""
    adapter: str = "auto"
    """Class that loads the model, encodes, computes and decodes: "auto" for diffusers', or "package.module:Name".
    A class of your own is an `Adapter` (ngrpo_train/models/model.py), and decides what name_or_path means."""
    tuning: Literal["full", "lora"] = "full"
    """Train every weight of the transformer, or low-rank adapters (peft) on its attention and feed-forward layers."""
    lora_rank: Positive[int] = 128
    """Rank of the low-rank adapters."""
    lora_alpha: Positive[int] = 128
    """The output of the low-rank adapters is scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ()
    """Layers that get low-rank adapters, by the ends of their names (to_q, ff.net.2, ...).
    Empty: every linear layer inside the transformer's repeated blocks."""
    base_dtype: Literal["same", "bfloat16", "float8", "nf4"] = "same"
    """Storage of the base that low-rank adapters leave frozen: "same" as parallel.compute_dtype, or smaller.
    Linear layers inside the repeated blocks are then kept in 16, 8 or 4 bits, and computed with as before.
    They are the same in rollout and update, so the policy ratio stays exact."""
    gradient_checkpointing: Literal["full", "selective", "none"] | float = "full"
    """Activations that the backward pass computes again, to save memory.
    "full": whole blocks. "selective": all but matrix products and attention. "none": nothing.
    A number between 0 and 1 is the share of activations that the compiler may keep: it then chooses which.
    Small ones lie between "full" and "selective"; from about 0.6 on, "selective" is as fast and keeps less."""
    ema: Annotated[float, _BELOW_ONE] = 0.0
    """Decay of an exponential moving average of the weights per iteration, used for evaluation and export; 0 is off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The prompts that the model is trained on."""

    source: str = ""
    """Prompts to train on: a file (txt, json, jsonl, csv, parquet), "hub:ID", "hpdv2:train", "shapes:train",
    "spelling:train" or "motion:train"."""
    per_rank: Positive[int] = 1
    """P: prompts that each process explores together."""
    embeddings: str = ""
    """Directory of encoded prompts that `ngrpo embed` wrote; training then loads no text encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Generation of pictures, in rollouts and in evaluation."""

    solver: Literal["euler", "ddim", "dpmpp_2m"] = "dpmpp_2m"
    """ODE solver of evaluations and of neighbor's rollouts; "ddim" is another name for Euler.
    The update, and rollouts of an SDE, always take Euler steps."""
    num_inference_steps: Positive[int] = 8
    """Solver steps per picture; evaluations may have their own number."""
    shift: Positive[float] = 3.0
    """Timestep shift s of the schedule s*t / (1 + (s-1)*t)."""
    guidance_scale: NotNegative[float] = 3.5
    """Guidance scale. A model with a guidance embedding takes it as an input; FLUX.1-schnell ignores it.
    Others, where it is above 1, are guided by a second forward, of the negative prompt."""
    negative_prompt: str = ""
    """Text that a second forward leads away from, for models that are guided so."""
    height: Positive[int] = 720
    """Height of a picture in pixels, a multiple of what one image token covers (16 for FLUX.1's VAE)."""
    width: Positive[int] = 720
    """Width of a picture in pixels, a multiple of the same number."""
    num_frames: Positive[int] = 1
    """Frames of a video, for models that draw videos; 1 is a picture."""
    max_sequence_length: Positive[int] = 512
    """Tokens per prompt, for pipelines that take such a number; a longer prompt is cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A scorer of pictures."""

    kind: str = ""
    """Name of the shipped reward that this one is, where the section has another name.
    So one recipe can have two rewards of a kind."""
    weight: Finite[float] = 1.0
    """Weight of the group-standardised advantage, or of the score itself where algorithm.combine = "raw_sum"."""
    path: str = ""
    """Weights of a scorer that ships with ngrpo: hub id, directory or file; empty for the official ones.
    For a judge it is the name of its model; for a scorer of your own, "package.module:callable"."""
    log_only: bool = False
    """Report the score in every iteration, but do not train on it: an out-of-domain watch."""
    watch_only: bool = False
    """Score only the pictures of evaluations, not those of every iteration, and do not train on it.
    This is a watch for a slow scorer."""
    remote: str = ""
    """Server that computes the reward, "http://host:port": `ngrpo reward-server`, or a judge's server.
    Empty: this machine computes it."""
    backend: Literal["native", "hpsv2", "image-reward"] = "native"
    """Implementation: ngrpo's own ("native"), or the official package of that name, as a reference."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the scorer's weights and arithmetic; the score itself is always formed in float32."""
    batch: Positive[int] = 32
    """Pictures scored at once, or, for a judge, asked about at once."""
    offload: bool = False
    """Keep the scorer's weights in host memory between uses."""
    processor: str = ""
    """Hub id or directory of the scorer's tokenizer; empty for the one it was trained with."""
    template: str = ""
    """Question that a judge is asked: a packaged template's name or a TOML file; empty for the judge's own."""
    frames: Annotated[Frames, _NAMED_OR_POSITIVE] = 4
    """Frames of a video that a scorer of pictures sees: "first", "middle", "last", "all", or how many.
    A number is spread evenly over the video. The video's score is the mean of its frames' scores."""

    @property
    def is_callable(self) -> bool:
        """True where `path` is "package.module:callable", which is neither a hub id nor a likely file."""
        return bool(re.fullmatch(r"[\w.]*:\w*", self.path))

    @property
    def is_trained(self) -> bool:
        """True where the policy is trained on this reward, and not merely scored by it."""
        return bool(self.weight) and not (self.log_only or self.watch_only)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """The optimizer of the trained weights."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """"adamw" has float32 states. "adamw_8bit" is torchao's, with states of 8 bits; bfloat16 weights need it."""
    learning_rate: Positive[float] = 1e-5
    """Learning rate, the same in every step."""
    betas: Annotated[tuple[float, float], _EACH_BELOW_ONE] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    weight_decay: NotNegative[float] = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: Positive[float] = 1.0
    """Gradients of a larger norm are scaled down to this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """Length and seed of the run."""

    steps: Positive[int] = 300
    """Iterations: each explores a group for every prompt of the batch, then updates."""
    seed: Annotated[NotNegative[int], _SEED] = 0
    """Seed of every random number in the run."""
    gradient_accumulation_steps: Positive[int] = 1
    """Batches of prompts.per_rank prompts that each process explores for an update.
    One GPU with 32 here sees as many prompts per update as the paper's 32 GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutCache:
    """diffusers' caches of features in the rollout: some forwards take over what earlier solver steps computed."""

    kind: Literal["none", "first_block", "taylor_seer"] = "none"
    """"first_block": where the first block changes little from the step before, the others' change is taken over.
    "taylor_seer": in some steps no block is computed, and the velocity is extrapolated from earlier steps.
    Candidates are then other ones; the update computes exactly, at the states that were reached.
    Evaluations and samples never use a cache."""
    threshold: NotNegative[float] = 0.05
    """Of first_block: relative change of the first block's output, as a mean over a batch, up to which it acts."""
    interval: Positive[int] = 2
    """Of taylor_seer: one of so many steps is computed."""
    full_steps: Positive[int] = 2
    """Of taylor_seer: first steps that are all computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Devices, processes, precision and memory."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the run; "auto" is a GPU where there is one."""
    sharding: Literal["auto", "full", "hybrid", "none"] = "auto"
    """"full": FSDP2 shards the weights over all processes. "none": every process holds a whole copy.
    "hybrid": FSDP2 shards the weights over groups of `shard_size` processes, and each group holds a whole copy.
    "auto": "none" for one process and "full" for several."""
    shard_size: NotNegative[int] = 0
    """Processes that share one copy of the weights where sharding = "hybrid"; 0 takes those of a node."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the arithmetic in forward and backward."""
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the trained weights between steps; bfloat16 halves them and their gradients.
    Updates of bfloat16 weights are rounded stochastically.
    At usual learning rates most updates are below half of bfloat16's last digit: plain rounding would lose them."""
    offload: bool = False
    """Keep trained weights, gradients and optimizer states in host memory, and take the optimizer's step there."""
    keep_gathered: Literal["auto", "never", "rollout", "iteration"] = "auto"
    """Gather sharded weights once for a rollout, or once for a rollout and an update ("iteration").
    "never" gathers them for every forward; "auto" does what memory allows."""
    reduce_gradients: Literal["auto", "step", "batch"] = "auto"
    """Sum gradients over processes once per optimizer step, or after every forward-backward ("batch").
    "batch" needs no memory for whole gradients; "auto" does what memory allows."""
    rollout_dtype: Literal["same", "float8"] = "same"
    """Arithmetic of the rollout's matrix products: as in training, or on a float8 copy of the weights (torchao).
    The policy ratio never sees the copy."""
    rollout_cache: RolloutCache = field(default_factory=RolloutCache)
    stream: Literal["auto", "on", "off"] = "auto"
    """Train on each batch of prompts.per_rank prompts as soon as it is scored, and explore the next one after that.
    "off" explores all prompts of the iteration first. The gradient is the same sum.
    "auto" streams where the algorithm and memory allow, and remote rewards are then awaited during the next rollout."""
    retain: Literal["auto", "on", "off"] = "auto"
    """Train neighbor's anchors through the forwards that explored them; the update makes none of its own.
    It needs one update per iteration and a rollout in the training's arithmetic, and keeps all anchors' activations.
    The gradient is the same. "auto" retains where memory allows."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile each of the model's blocks with torch.compile; "auto" does so on a GPU."""
    compile_cache: str = ""
    """Directory for compiled code that later runs find again; empty is PyTorch's own, which may be temporary."""
    attention: str = "auto"
    """Attention backend by diffusers' name: native, _native_cudnn, flash, xformers, ...
    `ngrpo doctor` lists those that work on this machine.
    "auto" measures them at the start; the run's recipe then names the fastest, and a resumed run keeps it."""
    text_encoders: Literal["device", "offload", "shard"] = "device"
    """Place of text encoders between iterations: the device, host memory, or sharded over processes."""
    rollout_batch: NotNegative[int] = 0
    """Pictures per forward in the rollout; 0 takes as many as memory allows."""
    update_batch: NotNegative[int] = 0
    """States per forward in the update: anchors, or transitions of an SDE; 0 takes all at once."""
    decode_batch: NotNegative[int] = 0
    """Pictures per VAE decode; 0 takes as many as memory allows."""
    decode_tiles: bool = False
    """Decode what is larger than one of the VAE's own tiles in overlapping tiles, one after the other.
    A tile is as large as the pictures that the VAE was made for: 1024 pixels a side for FLUX.1's."""
    timeout_minutes: Positive[float] = 30.0
    """The run ends when a collective has waited this long for another process."""

    @property
    def explores_exactly(self) -> bool:
        """True where the rollout computes velocities as the update does, but for the batch."""
        return self.rollout_dtype == "same" and self.rollout_cache.kind == "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Checkpoints of the run."""

    every: Positive[int] = 50
    """Iterations between checkpoints; the last iteration always writes one."""
    keep: Positive[int] = 2
    """Newest checkpoints that are kept; the best by validation is kept besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Evaluations before, during and after the run; prompts and noise are the same every time."""

    validation: str = ""
    """Source of the prompts for in-loop evaluations and the watch for reward hacking; empty turns both off."""
    every: Positive[int] = 50
    """Iterations between evaluations."""
    test: str = ""
    """Source of the prompts for the before/after table; empty leaves the table out."""
    num_images_per_prompt: Positive[int] = 1
    """Pictures, or videos, of each prompt.
    With two or more, the watch also measures diversity and the share of flat groups."""
    batch: NotNegative[int] = 0
    """Pictures, or videos, generated at once; 0 takes 64 pictures, or videos of 64 frames together."""
    num_inference_steps: NotNegative[int] = 0
    """Solver steps per picture, here and in sample pictures; 0 takes those of sampling.
    An SDE can be trained with fewer steps than a picture is made with: Flow-GRPO has 6 and 28 for FLUX.1-dev."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Output of the run: directory, sample pictures, trackers, export."""

    output_dir: str = ""
    """Directory of the run; empty is "runs/RECIPE"."""
    images_every: Positive[int] = 50
    """Iterations between grids of sample pictures."""
    num_images: Positive[int] = 8
    """Pictures, or videos, in a grid; their prompts and noise are the same every time."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Programs that get the metrics, besides the files of the run."""
    project: str = "ngrpo"
    """Name of the project in the trackers."""
    export: bool = True
    """Write the trained pipeline in diffusers' layout at the end of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All settings of a training run."""

    model: Model = field(default_factory=Model)
    prompts: Prompts = field(default_factory=Prompts)
    sampling: Sampling = field(default_factory=Sampling)
    algorithm: Algorithm = field(default_factory=Neighbor)
    rewards: dict[str, Reward] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluation: Evaluation = field(default_factory=Evaluation)
    log: Log = field(default_factory=Log)

    @property
    def streams(self) -> bool:
        """True where an iteration's batches of prompts are trained on one after the other, as they are scored."""
        several = self.train.gradient_accumulation_steps > 1
        needs = self.algorithm.needs_all_groups(self.sampling.num_inference_steps)
        return several and self.parallel.stream != "off" and not needs

    def cannot_retain(self) -> str:
        """Why an update cannot train through the forwards of its rollout, on any machine; empty if it can."""
        if self.parallel.rollout_dtype != "same":
            return f"parallel.rollout_dtype = {self.parallel.rollout_dtype!r} explores with another forward"
        if self.parallel.rollout_cache.kind != "none":
            return f"parallel.rollout_cache.kind = {self.parallel.rollout_cache.kind!r} explores with another forward"
        return self.algorithm.cannot_retain(self.sampling.num_inference_steps)

    def workload(self, iteration: int = 0) -> Workload:
        """The work and the memory that one prompt takes in that iteration."""
        return self.algorithm.workload(self.sampling.num_inference_steps, iteration)

    def evaluation_sampling(self) -> Sampling:
        """The sampling of pictures that are not explored: with the evaluation's own number of steps if it has one."""
        steps = self.evaluation.num_inference_steps or self.sampling.num_inference_steps
        return dataclasses.replace(self.sampling, num_inference_steps=steps)

    def evaluation_batch(self) -> int:
        """The number of pictures or videos that are generated at once where nothing is explored."""
        return self.evaluation.batch or max(1, 64 // self.sampling.num_frames)

    def trained_rewards(self) -> tuple[str, ...]:
        """Names of the rewards that the policy is trained on."""
        return tuple(name for name, reward in self.rewards.items() if reward.is_trained)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain nested dicts of TOML types."""
    return dataclasses.asdict(recipe)
