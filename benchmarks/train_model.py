"""Single parts of an iteration at the model's full size: forward with backward, the optimizer's step, the VAE.

Each function measures the cases of one part of `train_parts`. Cases that share a model follow each other on it.
"""

# N pictures, S the dimensions of a latent of a packed token.

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.train_recipes import depth_of, settings_of, with_depth
from benchmarks.train_rows import Case, Session, Skip, clock, peak_memory, seconds_of
from ngrpo_train.models.flux import Flux
from ngrpo_train.models.model import Conditioning, FlowModel
from ngrpo_train.models.sizes import find_architecture, transformer_on
from ngrpo_train.parallel import blocks
from ngrpo_train.plan.machines import machine_of
from ngrpo_train.prompts import load_prompts
from ngrpo_train.recipe.sections import Model, Optimizer, Recipe
from ngrpo_train.update.optimizer import guarded_step, make_optimizer

ROUNDS = 8
NO_COMPILER = "compiling takes minutes on a CPU"


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs of a forward: the states of N pictures, each with its own prompt."""

    x_NS: Tensor
    sigma_N: Tensor
    conditioning: Conditioning

    @staticmethod
    def make(model: FlowModel, recipe: Recipe) -> "Inputs":
        count = recipe.algorithm.num_generations
        x = torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(model.device)
        prompts = [prompt.text for prompt in load_prompts(recipe.prompts.source)[:count]]
        return Inputs(x, torch.full((count,), 0.9, device=model.device), model.encode(prompts))

    def first(self, count: int) -> tuple[Tensor, Tensor, Conditioning]:
        rows = torch.arange(count, device=self.x_NS.device)
        return self.x_NS[:count], self.sigma_N[:count], self.conditioning.rows(rows)


def build(session: Session, part: str, name: str, recipe: Recipe) -> tuple[FlowModel, Inputs] | None:
    """The model of a recipe, and inputs for it; None where they cannot be made, which a row then says."""
    made: list[tuple[FlowModel, Inputs]] = []

    def measure(case: Case) -> None:
        # So every build has the same text encoders and VAE; the transformer's weights have their own seeds.
        torch.manual_seed(recipe.train.seed)
        stop = clock(session.device)
        model = FlowModel(recipe.model, recipe.sampling, recipe.parallel, session.device)
        case.add("build", "s", stop())
        stop = clock(session.device)
        made.append((model, Inputs.make(model, recipe)))
        case.add("encode", "s", stop(), note=f"{recipe.algorithm.num_generations} prompts, the first time")

    session.case(part, f"building: {name}", measure, settings_of(recipe), always=True)
    return made.pop() if made else None


def with_compiler(recipe: Recipe, on: bool) -> Recipe:
    return replace(recipe, parallel=replace(recipe.parallel, compile="on" if on else "off"))


def peak_tflops(device: torch.device) -> float:
    """The datasheet's TFLOP/s for dense bfloat16; 0 for a device that is not in the table of machines."""
    if device.type != "cuda":
        return 0.0
    properties = torch.cuda.get_device_properties(device)
    machine = machine_of(properties.name, properties.total_memory)
    return machine.tflops if machine else 0.0


def skipping(reason: str) -> Callable[[Case], None]:
    def measure(case: Case) -> None:
        raise Skip(reason)

    return measure


# -- Activations -------------------------------------------------------------------------------------------------------


def activations(session: Session, recipe: Recipe) -> None:
    """Measure forward and backward of an update's pictures, by the activations that are kept."""
    built = build(session, "activations", "the model", with_compiler(recipe, False))
    if built is None:
        return
    model, part = built[0], built[1].first(recipe.algorithm.num_anchors)
    keeps: list[tuple[Any, bool]] = [(keep, True) for keep in ("selective", "full", 0.3, 0.1, "none")]
    keeps += [(keep, False) for keep in ("full", "selective", "none")]

    for keep, compiled in keeps:
        spec = replace(recipe.model, gradient_checkpointing=keep)
        of_keep = replace(with_compiler(recipe, compiled), model=spec)

        def measure(case: Case, recipe: Recipe = of_keep, compiled: bool = compiled) -> None:
            if compiled and not session.compiles:
                raise Skip(NO_COMPILER)
            _prepare_again(model, recipe)
            _forward_backward(case, model, part)

        session.case("activations", f"{keep}, {'compiled' if compiled else 'eager'}", measure, settings_of(of_keep))


def _prepare_again(model: FlowModel, recipe: Recipe) -> None:
    """Prepare the blocks again, to recompute and compile by another recipe."""
    import torch._functorch.config as functorch

    functorch.activation_memory_budget = 1.0
    repeated = list(model.adapter.blocks(model.transformer).values())
    for block in repeated:
        block.__dict__.pop("forward", None)
    blocks.prepare(repeated, recipe.model, recipe.parallel, model.device)


