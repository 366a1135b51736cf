"""Forwards of the model alone, by batch, attention backend and dtype, and the differences of their velocities; and
attention alone, by backend."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.train_model import NO_COMPILER, ROUNDS, Inputs, build, peak_tflops, skipping, with_compiler
from benchmarks.train_recipes import settings_of
from benchmarks.train_rows import Case, Session, Skip, clock, peak_memory, seconds_of
from ngrpo_train.models.inputs import inputs_of
from ngrpo_train.models.model import FlowModel
from ngrpo_train.models.sizes import find_architecture
from ngrpo_train.parallel import attention
from ngrpo_train.plan import iteration_flops
from ngrpo_train.recipe.sections import Recipe


def forward(session: Session, recipe: Recipe) -> None:
    """Measure forwards, eager and compiled, by batch and attention backend, and the differences of their velocities."""
    G = recipe.algorithm.num_generations
    batches = sorted({1, recipe.algorithm.num_anchors, G})
    seen: dict[str, Tensor] = {}  # velocities of all G pictures, by the case that computed them
    for how in ("eager", "compiled"):
        if how == "compiled" and not session.compiles:
            session.case("forward", how, skipping(NO_COMPILER))
            return
        of_how = with_compiler(recipe, how == "compiled")
        built = build(session, "forward", how, of_how)
        if built is None:
            continue
        model, inputs = built
        for batch in batches:
            _forward_case(session, model, inputs, of_how, batch, "native", how, seen)
        _gradient_case(session, model, inputs, of_how, how, seen)
        for backend in attention.CANDIDATES[1:]:
            _forward_case(session, model, inputs, of_how, G, backend, how, seen)
        del model, inputs, built
        B = recipe.algorithm.num_anchors
        pairs = [(f"{how}, batch {batch}", f"{how}, batch {G}") for batch in batches[:-1]]
        pairs += [(f"{how}, {backend}, batch {G}", f"{how}, batch {G}") for backend in attention.CANDIDATES[1:]]
        pairs += [(f"{how}, with gradient, batch {B}", f"{how}, batch {B}")]
        pairs += [(f"compiled, batch {batch}", f"eager, batch {batch}") for batch in batches if how == "compiled"]
        _differences(session, how, seen, pairs)
    _float8(session, recipe, seen, G)


def _forward_case(
    session: Session,
    model: FlowModel,
    inputs: Inputs,
    recipe: Recipe,
    batch: int,
    backend: str,
    how: str,
    seen: dict[str, Tensor],
) -> None:
    """Measure a forward without gradient, `batch` pictures at a time."""
    name = f"{how}, batch {batch}" if backend == "native" else f"{how}, {backend}, batch {batch}"

    def measure(case: Case) -> None:
        _use_backend(model, backend)
        model.settings = replace(model.settings, rollout_batch=batch)
        part = inputs.first(batch)
        _speed(case, recipe, batch, lambda: model.sampling_velocity(*part))
        everything = inputs.first(len(inputs.x_NS))
        seen[name] = model.sampling_velocity(*everything).float().cpu()

    settings = replace(recipe.parallel, rollout_batch=batch, attention=backend)
    session.case("forward", name, measure, settings_of(replace(recipe, parallel=settings)), keep_compiled=True)


def _refuse(backend: str, device: torch.device) -> None:
    try:
        attention.refuse(backend, device)
    except ValueError as error:
        raise Skip(str(error)) from None


def _use_backend(model: FlowModel, backend: str) -> None:
    _refuse(backend, model.device)
    model.transformer.set_attention_backend(backend)


def _speed(case: Case, recipe: Recipe, batch: int, call: Callable[[], object]) -> None:
    device = case.session.device
    stop = clock(device)
    call()
    case.add("first_call", "s", stop())
    call()
    with peak_memory(case):
        seconds = seconds_of(call, device, ROUNDS)
    case.add("forward", "ms", *(1e3 * each for each in seconds))
    tflop = batch * forward_flops(recipe) / 1e12
    case.add("rate", "TFLOP/s", *(tflop / each for each in seconds))
    if peak := peak_tflops(device):
        case.add("of_peak", "share", *(tflop / each / peak for each in seconds))


def forward_flops(recipe: Recipe) -> float:
    """Operations for one picture: its share of an iteration's rollout."""
    rollout = iteration_flops(recipe, find_architecture(recipe.model.name_or_path)).model_stages["rollout"]
    prompts = recipe.prompts.per_rank * recipe.train.gradient_accumulation_steps
    return rollout / (prompts * recipe.algorithm.num_generations * recipe.sampling.num_inference_steps)


