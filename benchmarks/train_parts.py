"""The cost of an iteration of FLUX.1-dev on one GPU, part by part:

    python -m benchmarks.train_parts PART [--only NAME ...] [--out rows.csv]

forward, attention, activations, optimizer, decode and rewards are single parts of an iteration. iteration, variants,
sharded and algorithms (the rows of the paper's Table 3) are whole iterations, built and made as in `train_step`; peer
is an iteration built like other trainers. profile writes where the time of one goes, and no rows. `--tiny` rehearses a
part on a CPU, or on a GPU in little time. `train_rows` explains the CSV; `benchmarks/gpu.sh` runs all parts.
"""

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest import mock

import torch
import tyro
from torch import Tensor

from benchmarks import train_forward, train_model, train_scorers, train_step
from benchmarks.peer_style import Draws, Peer
from benchmarks.train_recipes import depth_of, full_size, score, settings_of, table_3, tiny, with_depth
from benchmarks.train_rows import Case, Session, clock
from ngrpo_train.draws import draw_anchors, draw_train_steps
from ngrpo_train.models import flux
from ngrpo_train.models.encoders import TextFeatures
from ngrpo_train.models.inputs import inputs_of
from ngrpo_train.models.loading import fill
from ngrpo_train.models.sizes import Architecture, find_architecture, transformer_on, vae_on
from ngrpo_train.plan import iteration_flops
from ngrpo_train.plan.cost import Cost
from ngrpo_train.profiling.measure import profile
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.run.stopwatch import Stopwatch
from ngrpo_train.sampling.perturb import neighborhood
from ngrpo_train.update.optimizer import make_optimizer

WAYS: dict[str, tuple[int, dict[str, Any]]] = {  # by the case: prompts of an iteration, fields of [parallel]
    "full, 2 prompts, streamed": (2, {"stream": "on"}),
    "full, 2 prompts, all explored first": (2, {"stream": "off"}),
}
NSIGHT = (  # arguments of `ngrpo profile` for the iteration of the target
    "flux_1x141gb --model.name-or-path random:flux-dev --train.gradient-accumulation-steps 1 "
    "--prompts.source shapes:train --rewards benchmarks.train_recipes:score"
)
SHALLOW = (4, 8)  # double and single blocks, for cases that need no full depth, or do not fit at it


@dataclass(frozen=True, kw_only=True)
class Parts:
    part: tyro.conf.Positional[
        Literal[
            "forward",
            "attention",
            "activations",
            "optimizer",
            "decode",
            "rewards",
            "iteration",
            "algorithms",
            "variants",
            "sharded",
            "peer",
            "profile",
        ]
    ]
    out: Path | None = None
    """CSV that rows are appended to, as they are measured; by default, no file is written. A profile has a directory
    beside it, else build/."""
    only: tuple[str, ...] = ()
    """Cases to measure: those whose name contains one of these."""
    tiny: bool = False
    """Use a model of two small blocks and pictures of 32 pixels, whose times mean nothing."""
    brief: bool = False
    """Measure two iterations of each case, whose pictures are decoded by code that is not compiled, with the attention
    of torch."""
    hold: bool = False
    """Build and compile the first case, say so, and wait for a line on standard input before anything is timed."""


# -- Whole iterations --------------------------------------------------------------------------------------------------


def iteration(session: Session, recipe: Recipe) -> None:
    """Measure iterations with every weight trained: one optimizer step for each rollout, and one for each anchor."""
    anchors = recipe.algorithm.num_anchors
    _iterations(session, "iteration", "full, 1 update", recipe, iterations=3)
    several = replace(recipe, algorithm=replace(recipe.algorithm, updates_per_iteration=anchors))
    _iterations(session, "iteration", f"full, {anchors} updates", several)


def algorithms(session: Session, recipe: Recipe) -> None:
    """Measure each row of the paper's Table 3: one iteration after the one that compiles; some take over a minute."""
    for name, (_, of_row) in table_3(recipe).items():
        _iterations(session, "algorithms", name, of_row, iterations=1, runs=1)