def _forward_backward(case: Case, model: FlowModel, part: tuple[Tensor, Tensor, Conditioning]) -> None:
    device, taken = case.session.device, []
    direction = torch.randn(part[0].shape, generator=torch.Generator().manual_seed(1)).to(device, model.compute_dtype)

    def both() -> None:
        stop = clock(device)
        velocity = model.velocity(*part)
        taken.append(stop())
        stop = clock(device)
        velocity.backward(direction)
        taken.append(stop())

    for number in range(2):  # the second pass adds to existing gradients
        both()
        if number == 0:
            case.add("first_call", "s", sum(taken))
    taken.clear()
    with peak_memory(case):
        for _ in range(ROUNDS // 2):
            both()
    forwards, backwards = taken[::2], taken[1::2]
    case.add("forward", "ms", *(1e3 * each for each in forwards))
    case.add("backward", "ms", *(1e3 * each for each in backwards))
    case.add("both", "ms", *(1e3 * sum(each) for each in zip(forwards, backwards, strict=True)))


# -- The optimizer's step ----------------------------------------------------------------------------------------------


def optimizer(session: Session, recipe: Recipe) -> None:
    """Measure clipping and one step: 8-bit states with bfloat16 weights; float32 in as much of the model as fits."""
    name, (doubles, singles) = recipe.model.name_or_path, depth_of(recipe.model.name_or_path)
    third = with_depth(name, max(1, doubles // 3), max(1, singles // 3))
    cases: tuple[tuple[str, str, Any, torch.dtype], ...] = (
        ("adamw_8bit, bfloat16 weights", name, "adamw_8bit", torch.bfloat16),
        ("adamw, float32 weights, a third of the blocks", third, "adamw", torch.float32),
    )
    for case_name, model, kind, dtype in cases:
        settings = replace(recipe.optimizer, name=kind)

        def measure(case: Case, model: str = model, settings: Optimizer = settings, dtype: torch.dtype = dtype) -> None:
            _step(case, model, settings, dtype, whole=name)

        of_case = Recipe(model=replace(recipe.model, name_or_path=model), optimizer=settings)
        session.case("optimizer", case_name, measure, settings_of(of_case))


def _step(case: Case, model: str, settings: Optimizer, dtype: torch.dtype, *, whole: str) -> None:
    device = case.session.device
    transformer = transformer_on(find_architecture(model), dtype=dtype).to_empty(device=device)
    parameters = list(transformer.parameters())
    for parameter in parameters:
        parameter.data.normal_(std=0.02)
    count = sum(parameter.numel() for parameter in parameters)
    case.add("parameters", "count", count)
    stop = clock(device)
    stepping = make_optimizer(parameters, settings)
    case.add("first_step", "s", stop(), note="allocates the states, and on a GPU compiles")
    seconds = []
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter).normal_()
        seconds += seconds_of(lambda: guarded_step(stepping, settings.max_grad_norm, device), device, 1)
    case.add("step", "ms", *(1e3 * each for each in seconds[1:]))
    if device.type == "cuda":
        case.add("peak_memory", "GiB", torch.cuda.max_memory_allocated(device) / 2**30)
    everything = sum(parameter.numel() for parameter in transformer_on(find_architecture(whole)).parameters())
    if everything != count:
        scaled = [1e3 * each * everything / count for each in seconds[1:]]
        case.add("step_scaled", "ms", *scaled, note=f"not measured: times {everything / count:.3g}, for all parameters")


# -- The VAE -----------------------------------------------------------------------------------------------------------


def decode(session: Session, recipe: Recipe) -> None:
    """Measure decoding all pictures of a group: by batch size, eager or compiled, with or without channels last."""
    shallow = with_depth(recipe.model.name_or_path, 1, 1)  # the transformer is not used
    recipe = replace(with_compiler(recipe, False), model=Model(name_or_path=shallow))
    built = build(session, "decode", "the VAE", recipe)
    if built is None:
        return
    model, G = built[0], recipe.algorithm.num_generations
    latents_NS = torch.randn(G, *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(session.device)
    batches = list(dict.fromkeys(n for n in (4, G, 1) if n <= G))
    choices = [(batch, False, last) for last in (True, False) for batch in batches]
    choices += [(batch, True, True) for batch in batches] + [(batches[0], True, False)]

    for batch, compiled, channels_last in choices:

        def measure(
            case: Case, batch: int = batch, compiled: bool = compiled, channels_last: bool = channels_last
        ) -> None:
            if compiled and not session.compiles:
                raise Skip(NO_COMPILER)
            _set_decoder(model, compiled, channels_last)
            model.settings = replace(model.settings, decode_batch=batch)
            stop = clock(session.device)
            model.decode(latents_NS)
            case.add("first_call", "s", stop())
            with peak_memory(case):
                case.add("decode", "s", *seconds_of(lambda: model.decode(latents_NS), session.device, 4))

        layout = "channels last" if channels_last else "channels first"
        name = f"{batch} at once, {'compiled' if compiled else 'eager'}, {layout}"
        of_case = with_compiler(recipe, compiled)
        of_case = replace(of_case, parallel=replace(of_case.parallel, decode_batch=batch))
        session.case("decode", name, measure, settings_of(of_case))


def eager_decoder(model: FlowModel) -> Any:
    """Take back that the decoder of FLUX's VAE is to be compiled, which it is at its first call; returns the VAE."""
    assert isinstance(model.adapter, Flux)
    vae = model.adapter.pipeline.vae
    vae.decoder.__dict__.pop("forward", None)
    return vae


def _set_decoder(model: FlowModel, compiled: bool, channels_last: bool) -> None:
    vae = eager_decoder(model)
    vae.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    model.compiled = compiled
    if compiled:
        blocks.compile_whole(vae.decoder)
