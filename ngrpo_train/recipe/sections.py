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


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model that is trained: any directory or hub id in FLUX.1's layout (dev, schnell, or your own)."""

    name_or_path: str = "black-forest-labs/FLUX.1-dev"
    """Directory, hub id, "shapes" for the pipeline that ships with ngrpo, or "random:flux-dev", "random:flux-schnell":
    random weights at that model's size, made on the device, for measuring without a download; "random:flux-dev:2+4" has
    2 double and 4 single blocks of it."""
    transformer: str = ""
    """Directory or hub id of a transformer alone, in diffusers' layout, in place of name_or_path's own: one that others
    trained, to evaluate or to train on."""
    adapter: str = "auto"
    """What says how the model is loaded, encodes, computes and decodes: "auto" for FLUX.1's layout, or
    "package.module:Name" for a class of your own, see `Adapter` in ngrpo_train/models/model.py. name_or_path is then
    whatever that class makes of it."""
    tuning: Literal["full", "lora"] = "full"
    """Train every weight of the transformer, or low-rank adapters (peft) on its attention and feed-forward layers."""
    lora_rank: Positive[int] = 128
    lora_alpha: Positive[int] = 128
    """The adapters' output is scaled by lora_alpha / lora_rank."""
    gradient_checkpointing: Literal["full", "selective", "none"] | float = "full"
    """What the backward pass computes again to save memory: whole blocks, all but their matrix products and attention,
    or nothing. A number between 0 and 1 is the share of activations that the compiler may keep: it then chooses."""
    ema: Annotated[float, _BELOW_ONE] = 0.0
    """Decay of an exponential moving average of the weights per iteration, used for evaluation and export; 0 is off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What the model is asked to draw."""

    source: str = ""
    """A file (txt, json, jsonl, csv, parquet) or "hub:ID", "hpdv2:train", "shapes:train"."""
    per_rank: Positive[int] = 1
    """P: prompts explored together on each process."""
    embeddings: str = ""
    """Directory of encoded prompts that `ngrpo embed` wrote: training then loads no text encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How pictures are generated, in rollouts and in evaluation."""

    solver: Literal["euler", "ddim", "dpmpp_2m"] = "dpmpp_2m"
    """ODE solver of evaluations and of neighbor's rollouts; "ddim" is another name for Euler. The update, and rollouts
    of an SDE, always take Euler's steps."""
    num_inference_steps: Positive[int] = 8
    """Solver steps per picture."""
    shift: Positive[float] = 3.0
    """Timestep shift s of the schedule s*t / (1 + (s-1)*t)."""
    guidance_scale: NotNegative[float] = 3.5
    """Ignored by models without a guidance embedding (schnell)."""
    height: Positive[int] = 720
    """Pixels, a multiple of what one image token covers (16 for FLUX.1's VAE); width likewise."""
    width: Positive[int] = 720
    max_sequence_length: Positive[int] = 512
    """T5 tokens per prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """One scorer of pictures."""

    weight: Finite[float] = 1.0
    """Weight of its group-standardised advantage, or of the score itself where algorithm.combine = "raw_sum"."""
    path: str = ""
    """Weights of a scorer that ships with ngrpo: hub id, directory or file; empty for the official ones. Of a judge,
    its model's name. "package.module:callable" for a scorer of your own."""
    log_only: bool = False
    """Report it, do not train on it: an out-of-domain watch."""
    watch_only: bool = False
    """Score only the pictures of evaluations, not those of every iteration, and do not train on it: a slow watch."""
    remote: str = ""
    """Where it is computed, if not here: "http://host:port" of `ngrpo reward-server`, or of a judge's server."""
    backend: Literal["native", "hpsv2", "image-reward"] = "native"
    """Our implementation, or the official package of that name as a reference."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the scorer's weights and arithmetic; the score itself is always formed in float32."""
    batch: Positive[int] = 32
    """Pictures scored at once, or asked about at once where a judge answers."""
    offload: bool = False
    """Keep the scorer's weights in host memory between uses."""
    processor: str = ""
    """Hub id or directory of the scorer's tokenizer; empty for the one it was trained with."""
    template: str = ""
    """What a judge is asked: a packaged template's name or a TOML file; empty for its own."""

    @property
    def is_callable(self) -> bool:
        """Whether `path` is "package.module:callable", which is neither a hub id nor a likely file."""
        return bool(re.fullmatch(r"[\w.]*:\w*", self.path))

    @property
    def is_trained(self) -> bool:
        """Whether the policy is trained on it, and not merely scored by it."""
        return bool(self.weight) and not (self.log_only or self.watch_only)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW with float32 states, or torchao's with states of 8 bits, which bfloat16 weights need."""
    learning_rate: Positive[float] = 1e-5
    betas: Annotated[tuple[float, float], _EACH_BELOW_ONE] = (0.9, 0.999)
    weight_decay: NotNegative[float] = 1e-4
    max_grad_norm: Positive[float] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    steps: Positive[int] = 300
    """Iterations: each explores a group for every prompt of the batch, then updates."""
    seed: Annotated[NotNegative[int], _SEED] = 0
    gradient_accumulation_steps: Positive[int] = 1
    """Batches of prompts.per_rank prompts explored per process before an update.
    One GPU with 32 here sees as many prompts per update as the paper's 32 GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sharding: Literal["auto", "full", "hybrid", "none"] = "auto"
    """FSDP2 over all processes ("full"), over groups of `shard_size` that each hold a whole copy ("hybrid"), or a whole
    copy in every process ("none"); "auto" is "none" for one process and "full" for several."""
    shard_size: NotNegative[int] = 0
    """Processes that share one copy of the weights where sharding = "hybrid"; 0 takes those of a node."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Forward and backward arithmetic."""
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    """The trained weights between steps. bfloat16 halves them and their gradients; updates are rounded stochastically,
    for at usual learning rates most of them are smaller than half of bfloat16's last digit."""
    offload: bool = False
    """Keep trained weights, gradients and optimizer states in host memory, and make the optimizer's step there."""
    keep_gathered: Literal["auto", "never", "rollout", "iteration"] = "auto"
    """Gather sharded weights once for a rollout, or for a rollout and an update, and not for every forward; "auto" does
    what memory allows."""
    reduce_gradients: Literal["auto", "step", "batch"] = "auto"
    """Sum gradients over processes once per optimizer step, or after every forward-backward, which needs no memory for
    whole gradients; "auto" does what memory allows."""
    rollout_dtype: Literal["same", "float8"] = "same"
    """Matrix products of the rollout: as in training, or on a float8 copy of the weights (torchao), which the policy
    ratio never sees."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for each of the model's blocks; "auto" does on a GPU."""
    compile_cache: str = ""
    """Directory for compiled code that later runs find again; empty is PyTorch's own, which may be temporary."""
    attention: str = "auto"
    """Attention backend by diffusers' name: native, _native_cudnn, flash, _flash_3, xformers, ... (`ngrpo doctor` lists
    those that work here). "auto" measures at the start; the run's recipe has the fastest, which resuming keeps."""
    text_encoders: Literal["device", "offload", "shard"] = "device"
    """Where T5 and CLIP wait between iterations: on the device, in host memory, or sharded over processes."""
    rollout_batch: NotNegative[int] = 0
    """Pictures per forward in the rollout; 0 takes as many as memory allows."""
    update_batch: NotNegative[int] = 0
    """States per forward in the update, anchors or transitions of an SDE; 0 takes all at once."""
    decode_batch: NotNegative[int] = 0
    """Pictures per VAE decode; 0 takes as many as memory allows."""
    timeout_minutes: Positive[float] = 30.0
    """A collective that waits longer ends the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    every: Positive[int] = 50
    """Iterations between checkpoints; the last iteration always writes one."""
    keep: Positive[int] = 2
    """Checkpoints kept, the best by validation aside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Fixed prompts and noise, drawn alike at every evaluation."""

    validation: str = ""
    """Prompt source of the in-loop evaluation and of the watch for reward hacking; empty turns both off."""
    every: Positive[int] = 50
    """Iterations between evaluations."""
    test: str = ""
    """Prompt source of the before/after table; empty leaves the table out."""
    num_images_per_prompt: Positive[int] = 1
    """Two or more let the watch measure diversity, and how many groups are flat."""
    batch: NotNegative[int] = 0
    """Pictures generated at once; 0 takes 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    output_dir: str = ""
    """Directory of the run; empty is "runs/RECIPE"."""
    images_every: Positive[int] = 50
    """Iterations between sample grids."""
    num_images: Positive[int] = 8
    """Pictures of fixed prompts and noise in a grid."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    project: str = "ngrpo"
    export: bool = True
    """Write the trained pipeline in diffusers' layout at the end of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training run, complete."""

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

    def workload(self, iteration: int = 0) -> Workload:
        """What one prompt asks of the transformer and of memory in that iteration."""
        return self.algorithm.workload(self.sampling.num_inference_steps, iteration)

    def trained_rewards(self) -> tuple[str, ...]:
        return tuple(name for name, reward in self.rewards.items() if reward.is_trained)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain nested dicts of TOML types."""
    return dataclasses.asdict(recipe)