def variants(session: Session, recipe: Recipe) -> None:
    """Measure the same iteration with whole blocks computed again, with a float8 rollout, with LoRA, of two prompts."""
    parallel = recipe.parallel
    again = replace(recipe, model=replace(recipe.model, gradient_checkpointing="full"))
    float8 = replace(recipe, parallel=replace(parallel, rollout_dtype="float8"))
    lora = replace(
        recipe,
        model=replace(recipe.model, tuning="lora"),
        optimizer=replace(recipe.optimizer, name="adamw", learning_rate=3e-4),
        parallel=replace(parallel, master_dtype="float32"),
    )
    _iterations(session, "variants", "full, blocks computed again", again)
    _iterations(session, "variants", "full, float8 rollout", float8, compiled=True)
    _iterations(session, "variants", f"LoRA, rank {lora.model.lora_rank}", lora)
    for name, (prompts, how) in WAYS.items():
        train = replace(recipe.train, gradient_accumulation_steps=prompts)
        _iterations(session, "variants", name, replace(recipe, train=train, parallel=replace(parallel, **how)))


def sharded(session: Session, recipe: Recipe) -> None:
    """Measure the cost of FSDP2 on a single process, in a few blocks."""
    whole = recipe.model.name_or_path
    depth = map(min, SHALLOW, depth_of(whole))
    recipe = replace(recipe, model=replace(recipe.model, name_or_path=with_depth(whole, *depth)))
    parallel = recipe.parallel
    _iterations(session, "sharded", "plain", recipe)
    for keep in ("iteration", "rollout", "never"):
        settings = replace(parallel, sharding="full", keep_gathered=keep)
        _iterations(session, "sharded", f"FSDP2, gathered: {keep}", replace(recipe, parallel=settings))
    in_float32 = replace(
        recipe,
        optimizer=replace(recipe.optimizer, name="adamw"),
        parallel=replace(parallel, sharding="full", master_dtype="float32"),
    )
    _iterations(session, "sharded", "FSDP2, float32 weights", in_float32)


def _iterations(
    session: Session,
    part: str,
    name: str,
    recipe: Recipe,
    *,
    iterations: int = 2,
    runs: int = 2,
    compiled: bool = False,
) -> None:
    """Measure runs of one trainer, one after the other; `compiled` is true for a recipe that needs a compiler."""
    if session.brief:
        iterations, runs = min(iterations, 2), 1
    if compiled and not session.compiles:
        session.case(part, name, train_model.skipping(train_model.NO_COMPILER))
        return
    session.case(part, name, lambda case: train_step.measure(case, recipe, iterations=iterations, warmup=1, runs=runs))


# -- As the peers do ---------------------------------------------------------------------------------------------------


def peer(session: Session, recipe: Recipe) -> None:
    """Measure the peers' way: float32 weights under autocast; and with bfloat16 weights, which favours the peers."""
    no_step = "without the optimizer's step: float32 weights, gradients and Adam's states take 16 bytes a parameter"
    session.case(
        "peer",
        "float32 weights under autocast",
        lambda case: _peer(case, recipe, torch.float32, with_optimizer=False, note=no_step),
    )
    session.case(
        "peer",
        "bfloat16 weights",
        lambda case: _peer(case, recipe, torch.bfloat16, with_optimizer=True),
    )


def _peer(case: Case, recipe: Recipe, dtype: torch.dtype, *, with_optimizer: bool, note: str = "") -> None:
    device, architecture = case.session.device, find_architecture(recipe.model.name_or_path)
    case.settings = f"{settings_of(recipe)} (as far as a peer has them: eager, one picture per forward)"
    watch, building = Stopwatch(device), clock(device)
    with TemporaryDirectory() as directory:
        peer = make_peer(recipe, architecture, device, dtype, Path(directory), watch, with_optimizer=with_optimizer)
        case.add("build", "s", building(), note=note)
        flops, peak = iteration_flops(recipe, architecture), train_model.peak_tflops(device)
        cost, measured = Cost(device, flops.model, flops.hardware, 1e12 * peak), list[dict[str, float]]()
        iterations = 1 if case.session.brief else 2
        for step, draws in zip(range(1 + iterations), _draws(recipe, architecture, device), strict=False):
            watch.restart()
            norm = peer.iterate(draws, recipe.optimizer.max_grad_norm)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            figures = watch.read() | {"grad_norm": norm}
            case.session.say(f"   iteration {step}: " + "  ".join(f"{k} {v:.3g}" for k, v in figures.items()))
            figures |= cost.figures(figures["time/iteration_s"])
            if step:  # the first one allocates
                measured.append(figures)
                train_step.record(case, [measured], 1, note, say=step == iterations)


