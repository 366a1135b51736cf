"""Everything a user can set, as one frozen `Recipe`, and which values can run. `parsing` reads it from TOML, flags."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal


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
    tuning: Literal["full", "lora"] = "full"
    """Train every weight of the transformer, or low-rank adapters (peft) on its attention and feed-forward layers."""
    lora_rank: int = 128
    lora_alpha: int = 128
    """The adapters' output is scaled by lora_alpha / lora_rank."""
    gradient_checkpointing: Literal["full", "selective", "none"] | float = "full"
    """What the backward pass computes again to save memory: whole blocks, all but their matrix products and attention,
    or nothing. A number between 0 and 1 is the share of activations that the compiler may keep: it then chooses."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights per iteration, used for evaluation and export; 0 is off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What the model is asked to draw."""

    source: str = ""
    """A file (txt, json, jsonl, csv, parquet) or "hub:ID", "hpdv2:train", "shapes:train"."""
    per_rank: int = 1
    """P: prompts explored together on each process."""
    embeddings: str = ""
    """Directory of encoded prompts that `ngrpo embed` wrote: training then loads no text encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How pictures are generated, in rollouts and in evaluation."""

    solver: Literal["euler", "ddim", "dpmpp_2m"] = "dpmpp_2m"
    """ODE solver of the rollout; "ddim" is another name for Euler. The update always takes one Euler step."""
    num_inference_steps: int = 8
    """Solver steps per picture."""
    shift: float = 3.0
    """Timestep shift s of the schedule s*t / (1 + (s-1)*t)."""
    guidance_scale: float = 3.5
    """Ignored by models without a guidance embedding (schnell)."""
    height: int = 720
    """Pixels, a multiple of 16; width likewise."""
    width: int = 720
    max_sequence_length: int = 512
    """T5 tokens per prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """Neighbor GRPO. Letters and equations are the paper's (arXiv 2511.16955)."""

    name: Literal["neighbor"] = "neighbor"
    num_generations: int = 12
    """G: candidates per prompt."""
    num_anchors: int = 4
    """B: candidates per prompt that are trained."""
    num_train_steps: int = 4
    """K: solver steps per prompt that are trained."""
    step_range: tuple[float, float] = (0.0, 0.875)
    """The part of the solver's steps that the K are drawn from, as fractions: (0, 0.5) is the noisy half."""
    sigma: float = 0.3
    """Strength of the perturbation of the initial noise (Eq. 7), in (0, 1]."""
    old_policy: Literal["exact", "cached", "literal"] = "exact"
    """Where the old policy stands: its own Euler step, that step by the rollout's velocity, or the rollout's state.
    The last is Algorithm 1 as printed, and with a multistep solver a biased ratio."""
    updates_per_iteration: int = 1
    """Optimizer steps per iteration; divides num_anchors. Clip and KL act from the second step on."""
    combine: Literal["standardized", "raw_sum"] = "standardized"
    """How several rewards become one: each standardised in its group, then weighted; or their scores weighted as they
    are, where one of wide spread outweighs the others."""
    p: float = 0.8
    """Order of the quasi-norm that advantages are divided by (Eq. 11), in (0, 2]; 2 is plain GRPO up to a constant."""
    min_reward_std: float = 0.0
    """A group whose rewards spread less than this is skipped (absolute, per reward)."""
    clip_range: float | tuple[float, float] = 1e-4
    """Clip of the ratio at 1 - eps, 1 + eps, or (low, high)."""
    temperature: float | Literal["dim", "neighborhood"] = 1.0
    """Divides the squared distances of the leaping policy (Eq. 8).
    A number, "dim" for the latent's dimension, or "neighborhood" for the group's mean squared distance."""
    kl_coef: float = 0.0
    """Weight of KL(pi_old || pi_theta) in the loss."""
    backend: Literal["auto", "triton", "cpp", "reference"] = "auto"
    """What computes the loss: Triton on a GPU, C++ on a CPU, or plain PyTorch anywhere."""
    shuffle_advantages: bool = False
    """A control experiment: deal each group's advantages to its candidates at random. The reward must not rise."""
    reference_coef: float = 0.0
    """Weight of |v_theta - v_base|^2 against the untrained model; needs tuning = "lora", where it costs no memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """One scorer of pictures."""

    weight: float = 1.0
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
    batch: int = 32
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW with float32 states, or torchao's with states of 8 bits, which bfloat16 weights need."""
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    steps: int = 300
    """Iterations: each explores a neighborhood for every prompt of the batch, then updates."""
    seed: int = 0
    gradient_accumulation_steps: int = 1
    """Batches of prompts.per_rank prompts explored per process before an update.
    One GPU with 32 here sees as many prompts per update as the paper's 32 GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sharding: Literal["auto", "full", "hybrid", "none"] = "auto"
    """FSDP2 over all processes ("full"), over groups of `shard_size` that each hold a whole copy ("hybrid"), or a whole
    copy in every process ("none"); "auto" is "none" for one process and "full" for several."""
    shard_size: int = 0
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
    rollout_batch: int = 0
    """Pictures per forward in the rollout; 0 takes as many as memory allows."""
    update_batch: int = 0
    """Anchors per forward in the update; 0 takes all at once."""
    decode_batch: int = 0
    """Pictures per VAE decode; 0 takes as many as memory allows."""
    timeout_minutes: float = 30.0
    """A collective that waits longer ends the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    every: int = 50
    """Iterations between checkpoints; the last iteration always writes one."""
    keep: int = 2
    """Checkpoints kept, the best by validation aside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Fixed prompts and noise, drawn alike at every evaluation."""

    validation: str = ""
    """Prompt source of the in-loop evaluation and of the watch for reward hacking; empty turns both off."""
    every: int = 50
    """Iterations between evaluations."""
    test: str = ""
    """Prompt source of the before/after table; empty leaves the table out."""
    num_images_per_prompt: int = 1
    """Two or more let the watch measure diversity, and how many groups are flat."""
    batch: int = 0
    """Pictures generated at once; 0 takes 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    output_dir: str = ""
    """Directory of the run; empty is "runs/RECIPE"."""
    images_every: int = 50
    """Iterations between sample grids."""
    num_images: int = 8
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
    algorithm: Algorithm = field(default_factory=Algorithm)
    rewards: dict[str, Reward] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluation: Evaluation = field(default_factory=Evaluation)
    log: Log = field(default_factory=Log)

    def trained_rewards(self) -> tuple[str, ...]:
        return tuple(
            name
            for name, reward in self.rewards.items()
            if reward.weight and not (reward.log_only or reward.watch_only)
        )

    def trainable_steps(self) -> tuple[int, int]:
        """`algorithm.step_range` in solver steps: (first, last + 1)."""
        first, last = self.algorithm.step_range
        return round(first * self.sampling.num_inference_steps), round(last * self.sampling.num_inference_steps)


# Fields that may differ between a checkpoint and the run that resumes from it: none of them changes the numbers.
# Two of them may make up for another number of processes: the prompt cursor sees to it that they do.
_FREE_ON_RESUME = re.compile(
    r"train\.(steps|gradient_accumulation_steps)|prompts\.per_rank"
    r"|log\..*|checkpoint\..*|evaluation\..*"
    r"|rewards\.\w+\.(remote|offload)"
    r"|parallel\.(timeout_minutes|sharding|shard_size|offload|keep_gathered|reduce_gradients|compile_cache|text_encoders)"
)


_POSITIVE = [
    "model.lora_rank",
    "model.lora_alpha",
    "prompts.per_rank",
    "sampling.num_inference_steps",
    "sampling.shift",
    "sampling.max_sequence_length",
    "algorithm.num_anchors",
    "algorithm.num_train_steps",
    "algorithm.updates_per_iteration",
    "optimizer.learning_rate",
    "optimizer.max_grad_norm",
    "train.steps",
    "train.gradient_accumulation_steps",
    "parallel.timeout_minutes",
    "checkpoint.every",
    "checkpoint.keep",
    "evaluation.every",
    "evaluation.num_images_per_prompt",
    "log.images_every",
    "log.num_images",
]
_NOT_NEGATIVE = [
    "sampling.guidance_scale",
    "algorithm.min_reward_std",
    "algorithm.kl_coef",
    "algorithm.reference_coef",
    "optimizer.weight_decay",
    "train.seed",
    "parallel.shard_size",
    "parallel.rollout_batch",
    "parallel.update_batch",
    "parallel.decode_batch",
    "evaluation.batch",
]


def check(recipe: Recipe, world_size: int = 1) -> None:
    """Raise ValueError, naming the field and its value, for a recipe that cannot train."""
    check_sections(recipe, [section.name for section in dataclasses.fields(Recipe)])
    algorithm = recipe.algorithm
    _require(bool(recipe.prompts.source), "prompts.source", recipe.prompts.source, "must name the training prompts")
    _require(recipe.train.seed < 2**63, "train.seed", recipe.train.seed, "must be less than 2**63")
    _require(0 <= recipe.model.ema < 1, "model.ema", recipe.model.ema, "must be in [0, 1)")
    _require(0 < algorithm.sigma <= 1, "algorithm.sigma", algorithm.sigma, "must be in (0, 1]")
    _require(0 < algorithm.p <= 2, "algorithm.p", algorithm.p, "must be in (0, 2]")
    _require(
        algorithm.num_generations >= 2, "algorithm.num_generations", algorithm.num_generations, "must be 2 or more"
    )
    _require(
        algorithm.num_anchors <= algorithm.num_generations,
        "algorithm.num_anchors",
        algorithm.num_anchors,
        f"must not exceed algorithm.num_generations = {algorithm.num_generations}",
    )
    _require(
        algorithm.num_anchors % algorithm.updates_per_iteration == 0,
        "algorithm.updates_per_iteration",
        algorithm.updates_per_iteration,
        f"must divide algorithm.num_anchors = {algorithm.num_anchors}",
    )
    _require(
        0 <= algorithm.step_range[0] < algorithm.step_range[1] <= 1,
        "algorithm.step_range",
        algorithm.step_range,
        "must be two rising fractions within 0 and 1",
    )
    first, last = recipe.trainable_steps()
    _require(
        algorithm.num_train_steps <= last - first,
        "algorithm.num_train_steps",
        algorithm.num_train_steps,
        f"must not exceed the {last - first} steps inside algorithm.step_range = {algorithm.step_range} "
        f"of sampling.num_inference_steps = {recipe.sampling.num_inference_steps}",
    )
    clip = algorithm.clip_range if isinstance(algorithm.clip_range, tuple) else (algorithm.clip_range,) * 2
    _require(
        0 < clip[0] < 1 and 0 < clip[1] < math.inf,
        "algorithm.clip_range",
        algorithm.clip_range,
        "must be positive, and below 1 on the lower side",
    )
    temperature = algorithm.temperature
    _require(
        isinstance(temperature, str) or 0 < temperature < math.inf,
        "algorithm.temperature",
        temperature,
        "must be positive",
    )
    _require(
        algorithm.reference_coef == 0 or recipe.model.tuning == "lora",
        "algorithm.reference_coef",
        algorithm.reference_coef,
        'needs model.tuning = "lora", whose adapters can be switched off to give the base model',
    )
    betas = recipe.optimizer.betas
    _require(all(0 <= beta < 1 for beta in betas), "optimizer.betas", betas, "must be in [0, 1)")
    for name, reward in recipe.rewards.items():
        _require(math.isfinite(reward.weight), f"rewards.{name}.weight", reward.weight, "must be finite")
        _require(reward.batch > 0, f"rewards.{name}.batch", reward.batch, "must be positive")
    _require(
        bool(recipe.trained_rewards()), "rewards", list(recipe.rewards), "must have at least one reward to train on"
    )
    _check_parallel(recipe, world_size)
    for tracker in recipe.log.trackers:
        _require(
            find_spec(tracker) is not None,
            "log.trackers",
            recipe.log.trackers,
            f'needs a package that is not installed: pip install "ngrpo[{tracker}]"',
        )


def _check_parallel(recipe: Recipe, world_size: int) -> None:
    parallel, optimizer = recipe.parallel, recipe.optimizer.name
    size = parallel.shard_size
    _require(
        size == 0 or (parallel.sharding == "hybrid" and world_size % size == 0),
        "parallel.shard_size",
        size,
        f'needs parallel.sharding = "hybrid" and must divide the {world_size} processes',
    )
    _require(
        parallel.master_dtype == "float32" or (optimizer == "adamw_8bit" and parallel.compute_dtype == "bfloat16"),
        "parallel.master_dtype",
        parallel.master_dtype,
        'needs optimizer.name = "adamw_8bit", which rounds stochastically, and parallel.compute_dtype = "bfloat16"',
    )
    _require(
        parallel.master_dtype == "float32" or recipe.model.tuning == "full",
        "parallel.master_dtype",
        parallel.master_dtype,
        'needs model.tuning = "full": LoRA keeps the base in parallel.compute_dtype and its small adapters in float32',
    )
    _require(
        not parallel.offload or recipe.model.tuning == "full",
        "parallel.offload",
        parallel.offload,
        'needs model.tuning = "full": the adapters of LoRA are small, and its base is never updated',
    )
    _require(
        not parallel.offload or optimizer == "adamw",
        "parallel.offload",
        parallel.offload,
        'needs optimizer.name = "adamw": in host memory float32 states cost nothing, and 8-bit ones have no kernels',
    )
    _require(
        not parallel.offload or parallel.sharding != "none",
        "parallel.offload",
        parallel.offload,
        "works on shards: parallel.sharding must be full or hybrid, or auto",
    )
    _require(
        parallel.rollout_dtype == "same" or recipe.algorithm.old_policy != "cached",
        "parallel.rollout_dtype",
        parallel.rollout_dtype,
        'needs another algorithm.old_policy than "cached", which takes the rollout\'s velocity into the ratio',
    )
    keep = recipe.model.gradient_checkpointing
    _require(
        isinstance(keep, str) or (0 < keep < 1 and parallel.compile != "off"),
        "model.gradient_checkpointing",
        keep,
        'as a number must be between 0 and 1, and is a setting of the compiler: parallel.compile must not be "off"',
    )
    _require(
        "sage" not in parallel.attention,
        "parallel.attention",
        parallel.attention,
        "quantises attention: its gradient is not that of what it computes, so nothing can be trained through it",
    )


def check_sections(recipe: Recipe, sections: Sequence[str]) -> None:
    """Raise ValueError for a number out of range in one of these sections, which may be all that a command reads."""
    for name in [*_POSITIVE, *_NOT_NEGATIVE]:
        section, _, field_name = name.partition(".")
        if section in sections:
            value = getattr(getattr(recipe, section), field_name)
            if name in _POSITIVE:
                _require(0 < value < math.inf, name, value, "must be positive")
            else:
                _require(0 <= value < math.inf, name, value, "must be 0 or more")
    if "sampling" in sections:
        for name in ("height", "width"):
            pixels = getattr(recipe.sampling, name)
            _require(pixels > 0 and pixels % 16 == 0, f"sampling.{name}", pixels, "must be a positive multiple of 16")


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r} {rule}")


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain nested dicts of TOML types."""
    return dataclasses.asdict(recipe)


def refuse_changed(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError where a resumed run's recipe (from `as_dict`) differs in a field that changes the numbers."""
    for key in sorted({*saved, *current}):
        name, old, new = f"{prefix}{key}", saved.get(key), current.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            refuse_changed(old, new, f"{name}.")
        elif _plain(old) != _plain(new) and not _FREE_ON_RESUME.fullmatch(name):
            raise ValueError(f"{name} = {new!r} differs from the checkpoint's {old!r}; a resumed run must keep it")


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