def _gradient_case(
    session: Session, model: FlowModel, inputs: Inputs, recipe: Recipe, how: str, seen: dict[str, Tensor]
) -> None:
    """Measure the forward that trains, on as many pictures as an update takes."""
    B = recipe.algorithm.num_anchors
    name = f"{how}, with gradient, batch {B}"

    def measure(case: Case) -> None:
        _use_backend(model, "native")
        part = inputs.first(B)
        _speed(case, recipe, B, lambda: model.velocity(*part))
        seen[name] = model.velocity(*part).detach().float().cpu()

    session.case("forward", name, measure, settings_of(recipe), keep_compiled=True)


def _float8(session: Session, recipe: Recipe, seen: dict[str, Tensor], G: int) -> None:
    recipe = replace(recipe, parallel=replace(recipe.parallel, compile="on", rollout_dtype="float8"))
    built = build(session, "forward", "float8", recipe)
    if built is None:
        return
    (model, inputs), name = built, f"float8, batch {G}"

    def measure(case: Case) -> None:
        def quantise() -> None:
            with model.exploring():
                pass

        _use_backend(model, "native")
        quantise()
        case.add("quantise", "s", *seconds_of(quantise, session.device, 2))
        part = inputs.first(G)
        with model.exploring():
            _speed(case, recipe, G, lambda: model.sampling_velocity(*part, explore=True))
            seen[name] = model.sampling_velocity(*part, explore=True).float().cpu()

    session.case("forward", name, measure, settings_of(recipe))
    _differences(session, "float8", seen, [(name, f"compiled, batch {G}")])


def _differences(session: Session, how: str, seen: dict[str, Tensor], pairs: Sequence[tuple[str, str]]) -> None:
    """Measure |a - b| / |b| over all pictures that both cases of a pair have."""

    def measure(case: Case) -> None:
        for one, other in pairs:
            if one in seen and other in seen:
                a, b = seen[one].double(), seen[other].double()[: len(seen[one])]
                case.add(f"{one} / {other}", "relative", ((a - b).norm() / b.norm()).item())

    session.case("forward", f"velocities apart: {how}", measure, always=True)


def backends(session: Session, recipe: Recipe) -> None:
    """Measure attention alone by backend, as `parallel.attention = "auto"` does."""
    architecture = find_architecture(recipe.model.name_or_path)
    config, algorithm, sampling = architecture.transformer, recipe.algorithm, recipe.sampling
    dtype = getattr(torch, recipe.parallel.compute_dtype)
    tokens, _ = inputs_of(architecture, sampling, dtype).latent_shape
    shapes = attention.Shapes(
        tokens=tokens + sampling.max_sequence_length,
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        dtype=dtype,
        rollout_batch=algorithm.num_generations,
        update_batch=algorithm.num_anchors,
        rollout_forwards=sampling.num_inference_steps,
        update_forwards=algorithm.num_train_steps,
        compiled=session.compiles,
    )
    layers = config["num_layers"] + config["num_single_layers"]

    def measure(case: Case) -> None:
        if session.device.type == "cpu":
            raise Skip("its clock is not a CPU's")
        _refuse(case.name, session.device)
        seconds = [attention.measure(case.name, shapes, session.device) for _ in range(4)][1:]
        case.add("layer", "ms", *(1e3 * each for each in seconds))
        case.add("iteration", "s", *(layers * each for each in seconds), note=f"not measured: times {layers} layers")

    for backend in attention.CANDIDATES:
        settings = replace(recipe.parallel, attention=backend)
        session.case("attention", backend, measure, settings_of(replace(recipe, parallel=settings)))
