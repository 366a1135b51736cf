"""Everything a user can set, as one frozen `Recipe`. `checks` says what can run; `parsing` reads TOML and flags."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args


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
    """ODE solver of evaluations and of neighbor's rollouts; "ddim" is another name for Euler. The update, and rollouts
    of an SDE, always take Euler's steps."""
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


AlgorithmName = Literal["neighbor", "flow_grpo", "dance_grpo", "mix_grpo", "mix_grpo_flash", "branch_grpo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """How groups are explored and the policy is updated. Letters and equations are of arXiv 2511.16955.

    A field whose text begins with names of algorithms in brackets is theirs alone. What a recipe leaves open is as the
    algorithm that it names was published.
    """

    name: AlgorithmName = "neighbor"
    num_generations: int = 12
    """G: candidates per prompt."""
    num_anchors: int = 4
    """[neighbor] B: candidates per prompt that are trained; the other algorithms train all."""
    num_train_steps: int = 4
    """[neighbor, flow_grpo, dance_grpo] K: solver steps per prompt that are trained. 0 for the last two: all that are
    random, or int(0.6 (N - 1)) of N steps."""
    step_range: tuple[float, float] = (0.0, 0.875)
    """The part of the solver's steps that the trained ones are from, as fractions: (0, 0.5) is the noisy half."""
    sigma: float = 0.3
    """[neighbor] Strength of the perturbation of the initial noise (Eq. 7), in (0, 1]."""
    eta: float = 0.7
    """[all but neighbor] Strength of the SDE's noise: its level is eta for dance_grpo and branch_grpo, and
    eta sqrt(sigma / (1 - sigma)) for the others."""
    window_size: int = 4
    """[mix_grpo, mix_grpo_flash] Solver steps in the window: these are random and trained, all others are the ODE's."""
    window_every: int = 25
    """[mix_grpo, mix_grpo_flash] Iterations after which the window moves one step on, within step_range."""
    window_frozen: bool = False
    """[mix_grpo_flash] Leave the window where it begins: MixGRPO-Flash*."""
    compression: float = 0.4
    """[mix_grpo_flash] Steps after the window, as a share of those it would take without DPM-Solver++."""
    branch_steps: tuple[int, ...] = ()
    """[branch_grpo] Solver steps at which every branch splits in two, log2(G) of them; empty spaces them by 0.15 N."""
    branch_spread: float = 4.0
    """[branch_grpo] How far siblings stand apart: their noises correlate by 1 / (1 + branch_spread^2)."""
    width_pruning: Literal["none", "parent_top1", "extremes"] = "none"
    """[branch_grpo] Which leaves are trained after the last split: all, the better of each pair, or the best and the
    worst quarter of them."""
    depth_pruning: int = 0
    """[branch_grpo] Solver steps left out of training, at first the last ones; every `depth_pruning_every` iterations
    they move one step up, as far as the last split."""
    depth_pruning_every: int = 30
    """[branch_grpo] Iterations between two such moves."""
    old_policy: Literal["exact", "cached", "literal"] = "exact"
    """Where the old policy stands: by the forward that trains, by the rollout's velocity, or, for neighbor alone, at
    the rollout's state: Algorithm 1 as printed, and with a multistep solver a biased ratio."""
    updates_per_iteration: int = 1
    """Optimizer steps per iteration, each on a share of the trained candidates. Clip and KL act from the second on."""
    combine: Literal["standardized", "raw_sum"] = "standardized"
    """How several rewards become one: each standardised in its group, then weighted; or their scores weighted as they
    are, where one of wide spread outweighs the others."""
    p: float = 0.8
    """Order of the quasi-norm that advantages are divided by (Eq. 11), in (0, 2]; 2 is plain GRPO up to a constant."""
    min_reward_std: float = 0.0
    """A group whose rewards spread less than this is skipped (absolute, per reward)."""
    advantage_clip: float = 5.0
    """[all but neighbor] Advantages are clipped to +- this, in units of the group's standard deviation."""
    clip_range: float | tuple[float, float] = 1e-4
    """Clip of the ratio at 1 - eps, 1 + eps, or (low, high)."""
    temperature: float | Literal["dim", "neighborhood"] = 1.0
    """[neighbor] Divides the squared distances of the leaping policy (Eq. 8).
    A number, "dim" for the latent's dimension, or "neighborhood" for the group's mean squared distance."""
    kl_coef: float = 0.0
    """Weight of KL(pi_old || pi_theta) in the loss."""
    backend: Literal["auto", "triton", "cpp", "reference"] = "auto"
    """[neighbor] What computes the loss: Triton on a GPU, C++ on a CPU, or plain PyTorch anywhere."""
    shuffle_rewards: bool = False
    """A control experiment: deal each group's rewards to its candidates at random. The reward must not rise."""
    reference_coef: float = 0.0
    """Weight of a tether to the untrained model: |v_theta - v_base|^2 for neighbor, KL(pi_theta || pi_base) for the
    others, as Flow-GRPO has it. Needs tuning = "lora", where it costs no memory."""

    @staticmethod
    def of(name: str) -> Algorithm:
        """An algorithm as it was published, for FLUX where its authors have settings for it."""
        return Algorithm(**{"name": name, **_PUBLISHED.get(name, {})})

    @property
    def is_neighbor(self) -> bool:
        return self.name == "neighbor"


# Where a published algorithm differs from the defaults. eta, clip and updates per iteration are of the authors' scripts
# for FLUX: updates = candidates per process / gradient accumulation. Flow-GRPO has eta in its paper, for SD3.5.
_SDE: dict[str, Any] = {"p": 2.0, "step_range": (0.0, 1.0)}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "flow_grpo": _SDE | {"eta": 0.7, "num_train_steps": 0},
    "dance_grpo": _SDE | {"eta": 0.3, "num_train_steps": 0, "updates_per_iteration": 3},
    "mix_grpo": _SDE | {"eta": 0.7, "updates_per_iteration": 4},
    "mix_grpo_flash": _SDE | {"eta": 0.7, "updates_per_iteration": 4},
    "branch_grpo": _SDE | {"eta": 0.3, "num_generations": 16, "clip_range": 1e-3, "updates_per_iteration": 3},
}

