"""Models, reward and recipes of the training benchmarks: random weights at full size, and a made-up reward."""

import os
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import import_module

import torch
from torch import Tensor

from ngrpo_train.experiments.grid import Variant, find_grid
from ngrpo_train.models.sizes import KNOWN, find_architecture
from ngrpo_train.plan.scorers import scorer_sizes
from ngrpo_train.recipe.algorithms import Algorithm, field_names
from ngrpo_train.recipe.parsing import as_flags, as_toml, overlay, resolve
from ngrpo_train.recipe.sections import Model, Optimizer, Parallel, Prompts, Recipe, Reward
from ngrpo_train.rewards import find_scorer, shipped
from ngrpo_train.shapes.pipeline import CLIP_LENGTH, clip_tokenizer, t5_tokenizer

RANDOM = {
    "black-forest-labs/FLUX.1-dev": "random:flux-dev",
    "black-forest-labs/FLUX.1-schnell": "random:flux-schnell",
}
TINY_MODEL = "random:flux-tiny"
MADE_UP_REWARD = {"made_up": Reward(path="benchmarks.train_recipes:score")}
_GOLDEN_RATIO = 0.6180339887498949


def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward: mean brightness, plus a number for each place in the batch.

    It stays on the device and costs almost nothing. The number is needed because random weights may draw all pictures
    alike, and flat rewards cause no update.
    """
    places = torch.arange(len(images), device=images.device, dtype=torch.float32)
    return images.float().mean((1, 2, 3)) / 255 + (places * _GOLDEN_RATIO).frac()


# -- Recipes -----------------------------------------------------------------------------------------------------------


def full_size() -> Recipe:
    """The iteration of the performance target: FLUX.1-dev, every weight trained, on one GPU of 141 GB.

    720 x 720 pixels, 8 steps, G = 12, B = 4, K = 4, one prompt. Weights are stored in bfloat16 and rounded
    stochastically: with float32 weights, gradients and Adam's two states, it would take 190 GB. There is room to keep
    the results of products and attention.
    """
    return Recipe(
        model=Model(name_or_path="random:flux-dev", gradient_checkpointing="selective"),
        prompts=Prompts(source="shapes:train"),
        optimizer=Optimizer(name="adamw_8bit"),
        parallel=Parallel(master_dtype="bfloat16", update_batch=4),
        rewards=MADE_UP_REWARD,
    )


def tiny(*, on_gpu: bool) -> Recipe:
    """A recipe with the structure of `full_size`, for a rehearsal; on a CPU nothing is compiled and all is float32."""
    register_tiny()
    full = full_size()
    recipe = replace(
        full,
        model=replace(full.model, name_or_path=TINY_MODEL, lora_rank=4, lora_alpha=4),
        sampling=replace(full.sampling, height=32, width=32, max_sequence_length=16, num_inference_steps=4),
        algorithm=replace(full.algorithm, num_generations=4, num_anchors=2, num_train_steps=2),
        parallel=replace(full.parallel, update_batch=2),
    )
    if on_gpu:
        return recipe
    return replace(
        recipe,
        optimizer=replace(recipe.optimizer, name="adamw"),
        parallel=Parallel(device="cpu", compute_dtype="float32", compile="off", update_batch=2),
    )


def table_3(base: Recipe) -> dict[str, tuple[Variant, Recipe]]:
    """The rows of the paper's Table 3, as in the experiment `cost`, with the model and the memory settings of `base`.

    All of them compute whole blocks again, without which 12 anchors together do not fit. With the tiny model, they have
    no more steps and candidates than `base` has.
    """
    base = replace(base, model=replace(base.model, gradient_checkpointing="full"))
    grid = find_grid("cost")
    common = {section: grid.recipe[section] for section in ("sampling", "algorithm") if section in grid.recipe}
    below = overlay(tomllib.loads(as_toml(base)), common)
    rows = {}
    for variant in grid.variants:
        recipe = resolve(overlay(below, variant.sections), name=grid.name)
        rows[variant.name] = variant, _at_most(recipe, base) if base.model.name_or_path == TINY_MODEL else recipe
    return rows


def _at_most(recipe: Recipe, base: Recipe) -> Recipe:
    algorithm, most = recipe.algorithm, base.algorithm
    limits = {
        "num_generations": most.num_generations,
        "num_anchors": most.num_anchors,
        "num_train_steps": most.num_train_steps,
        "window_size": most.num_train_steps,
    }
    own = {name: limit for name, limit in limits.items() if name in field_names(type(algorithm))}
    algorithm = replace(algorithm, **{name: min(getattr(algorithm, name), limit) for name, limit in own.items()})
    steps = base.sampling.num_inference_steps
    return replace(recipe, algorithm=algorithm, sampling=replace(recipe.sampling, num_inference_steps=steps))


def as_measured(recipe: Recipe, depth: str = "") -> tuple[Recipe, list[str]]:
    """A recipe that can be measured without downloads, and notes on what it replaces.

    Shipped scorers get loaders that make them with random weights, for as long as the process lives. `depth` is
    "DOUBLE,SINGLE", numbers of blocks. Raises ValueError where the model's weights are not random ones.
    """
    notes = []
    name = recipe.model.name_or_path
    if name in RANDOM:
        name = RANDOM[name]
        notes.append("random weights")
    if depth:
        name = with_depth(name, *_two_numbers(depth))
    prompts = recipe.prompts
    if not prompts.source:
        prompts = replace(prompts, source="shapes:train")
        notes.append("prompts of the shapes world")
    made_up = [name for name in scorer_sizes(recipe.rewards) if recipe.rewards[name].backend == "native"]
    if made_up:
        for reward in made_up:
            _load_random(recipe.rewards[reward].kind or reward)
        notes.append(f"random weights of the scorers {', '.join(made_up)}")
    rewards = {
        name: reward for name, reward in recipe.rewards.items() if name in made_up or _is_installed(name, reward)
    }
    notes += [f"without the reward {name}" for name in recipe.rewards if name not in rewards]
    if not replace(recipe, rewards=rewards).trained_rewards():
        rewards |= MADE_UP_REWARD
        notes.append("a made-up reward")
    recipe = replace(
        recipe,
        model=replace(recipe.model, name_or_path=name),
        prompts=prompts,
        rewards=rewards,
        log=replace(recipe.log, trackers=()),
    )
    return recipe, notes


def _load_random(name: str) -> None:
    """Give a shipped reward a loader that makes it with random weights."""
    from benchmarks import train_scorers  # it imports this module

    module = import_module(f"{shipped.__name__}.{name}")
    module.REWARD = replace(module.REWARD, load=train_scorers.load)


def _is_installed(name: str, reward: Reward) -> bool:
    """True where a reward loads without weights from the hub; to look for such weights would download them."""
    ours = shipped.of(name, reward)
    if ours and ours.hub_files and not (reward.remote or ":" in reward.path):
        return False
    try:
        find_scorer(name, reward, torch.device("cpu"))
    except ValueError:
        return False
    return True


def _two_numbers(depth: str) -> tuple[int, int]:
    parts = depth.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--depth = {depth!r} must be two numbers of blocks, DOUBLE,SINGLE")
    return int(parts[0]), int(parts[1])


def settings_of(recipe: Recipe) -> str:
    """The flags of a recipe's fields that decide what is computed and are not defaults; the allocator's settings."""
    name = recipe.algorithm.name
    default, ours = asdict(Recipe(algorithm=Algorithm.of(name))), asdict(recipe)
    if name != Recipe().algorithm.name:
        default["algorithm"] |= {"name": ""}  # always among the flags, for other defaults follow from it
    changed = {
        section: {name: value for name, value in ours[section].items() if value != default[section][name]}
        for section in ("model", "prompts", "sampling", "algorithm", "optimizer", "train", "parallel")
    }
    flags = [_dashed(flag) for flag in as_flags(changed)]
    allocator = os.environ.get("PYTORCH_ALLOC_CONF", "")
    return " ".join(flags + [f"PYTORCH_ALLOC_CONF={allocator}"] * bool(allocator))


def _dashed(flag: str) -> str:
    name, equals, value = flag.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else flag


# -- Sizes -------------------------------------------------------------------------------------------------------------


def with_depth(name_or_path: str, doubles: int, singles: int) -> str:
    """The name of the same random weights with another number of blocks. Raises ValueError for other weights."""
    if not name_or_path.startswith("random:"):
        raise ValueError(f"model.name_or_path = {name_or_path!r} has its own number of blocks: only random:... has any")
    name = f"{name_or_path}:{doubles}+{singles}"
    find_architecture(name)
    return name


def depth_of(name_or_path: str) -> tuple[int, int]:
    """Numbers of double and of single blocks."""
    config = find_architecture(name_or_path).transformer
    return config["num_layers"], config["num_single_layers"]


def register_tiny() -> None:
    """Register "random:flux-tiny": FLUX.1-dev's parts with 1 block each and the smallest width."""
    dev, dim = KNOWN["flux-dev"], 16
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    tiny = dev.changed(
        "transformer",
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=dim,
        pooled_projection_dim=dim,
        axes_dims_rope=(4, 6, 6),
    )
    tiny = tiny.changed("vae", block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4)
    tiny = tiny.changed(
        "text_encoder",
        vocab_size=len(clip),
        hidden_size=dim,
        intermediate_size=dim,
        projection_dim=dim,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    tiny = tiny.changed("text_encoder_2", vocab_size=len(t5), d_model=dim, d_kv=8, d_ff=dim, num_layers=1, num_heads=2)
    KNOWN.setdefault("flux-tiny", tiny)  # only once: results computed from an architecture are cached by its identity