def make_peer(
    recipe: Recipe,
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    directory: Path,
    watch: Stopwatch,
    *,
    with_optimizer: bool,
) -> Peer:
    """A peer with random weights of `dtype`, equal to ours up to rounding, and made-up features of a prompt."""
    transformer: Any = transformer_on(architecture, dtype=dtype).to_empty(device=device)
    weights = dict(transformer.named_parameters())
    fill(weights, weights.keys(), recipe.model, None)
    transformer.train()
    transformer.enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(0)

    def made_up(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    length, config = recipe.sampling.max_sequence_length, architecture.transformer
    conditioning = TextFeatures(
        made_up(1, length, config["joint_attention_dim"]),
        made_up(1, config["pooled_projection_dim"]),
        torch.zeros(length, 3, device=device),
    )
    frozen = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Peer(
        transformer=transformer,
        vae=vae_on(architecture, str(device), frozen).requires_grad_(False),
        sampling=recipe.sampling,
        algorithm=recipe.algorithm,
        conditioning=conditioning,
        prompt="",
        scorer=score,
        directory=directory,
        stage=watch,
        autocast=dtype == torch.float32,
        optimizer=make_optimizer(list(transformer.parameters()), recipe.optimizer) if with_optimizer else None,
    )


def _draws(recipe: Recipe, architecture: Architecture, device: torch.device) -> Iterator[Draws]:
    algorithm = recipe.algorithm
    trainable = algorithm.trainable_steps(recipe.sampling.num_inference_steps)
    shape = inputs_of(architecture, recipe.sampling, torch.float32).latent_shape
    for step in count():
        draw = {"seed": recipe.train.seed, "step": step, "slot": 0}
        yield Draws(
            noise_GS=neighborhood(shape, algorithm.num_generations, algorithm.sigma, **draw).to(device),
            step_K=draw_train_steps((trainable.start, trainable.stop), algorithm.num_train_steps, **draw),
            anchor_B=draw_anchors(algorithm.num_generations, algorithm.num_anchors, **draw),
        )


# -- A profile ---------------------------------------------------------------------------------------------------------


def profiled(session: Session, recipe: Recipe) -> None:
    """Write where the time of an iteration goes, as `ngrpo profile` does, into train_profile beside the CSV."""
    out = (session.out.parent if session.out else Path("build")) / "train_profile"

    def measure(case: Case) -> None:
        if not (out / "profile.json").exists():
            shutil.rmtree(out, ignore_errors=True)  # of a profile that was cut
        eager = mock.patch.object(flux, "compile_whole") if session.brief else nullcontext()
        with eager:
            profile(recipe, out, iterations=1, warmup=1, arguments=NSIGHT.split())

    session.case("profile", "full, 1 update", measure, settings_of(recipe))


# -- The command -------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Session, Recipe], None]] = {
    "forward": train_forward.forward,
    "attention": train_forward.backends,
    "activations": train_model.activations,
    "optimizer": train_model.optimizer,
    "decode": train_model.decode,
    "rewards": train_scorers.rewards,
    "iteration": iteration,
    "algorithms": algorithms,
    "variants": variants,
    "sharded": sharded,
    "peer": peer,
    "profile": profiled,
}


def main(args: Parts) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        print("train_parts: no CUDA device; --tiny rehearses on a CPU", file=sys.stderr)
        return 2
    session = Session(device, args.out, args.only, compiles=device.type == "cuda", brief=args.brief, holds=args.hold)
    recipe = tiny(on_gpu=device.type == "cuda") if args.tiny else full_size()
    if args.brief:  # not what is fastest, which would be measured first, perhaps beside other work
        recipe = replace(recipe, parallel=replace(recipe.parallel, attention="native"))
    PARTS[args.part](session, recipe)
    return int(session.failed)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(tyro.cli(Parts, description=__doc__)))