_MIX = ("mix_grpo", "mix_grpo_flash")
# The fields that not every algorithm has.
_OWNERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("num_anchors", "sigma", "temperature", "backend"), ("neighbor",)),
    "num_train_steps": ("neighbor", "flow_grpo", "dance_grpo"),
    **dict.fromkeys(("eta", "advantage_clip"), tuple(_PUBLISHED)),
    **dict.fromkeys(("window_size", "window_every"), _MIX),
    **dict.fromkeys(("window_frozen", "compression"), ("mix_grpo_flash",)),
    **dict.fromkeys(
        ("branch_steps", "branch_spread", "width_pruning", "depth_pruning", "depth_pruning_every"), ("branch_grpo",)
    ),
}


def has_field(name: str, field_name: str) -> bool:
    """Whether the algorithm `name` reads this field of [algorithm]."""
    return name in _OWNERS.get(field_name, (name,))


def refuse_foreign(name: str, field_names: Iterable[str]) -> None:
    """Raise ValueError for an algorithm that there is not, and for a field that belongs to others than `name`."""
    if name not in get_args(AlgorithmName):
        near = difflib.get_close_matches(name, get_args(AlgorithmName), n=1)
        close = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"algorithm.name = {name!r} must be one of {', '.join(get_args(AlgorithmName))}{close}")
    for field_name in field_names:
        if not has_field(name, field_name):
            owners = _OWNERS[field_name]
            text = "every other one" if len(owners) == len(_PUBLISHED) else ", ".join(owners)
            raise ValueError(f"algorithm.{field_name} is a setting of {text}, not of algorithm.name = {name!r}")


def with_present_names(algorithm: Mapping[str, Any]) -> dict[str, Any]:
    """An [algorithm] section that an earlier version may have written, with the names that its fields have now."""
    earlier = {"shuffle_advantages": "shuffle_rewards"}
    return {earlier.get(key, key): value for key, value in algorithm.items()}


def carried_over(algorithm: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Of an [algorithm] section what still holds where another algorithm takes its place.

    Neither what the other does not have, nor what each has its own published value of. Which steps can be trained is
    the model's affair.
    """
    own = {field_name for values in _PUBLISHED.values() for field_name in values} - {"step_range"}
    return {key: value for key, value in algorithm.items() if has_field(name, key) and key not in own}


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

    @property
    def is_trained(self) -> bool:
        """Whether the policy is trained on it, and not merely scored by it."""
        return bool(self.weight) and not (self.log_only or self.watch_only)


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
    """Iterations: each explores a group for every prompt of the batch, then updates."""
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
    """States per forward in the update, anchors or transitions of an SDE; 0 takes all at once."""
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
        return tuple(name for name, reward in self.rewards.items() if reward.is_trained)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain nested dicts of TOML types."""
    return dataclasses.asdict(recipe)
