"""What a plan says, against trackers of real passes, torch's own FSDP, figures worked out by hand, and itself."""

import math
import tomllib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from benchmarks import train_recipes
from ngrpo_train.algorithms import make_algorithm
from ngrpo_train.algorithms.stochastic import GaussianPolicy, TransitionRows
from ngrpo_train.commands.train import TrainCommand
from ngrpo_train.models.encoders import TextFeatures
from ngrpo_train.models.inputs import inputs_of
from ngrpo_train.models.model import FlowModel
from ngrpo_train.models.sizes import KNOWN, Architecture, find_architecture, transformer_on
from ngrpo_train.parallel import processes, sharding
from ngrpo_train.parallel.layout import Layout
from ngrpo_train.plan import explain_out_of_memory, fastest_that_fits, make_plan, plan_command, remedies, speedups
from ngrpo_train.plan.activations import block_bytes, decode_pass
from ngrpo_train.plan.flops import iteration_flops
from ngrpo_train.plan.forecast import SAFE_SHARE, Settled
from ngrpo_train.plan.instruments import FlashAttention, FusedNorm, measuring
from ngrpo_train.plan.layout import Batches
from ngrpo_train.plan.machines import GIB, MACHINES, Machine, find_machine, machine_of
from ngrpo_train.plan.memory import Memory, iteration_memory, update_picture_bytes
from ngrpo_train.plan.remedies import with_settings
from ngrpo_train.plan.trace import Kind, Shape, traced
from ngrpo_train.plan.traffic import Traffic, iteration_traffic
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.algorithms import TRANSITION_STATES, Algorithm
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.parsing import as_toml, find_recipe, parse, read_recipe, resolve
from ngrpo_train.recipe.sections import Model, Parallel, Recipe, Reward, Sampling
from ngrpo_train.rewards import Scores

DEV = KNOWN["flux-dev"]
N = 11_901_408_320  # parameters of FLUX.1-dev's transformer
H100, H200 = MACHINES["h100-80"], MACHINES["h200-141"]
EAGER = {"parallel.compile": "off", "model.gradient_checkpointing": "none"}
EIGHT_BIT = {"parallel.master_dtype": "bfloat16", "optimizer.name": "adamw_8bit"}


@cache
def _packaged(name: str) -> Recipe:
    return resolve(read_recipe(find_recipe(name)), name=name)


def recipe(name: str = "flux_dpmpp8", **settings: Any) -> Recipe:
    """A packaged recipe with one prompt per process, as in the paper, and settings by name, with __ for the dot.

    Without its rewards: test_plan_scorers has those.
    """
    named = {field.replace("__", "."): value for field, value in settings.items()}
    without = replace(_packaged(name), rewards={})
    return with_settings(without, {"train.gradient_accumulation_steps": 1, **named})


def settled(name: str = "flux_dpmpp8", **settings: Any) -> Recipe:
    """As `recipe`, with what needs the least memory."""
    return recipe(name, parallel__keep_gathered="never", parallel__reduce_gradients="batch", **settings)


def memory(asked: Recipe, world_size: int = 1, architecture: Architecture = DEV) -> Memory:
    return iteration_memory(asked, architecture, Layout.of(asked.model, asked.parallel, world_size, 8))


def traffic(asked: Recipe, world_size: int = 8) -> Traffic:
    return iteration_traffic(asked, DEV, Layout.of(asked.model, asked.parallel, world_size, 8))


def of_layers(double: int, single: int) -> Architecture:
    return DEV.changed("transformer", num_layers=double, num_single_layers=single)


def inputs(architecture: Architecture, pictures: int, height: int, width: int, text_tokens: int) -> dict[str, Any]:
    """The arguments of a velocity."""
    sampling = Sampling(height=height, width=width, max_sequence_length=text_tokens)
    (call,) = inputs_of(architecture, sampling, torch.bfloat16, pictures).velocity
    return dict(call.named)


def kind(name: str, architecture: Architecture = DEV, **shape: Any) -> Kind:
    """The blocks of a list."""
    sampling = Sampling(**{"height": 720, "width": 720, **shape})
    (found,) = (each for each in traced(architecture, Shape(sampling)).kinds if each.name == name)
    return found


# -- Machines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, gib, name",
    [
        ("NVIDIA H100 80GB HBM3", 79.19, "h100-80"),
        ("NVIDIA H800", 79.35, "h800-80"),
        ("NVIDIA H200", 139.81, "h200-141"),
        ("NVIDIA A100-SXM4-80GB", 79.25, "a100-80"),
        ("NVIDIA A100-SXM4-40GB", 39.39, "a100-40"),
        ("NVIDIA B200", 178.36, "b200-192"),
        ("NVIDIA H100 PCIe", 79.1, None),
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 39.25, None),
        ("NVIDIA GH200 480GB", 94.5, None),
        ("NVIDIA GeForce RTX 4090", 23.64, "rtx4090-24"),
        ("NVIDIA GeForce RTX 3090", 23.69, "rtx3090-24"),
        ("NVIDIA GeForce RTX 5090", 31.36, "rtx5090-32"),
        ("NVIDIA RTX A6000", 47.54, "a6000-48"),
        ("NVIDIA L40S", 44.53, "l40s-48"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.99, None),
    ],
)
def test_a_gpu_is_known_by_what_torch_calls_it(device: str, gib: float, name: str | None) -> None:
    machine = machine_of(device, int(gib * GIB))
    assert (machine.name if machine else None) == name


def test_gpus_by_name() -> None:
    assert find_machine("h200-141").matmul_tflops == 790
    assert find_machine("h100-80").matmul_tflops == pytest.approx(0.8 * 989)
    with pytest.raises(ValueError, match=r"no GPU 'H100-8': .*did you mean h100-80\?"):
        find_machine("H100-8")


# -- Activations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["full", "none"])
def test_activations_are_those_of_a_real_forward_and_backward(keep: str) -> None:
    """Two double and three single blocks of full width, four pictures of 720 x 720, gradients there from before."""
    architecture, pictures = of_layers(2, 3), 4
    model = transformer_on(architecture).train()
    if keep == "full":
        model.enable_gradient_checkpointing(lambda f, *a: checkpoint(f, *a, use_reentrant=False))
    weights = 0
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
        weights += 2 * parameter.untyped_storage().nbytes()  # and its gradient
    tracker = MemTracker()
    tracker.track_external(model)
    with FlashAttention(), FusedNorm(), tracker:
        out = model(**inputs(architecture, pictures, 720, 720, 512))[0]
        edge, gradient = get_gradient_edge(out), torch.empty_like(out)
        torch.autograd.backward([edge], [gradient])
    tracked = tracker.get_tracker_snapshot("peak")[torch.device("meta")]["Total"]
    eager = recipe(model__gradient_checkpointing=keep, parallel__compile="off")
    _, most = update_picture_bytes(eager, architecture, Shape(eager.sampling))
    assert weights + pictures * most == pytest.approx(tracked, rel=0.1)
    assert pictures * most == pytest.approx(tracked - weights, rel=0.1)


@pytest.mark.parametrize("keep", ["none", 0.2])
def test_compiled_blocks_keep_what_the_compiler_makes_them_keep(keep: Any) -> None:
    shapes = find_architecture("shapes")
    shape = Shape(Sampling(height=128, width=128, max_sequence_length=16), torch.float32)
    _, single = traced(shapes, shape).kinds
    expected = block_bytes(single, keep, compiled=True)
    block = transformer_on(shapes, "cpu", torch.float32).single_transformer_blocks[0]
    rope = torch.ones(80, 32)
    time = torch.ones(1, 128, requires_grad=True)
    not_activations = {x.untyped_storage()._cdata for x in (*block.parameters(), rope, time)}  # blocks share time
    kept: dict[int, torch.UntypedStorage] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    streams = [torch.ones(1, tokens, 128, requires_grad=True) for tokens in (64, 16)]
    budget = 1.0 if keep == "none" else keep
    with functorch.patch(activation_memory_budget=budget), saved_tensors_hooks(note, lambda x: x):
        compiled(*streams, time, image_rotary_emb=(rope, rope))
    saved = sum(storage.nbytes() for address, storage in kept.items() if address not in not_activations)
    assert expected.kept == pytest.approx(saved, rel=0.05)
    assert (expected.recomputed > 0.1) == (keep == 0.2)


def test_what_is_kept_grows_with_the_wish_to_keep() -> None:
    for blocks in (kind("transformer_blocks"), kind("single_transformer_blocks")):
        full, selective, none = (block_bytes(blocks, keep) for keep in ("full", "selective", "none"))
        assert full.kept == pytest.approx(2 * 2537 * 3072, rel=0.01)  # the block's input in bfloat16
        assert full.kept < selective.kept < none.kept < none.backward
        assert (full.recomputed, selective.recomputed, none.recomputed) == (1, 0, 0)


def test_no_matrix_of_scores_is_kept() -> None:
    few, many = (  # of 1,536 and 7,680 image tokens, and 512 of text
        block_bytes(kind("single_transformer_blocks", height=height, width=width)).kept
        for height, width in ((512, 768), (1024, 1920))
    )
    assert many == pytest.approx(4 * few, rel=0.01)


def test_a_decode_is_counted() -> None:
    decode = decode_pass(DEV, Sampling(height=720, width=720))
    assert decode.flops / 1e12 == pytest.approx(5.04, abs=0.005)
    full_size_features = 2 * 256 * 720 * 720  # bfloat16, before the last stage halves them
    assert 2 * full_size_features < decode.peak < 5 * full_size_features


# -- Weights and gradients, against FSDP2 as the trainer uses it -------------------------------------------------------


@contextmanager
def one_of(world_size: int) -> Iterator[None]:
    """This process as one of several whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "world_size, keep, reduce",
    [(8, "never", "step"), (8, "iteration", "batch"), (1, "rollout", "step")],
)
def test_shards_gathers_and_gradients_are_those_of_fsdp(
    world_size: int, keep: Any, reduce: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few tokens, so that weights and gradients are nearly all there is."""
    architecture = of_layers(0, 3)
    settings = Parallel(keep_gathered=keep, reduce_gradients=reduce, compile="off", update_batch=4)
    with one_of(world_size):
        layout = Layout.of(Model(), settings, world_size, world_size)
        mesh = sharding._mesh(layout, settings, torch.device("cpu"))  # of ranks, which must be real numbers
        monkeypatch.setattr(sharding, "_mesh", lambda *_: mesh)
        with FakeTensorMode():
            rollout, update = _peaks(architecture, settings, monkeypatch)
    planned = memory(replace(recipe(), parallel=settings), world_size, architecture).phases
    assert _weights(planned["rollout"]) == pytest.approx(rollout, rel=0.05)
    assert _weights(planned["update"]) == pytest.approx(update, rel=0.05)


class _Bytes(TorchDispatchMode):
    """Bytes of all storages, which FSDP frees and takes again by resizing them; `peak` since it was last set."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                self.follow(x)
        return out

    def follow(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata not in self._sizes:
            self._set(storage._cdata, storage.nbytes())
            weakref.finalize(storage, self._forget, storage._cdata)

    def _set(self, address: int, size: int) -> None:
        self.now += size - self._sizes.get(address, 0)
        self._sizes[address] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, address: int) -> None:
        self._set(address, 0)
        del self._sizes[address]

    def resizing(self, resize: Any) -> Any:
        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            self._set(storage._cdata, size)
            return storage

        return resized


def _peaks(architecture: Architecture, settings: Parallel, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Bytes at most in a rollout's forward, and then in two forward-backwards."""
    tracker = _Bytes()
    monkeypatch.setattr(torch.UntypedStorage, "resize_", tracker.resizing(torch.UntypedStorage.resize_))
    model = transformer_on(architecture, "cpu", torch.float32)
    sharding.shard(model, [*model.single_transformer_blocks], Model(), settings, torch.device("cpu"))
    given = {
        name: torch.empty_like(x, device="cpu") if isinstance(x, torch.Tensor) else x
        for name, x in inputs(architecture, 1, 64, 64, 16).items()
    }
    for parameter in model.parameters():
        tracker.follow(processes.local(parameter))
    with tracker:
        sharding.keep_gathered(model, settings.keep_gathered != "never")
        with torch.no_grad():
            model(**given)
        rollout, tracker.peak = tracker.peak, tracker.now
        sharding.keep_gathered(model, settings.keep_gathered == "iteration")
        for last in (False, True):
            sharding.sync_gradients(model, settings, last=last)
            model(**given)[0].sum().backward()
    return rollout, tracker.peak


def _weights(parts: Any) -> float:
    return sum(parts.get(part, 0) for part in ("trained weights", "gathered weights", "gradients"))


@pytest.mark.parametrize("sharding_", ["auto", "full", "hybrid", "none"])
@pytest.mark.parametrize("world_size", [1, 8, 16])
@pytest.mark.parametrize("changes", [{}, EIGHT_BIT, {"parallel.offload": True}, {"parallel.compute_dtype": "float32"}])
def test_weights_lie_where_the_trainer_puts_them(sharding_: Any, world_size: int, changes: dict[str, Any]) -> None:
    """On nodes of 8. Plain is what is stored as it computes: bfloat16 by the 8-bit optimizer, or float32 by both."""
    shares = {"auto": world_size, "full": world_size, "hybrid": min(8, world_size), "none": 1}[sharding_]
    for tuning in ("full", "lora"):
        alike = "parallel.compute_dtype" in changes or (changes is EIGHT_BIT and tuning == "full")
        asked = with_settings(recipe(), {"parallel.sharding": sharding_, "model.tuning": tuning, **changes})
        layout = Layout.of(asked.model, asked.parallel, world_size, 8)
        assert layout.shares == shares
        assert layout.plain == (world_size == 1 and sharding_ != "full" and alike)


# -- Memory, by hand ---------------------------------------------------------------------------------------------------


def test_one_gpu_with_bfloat16_weights_and_8_bit_states() -> None:
    held = memory(with_settings(settled(), EIGHT_BIT)).phases["update"]
    assert held["trained weights"] == 2 * N
    states = held["trained weights"] + held["gradients"] + held["optimizer states"]
    assert states == (2 + 2 + 2 + 8 / 256) * N
    assert states / 1e9 == pytest.approx(72.1, abs=0.4)  # the design's: without scales 71.4
    assert held["trained weights"] / 1e9 == pytest.approx(23.8, abs=0.01)
    assert "gathered weights" not in held


def test_eight_gpus_share_float32_states() -> None:
    held = memory(recipe(parallel__keep_gathered="iteration", parallel__reduce_gradients="batch"), 8)
    step = held.phases["step"]
    assert step["trained weights"] + step["gradients"] + step["optimizer states"] == 16 * N / 8
    assert step["gathered weights"] == held.phases["decode"]["gathered weights"] == 2 * N
    alone = memory(recipe(parallel__keep_gathered="rollout", parallel__reduce_gradients="batch"), 8)
    assert "gathered weights" not in alone.phases["step"]
    assert alone.phases["rollout"] == held.phases["rollout"]


def test_more_gpus_hold_less_each() -> None:
    asked = settled()
    peaks = [memory(asked, world_size).peak for world_size in (2, 4, 8, 16, 32)]
    assert peaks == sorted(peaks, reverse=True)
    hybrid = replace(asked, parallel=replace(asked.parallel, sharding="hybrid"))
    assert memory(hybrid, 32).phases["step"] == memory(hybrid, 8).phases["step"]  # a copy for each node


def test_host_memory_takes_what_is_offloaded() -> None:
    """Weights and gradients are pinned, shard by shard: the block of a shard has a power of two of bytes."""
    asked = settled(parallel__offload=True, model__ema=0.99)
    held = memory(asked, 8)
    shards = [math.ceil(len(p) / 8) * (p.numel() // len(p)) for p in transformer_on(KNOWN["flux-dev"]).parameters()]
    assert held.pinned == 8 * 2 * sum(2 ** math.ceil(math.log2(4 * values)) for values in shards)
    assert held.host == held.pinned + (8 + 4) * N  # and two states and the average, of all eight together
    assert 1.2 < held.pinned / (8 * N) < 2
    assert not {"trained weights", "optimizer states", "moving average"} & held.phases["step"].keys()


def test_text_encoders_where_the_recipe_puts_them() -> None:
    encoders = 2 * (123_060_480 + 4_762_310_656)
    at = {place: memory(settled(parallel__text_encoders=place), 8) for place in ("device", "offload", "shard")}
    assert at["device"].phases["update"]["text encoders"] == encoders
    assert at["offload"].phases["encode"]["text encoders"] == encoders
    assert "text encoders" not in at["offload"].phases["update"]
    assert at["offload"].host == at["offload"].pinned
    assert 8 * encoders < at["offload"].pinned < 2 * 8 * encoders
    assert at["shard"].phases["update"]["text encoders"] == pytest.approx(encoders / 8, rel=0.2)  # CLIP stays whole
    cached = memory(settled(prompts__embeddings="x"), 8)
    assert "encode" not in cached.phases
    assert all("text encoders" not in parts for parts in cached.phases.values())


def test_lora_trains_little_beside_a_frozen_base() -> None:
    adapters = 128 * 3072 * (19 * 36 + 38 * 17)
    asked = settled("flux_lora")
    held = memory(asked).phases["step"]
    assert held["frozen weights"] == 2 * N
    assert held["trained weights"] == held["gradients"] == 4 * adapters
    assert memory(asked, 8).phases["step"]["frozen weights"] == 2 * N / 8


def test_a_float8_copy_explores_for_sharded_weights() -> None:
    asked = settled(parallel__rollout_dtype="float8")
    matrices = (19 * 24 + 38 * 12) * 3072**2  # without modulations
    phases = memory(asked, 8).phases
    assert phases["step"]["float8 copy"] == matrices + 2 * (N - matrices)
    assert phases["rollout"]["gathered weights"] < memory(settled(), 8).phases["rollout"]["gathered weights"]
    update = 2 * 4
    assert traffic(asked).gathers == update + 1
    assert traffic(asked).gathered_bytes == (update * 2 + 4) * N * 7 / 8  # the copy is made from float32 weights
    flops, same = iteration_flops(asked, DEV), iteration_flops(settled(), DEV)
    assert flops.model == same.model
    assert 0.85 < flops.float8 / flops.hardware_stages["rollout"] < 0.9  # attention stays in bfloat16
    assert make_plan(asked, H100, 8).seconds.compute < make_plan(settled(), H100, 8).seconds.compute
    fast, none = (make_plan(asked, machine, 8).seconds for machine in (H100, MACHINES["a100-80"]))
    assert none.compute / fast.compute > H100.matmul_tflops / MACHINES["a100-80"].matmul_tflops


def test_trajectories_wait_for_the_update() -> None:
    """All of them, or those of one prompt; or of two, while another machine scores the first."""
    latent, text = 4 * 2025 * 64, 2 * 512 * 4096
    group = (2 * 16 + 48 + 12) * latent + text
    asked = settled(train__gradient_accumulation_steps=32, parallel__stream="off")
    assert memory(asked).phases["decode"]["explored groups"] == 32 * group
    asked = settled(train__gradient_accumulation_steps=32)
    earlier = 31 * 12 * latent  # final ones, for the figures
    assert memory(asked).phases["decode"]["explored groups"] == group + earlier
    remote = replace(asked, rewards={"hpsv2_1": Reward(remote="http://scorer")})
    assert memory(remote).phases["decode"]["explored groups"] == 2 * group + earlier


@pytest.mark.parametrize("reduce, sums", [("step", 4 * N), ("batch", 4 * N / 8)])
def test_gradients_wait_while_later_prompts_are_explored(reduce: str, sums: float) -> None:
    asked = with_settings(settled(train__gradient_accumulation_steps=4), {"parallel.reduce_gradients": reduce})
    streamed, whole = (memory(with_settings(asked, {"parallel.stream": each}), 8) for each in ("on", "off"))
    for phase in ("rollout", "decode"):
        assert streamed.phases[phase]["gradients"] == sums
        assert "gradients" not in whole.phases[phase]
    assert streamed.phases["update"]["gradients"] == whole.phases["update"]["gradients"]
    alone = memory(with_settings(asked, EIGHT_BIT | {"parallel.sharding": "none"}))
    assert alone.phases["rollout"]["gradients"] == 2 * N


def test_streaming_is_left_where_memory_is_short() -> None:
    """Of float32 sums of whole gradients, 47.6 GB, beside a rollout."""
    asked = with_settings(
        settled(train__gradient_accumulation_steps=4),
        {"parallel.keep_gathered": "auto", "parallel.reduce_gradients": "step", "parallel.stream": "auto"},
    )
    roomy, short = (fastest_that_fits(asked, DEV, gib * GIB, 8) for gib in (140, 88))
    assert (roomy.stream, short.stream) == ("on", "off")


# -- Operations and bytes, by hand -------------------------------------------------------------------------------------


def test_the_8_step_iteration() -> None:
    stages = {stage: flops / 1e12 for stage, flops in iteration_flops(recipe(), DEV).hardware_stages.items()}
    assert stages["rollout"] == pytest.approx(3_579, abs=0.5)
    assert stages["forward"] + stages["backward"] + stages["recomputation"] == pytest.approx(2_386, abs=1)
    assert stages["decode"] == pytest.approx(60, abs=1)  # with 10 of the design's scorers, its 70
    assert make_plan(recipe(), H200).seconds.compute == pytest.approx(7.64 - 10 / 790, abs=0.02)


@pytest.mark.parametrize(
    "steps, solver, anchors, trained, step_range, nfe_theta",
    [
        (25, "ddim", 12, 4, (0, 0.5), 4.00),
        (16, "dpmpp_2m", 4, 9, (0, 0.5625), 3.00),
        (8, "dpmpp_2m", 4, 4, (0, 0.5), 1.33),
    ],
)
def test_evaluations_of_the_papers_rows(
    steps: int, solver: str, anchors: int, trained: int, step_range: tuple[float, float], nfe_theta: float
) -> None:
    row = recipe(
        sampling__num_inference_steps=steps,
        sampling__solver=solver,
        algorithm__num_anchors=anchors,
        algorithm__num_train_steps=trained,
        algorithm__step_range=step_range,
    )
    plan = make_plan(row, MACHINES["h800-80"], 32)
    assert plan.workload.nfe_old == steps
    assert plan.workload.nfe_theta == pytest.approx(nfe_theta, abs=0.005)
    assert plan.prompts == 32


def test_what_is_computed_twice_is_not_the_models() -> None:
    asked = recipe()
    flops = iteration_flops(asked, DEV)
    assert flops.hardware - flops.model == flops.hardware_stages["recomputation"]
    for keep in ("selective", "none"):
        kept = iteration_flops(recipe(model__gradient_checkpointing=keep), DEV)
        assert kept.hardware == kept.model == flops.model
    filled = iteration_flops(recipe(parallel__rollout_batch=5), DEV)  # three forwards of 5, for 12 pictures
    assert filled.hardware_stages["rollout"] == 15 * filled.model_stages["rollout"] // 12


def test_further_passes_of_the_policy() -> None:
    once = iteration_flops(recipe(), DEV).model_stages
    often = iteration_flops(recipe(algorithm__updates_per_iteration=4, parallel__update_batch=1), DEV).model_stages
    assert often["forward"] == once["forward"]
    assert often["old policy"] == 3 * once["forward"] // 4  # the first block's comes with its training forward
    literal = recipe(algorithm__updates_per_iteration=4, algorithm__old_policy="literal")
    assert "old policy" not in iteration_flops(literal, DEV).model_stages
    tether = iteration_flops(recipe("flux_lora", algorithm__reference_coef=1.0), DEV).model_stages
    assert tether["reference"] == once["forward"] < tether["forward"]


def test_bytes_between_eight_gpus() -> None:
    """8 rollout forwards; 4 forward-backwards of one step's anchors, each of which gathers twice."""
    whole, others = 2 * N, 7 / 8
    never = traffic(recipe(parallel__keep_gathered="never", parallel__reduce_gradients="batch"))
    assert never.gathers == 8 + 4 * 2
    assert never.gathered_bytes == 16 * whole * others
    assert never.reduced_bytes == 4 * 4 * N * others
    assert (never.all_reduced_bytes, never.host_bytes) == (0, 0)
    rollout = traffic(recipe(parallel__keep_gathered="rollout", parallel__reduce_gradients="step"))
    assert (rollout.gathers, rollout.reduced_bytes) == (1 + 8, 4 * N * others)
    kept = recipe(parallel__keep_gathered="iteration", parallel__reduce_gradients="step")
    assert traffic(kept).gathers == 1
    several = {"algorithm.updates_per_iteration": 4, "parallel.update_batch": 1}
    assert traffic(with_settings(kept, several)).gathers == 4  # an optimizer step makes weights stale
    chunks = {"parallel.rollout_batch": 4, "train.gradient_accumulation_steps": 2, "parallel.keep_gathered": "never"}
    assert traffic(with_settings(kept, chunks)).gathers == 2 * 3 * 8 + 2 * 8


def test_bytes_between_copies_and_to_the_host() -> None:
    asked = settled()
    copies = with_settings(asked, {"parallel.sharding": "hybrid"})
    assert traffic(copies, 32).gathered_bytes == traffic(asked, 8).gathered_bytes
    assert traffic(copies, 32).all_reduced_bytes == 4 * N / 8 * 2 * 3 / 4
    none = traffic(with_settings(asked, {"parallel.sharding": "none"}), 4)
    assert (none.gathered_bytes, none.reduced_bytes, none.all_reduced_bytes) == (0, 0, 4 * N * 2 * 3 / 4)
    offloaded = traffic(with_settings(asked, {"parallel.offload": True}), 1)
    assert offloaded.host_bytes == (16 + 1) * 4 * N  # weights as float32 for every gather, gradients once
    plain = traffic(with_settings(asked, EIGHT_BIT), 1)
    assert (plain.gathers, plain.copied_bytes) == (0, 0)


def test_links_of_a_node_and_between_nodes() -> None:
    asked = settled()
    slow = replace(H100, network_gbps=1.0)  # eight of them together 8 GB/s
    sent = traffic(asked, 8)
    near = make_plan(asked, slow, 8).seconds
    assert near.links == pytest.approx((sent.gathered_bytes + sent.reduced_bytes) / 450e9)
    far = make_plan(asked, slow, 16).seconds
    assert far.links == pytest.approx(near.links * (15 / 16) / (7 / 8) * 450 / 8)
    assert far.floor == far.links > far.compute
    assert near.floor == near.compute
    assert near.estimate > near.floor


# -- Other algorithms, by hand and by what they do ---------------------------------------------------------------------


def with_algorithm(name: str, steps: int, settings: dict[str, Any], **others: Any) -> Recipe:
    """As `settled`, with an algorithm as it was published, but for these settings of it."""
    published = replace(Algorithm.of(name), step_range=(0.0, 1.0), **settings)
    return replace(settled(sampling__num_inference_steps=steps, **others), algorithm=published)


FROZEN = {"window_frozen": True, "compression": 0.2}  # 4 of the 25 steps in the window, then 3 for the other 21
TREE = 3 * (2 + 4 + 8) + 10 * 16  # edges of the 19 random steps: three after each split, but ten after the last


@pytest.mark.parametrize(
    "name, steps, settings, batch, evaluated, filled, forwards, trained, first, count",
    [
        ("dance_grpo", 25, {}, 12, 25 * 12, 25 * 12, 25, 12 * 14, 56, 14),
        ("mix_grpo_flash", 25, FROZEN, 5, 7 * 12, 7 * 15, 7 * 3, 12 * 4, 12, 3),
        # One picture before the first split; 16 in the last step, which is not trained.
        ("branch_grpo", 20, {}, 4, 1 + TREE, 4 + 3 * (4 + 4 + 8) + 160, 1 + 3 * (1 + 1 + 2) + 40, TREE, 6, 2),
    ],
)
def test_what_an_sde_computes(
    name: str,
    steps: int,
    settings: dict[str, Any],
    batch: int,
    evaluated: int,
    filled: int,
    forwards: int,
    trained: int,
    first: int,
    count: int,
) -> None:
    """4 states at once, in each of U optimizer steps. Forwards of one picture are those of Neighbor GRPO."""
    asked = with_algorithm(name, steps, settings, parallel__rollout_batch=batch, parallel__update_batch=4)
    picture = iteration_flops(settled(), DEV).model_stages["rollout"] // (12 * 8)
    flops, U = iteration_flops(asked, DEV), {"dance_grpo": 3, "mix_grpo_flash": 4, "branch_grpo": 34}[name]
    assert flops.model_stages["rollout"] == evaluated * picture
    assert flops.model_stages["forward"] == trained * picture == flops.model_stages["backward"] // 2
    assert flops.model_stages["old policy"] == (trained - first) * picture
    assert flops.hardware_stages["rollout"] == filled * picture
    assert flops.hardware_stages["forward"] == U * count * 4 * picture
    assert traffic(asked).gathers == forwards + 2 * U * count + (U - 1) * count
    latent, text = 4 * 2025 * 64, 2 * 512 * 4096
    held = memory(asked).phases
    G = asked.algorithm.num_generations
    assert held["decode"]["explored groups"] == (3 * trained + G) * latent + text  # state, noise, velocity; pictures
    assert held["update"]["explored groups"] == held["decode"]["explored groups"]
    if name == "branch_grpo":
        pruned = with_algorithm(name, steps, {**settings, "width_pruning": "extremes"}, parallel__update_batch=4)
        held = memory(pruned).phases
        copied = 3 * pruned.workload().states * latent
        assert held["update"]["explored groups"] - held["decode"]["explored groups"] == copied
    plan = make_plan(asked, H200)
    assert (plan.workload.nfe_old, plan.workload.nfe_theta) == (evaluated / G, trained / G)
    assert plan.seconds.compute > make_plan(settled(), H200).seconds.compute


def test_the_loss_of_transitions_holds_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels, whose ops allocate on "meta" what they do on a device."""
    monkeypatch.setattr("ngrpo_kernels.gaussian.pick", lambda *_: "cpp")

    def meta(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta")

    with measuring() as live:
        none, state = torch.zeros(4, dtype=torch.int64, device="meta"), (4, 1, 64, 64)
        rows = TransitionRows(
            real=4,
            prompt_r=none,
            step_r=none,
            latents_rbS=meta(*state),
            sigma_before_r=meta(4),
            rollout_velocity_rbS=meta(*state),
            conditioning=TextFeatures(meta(0), meta(0), meta(0)),
            advantage_r=none,
            slope_r=meta(4),
            std_r=meta(4),
            noise_r1S=meta(*state),
        )
        velocity = meta(*state).requires_grad_()
        terms = GaussianPolicy(Algorithm.of("dance_grpo")).terms(rows, velocity, meta(*state), meta(1, 12))
        (gradient,) = torch.autograd.grad(terms.loss, velocity)
    assert gradient.shape == state
    assert live.peak() == pytest.approx(TRANSITION_STATES * 4 * 4 * 64 * 64, rel=0.01)


def test_a_rollouts_end_makes_one_of_all_groups() -> None:
    """At many prompts per update: what is kept of them is copied, and more than the model's activations."""
    asked = with_algorithm("dance_grpo", 25, {}, train__gradient_accumulation_steps=32)
    held = memory(asked).phases["rollout"]
    assert held["activations"] == held["explored groups"]
    few = memory(with_algorithm("dance_grpo", 25, {})).phases["rollout"]
    assert few["activations"] > 2 * few["explored groups"]


def test_a_trees_batches_are_small_where_they_would_be_filled() -> None:
    """Forwards of 4 pictures keep a GPU busy; 16 at once would compute 320 for the tree's 203."""
    asked = with_algorithm("branch_grpo", 20, {})
    assert fastest_that_fits(asked, DEV, 140 * GIB, 8).rollout_batch == 4
    eager = with_settings(asked, {"parallel.compile": "off"})
    assert fastest_that_fits(eager, DEV, 140 * GIB, 8).rollout_batch == 16


REAL = {
    "neighbor": {"num_anchors": 2, "num_train_steps": 3},
    "flow_grpo": {},
    "dance_grpo": {"updates_per_iteration": 2},
    "mix_grpo": {"window_size": 2, "updates_per_iteration": 4},
    "mix_grpo_flash": {"window_size": 2, "updates_per_iteration": 2},
    "branch_grpo": {"branch_steps": (0, 2), "width_pruning": "parent_top1", "depth_pruning": 1},
}


@pytest.fixture(scope="module")
def small() -> tuple[Recipe, FlowModel]:
    tiny = train_recipes.tiny(on_gpu=False)
    parallel = replace(tiny.parallel, update_batch=3, rollout_batch=3, attention="native")
    small = replace(
        tiny,
        prompts=replace(tiny.prompts, per_rank=2),
        sampling=replace(tiny.sampling, num_inference_steps=6),
        parallel=parallel,
    )
    return small, FlowModel(small.model, small.sampling, parallel, torch.device("cpu"))


@pytest.mark.parametrize("name", REAL)
def test_an_iteration_does_what_is_counted(
    name: str, small: tuple[Recipe, FlowModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, flux = small
    algorithm = replace(Algorithm.of(name), num_generations=4, step_range=(0.0, 1.0), **REAL[name])
    recipe = replace(recipe, algorithm=algorithm)
    check(recipe)
    calls: list[tuple[bool, int]] = []
    forward = flux.adapter.velocity

    def counted(transformer: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append((torch.is_grad_enabled(), len(x)))
        return forward(transformer, x, *rest)

    monkeypatch.setattr(flux.adapter, "velocity", counted)
    running = make_algorithm(recipe)
    prompts = [Prompt("a red circle", slot) for slot in range(2)]
    groups = running.explore(flux, prompts, 0)
    rollout = [pictures for _, pictures in calls]
    calls.clear()
    values = torch.rand(1, 2, 4, generator=torch.Generator().manual_seed(0))
    scores = Scores(tuple(recipe.rewards), recipe.trained_rewards(), (1.0,), values)
    optimizer = torch.optim.SGD(flux.trainable.values(), lr=0.0, fused=True)
    assert running.update(flux, optimizer, groups, running.advantages(scores, 0)) is not None

    work, batches = recipe.workload(), Batches.of(recipe)
    assert sum(rollout) == sum(batches.calls) == 2 * work.rollout
    assert len(rollout) == batches.forwards
    assert [n for learning, n in calls if learning] == [batches.update] * (batches.updates * batches.count)
    assert [n for learning, n in calls if not learning] == [batches.update] * ((batches.updates - 1) * batches.count)
    assert 0 <= batches.count * batches.update - 2 * work.states / work.updates < batches.update + 2
    calls.clear()
    running.explore(flux, prompts, 60)
    assert sum(pictures for _, pictures in calls) == 2 * recipe.workload(60).rollout
    kept = [getattr(groups, entry.name) for entry in fields(groups) if entry.name.endswith("S")]
    kept.append(groups.conditioning.prompt_embeds)
    planned = memory(recipe, architecture=find_architecture(recipe.model.name_or_path)).phases["decode"]
    assert planned["explored groups"] == sum(tensor.nbytes for tensor in kept)


@pytest.mark.parametrize(
    "name, steps, said",
    [
        ("dance_grpo", 25, ["algorithm: dance_grpo; G 12, B 12, K 14\n", "NFE_old 25, NFE_theta 14.00\n"]),
        # The window has moved 14 times in the last of 300 iterations: 18 steps to its end, and 2 for the last 7.
        ("mix_grpo_flash", 25, ["G 12, B 12, K 4\n", "NFE_old 11 (at the end 20), NFE_theta 4.00\n"]),
        ("branch_grpo", 20, ["G 16, B 10.63, K 19\n", "in each of 34 optimizer steps", "4 of 8 states in the update"]),
    ],
)
def test_the_command_plans_every_algorithm(
    name: str, steps: int, said: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert plan_command(with_settings(with_algorithm(name, steps, {}), EIGHT_BIT), "h200-141") == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in said), shown


# -- Settling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world_size, gib, expected",
    [
        (8, 139.7, Settled("iteration", "step", 12, 6, retain="on")),
        (8, 79.1, Settled("iteration", "batch", 12, 6)),
        (8, 50.0, Settled("never", "batch", 12, 6)),
    ],
)
def test_the_fastest_that_fits_is_settled_on(world_size: int, gib: float, expected: Settled) -> None:
    asked = recipe(parallel__decode_batch=0)
    settled = fastest_that_fits(asked, DEV, int(gib * GIB), world_size)
    assert settled == expected
    assert memory(settled.within(asked), world_size).peak <= SAFE_SHARE * gib * GIB


def test_what_the_recipe_says_is_kept_whether_it_fits_or_not() -> None:
    asked = recipe(
        parallel__keep_gathered="iteration",
        parallel__reduce_gradients="step",
        parallel__rollout_batch=7,
        parallel__decode_batch=5,
        parallel__retain="off",
    )
    for gib in (10, 1000):
        assert fastest_that_fits(asked, DEV, gib * GIB, 8) == Settled("iteration", "step", 7, 5)


def test_forwards_are_retained_where_there_is_room_for_them() -> None:
    """What 16 states, 4 anchors at 4 steps, keep until a backward that computes blocks again: a block's inputs each."""
    asked = with_settings(recipe(parallel__decode_batch=1), EIGHT_BIT)
    again, retained = (memory(with_settings(asked, {"parallel.retain": each})) for each in ("off", "on"))
    tokens, blocks, h = 512 + 45 * 45, 19 + 38, 3072
    kept = 16 * blocks * tokens * h * 2
    assert kept <= retained.phases["decode"]["retained forwards"] <= kept * (blocks + 3) / blocks  # and around them
    room = math.ceil(retained.peak / SAFE_SHARE)
    assert fastest_that_fits(asked, DEV, room, 1).retain == "on"
    assert fastest_that_fits(asked, DEV, room - 2**30, 1).retain == "off"
    assert again.peak < retained.peak - kept / 2
    # The rollout's forwards of the anchors are the update's own: 96 pictures and 16 states together are 96.
    flops = [iteration_flops(with_settings(asked, {"parallel.retain": each}), DEV) for each in ("off", "on")]
    saved = flops[0].hardware - flops[1].hardware
    assert saved == flops[0].hardware_stages["forward"] == flops[0].hardware_stages["rollout"] // 6


def test_where_nothing_fits_the_least_is_settled_on() -> None:
    settled = fastest_that_fits(recipe(parallel__decode_batch=0), DEV, 10 * GIB, 8)
    assert (settled.keep_gathered, settled.reduce_gradients) == ("never", "batch")


def test_batches_are_cut_only_where_memory_is_short() -> None:
    """And into equal parts that still keep a GPU busy: two pictures of 4,608 tokens."""
    asked = recipe(prompts__per_rank=8, parallel__decode_batch=0, sampling__height=1024, sampling__width=1024)
    sizes = [fastest_that_fits(asked, DEV, gib * GIB, 8).rollout_batch for gib in (140, 60, 48, 40, 10)]
    assert sizes[0] == 96
    assert sizes[-1] < 96
    assert all(96 % size == 0 and size >= 2 for size in sizes)


# -- Plans and what follows from them ----------------------------------------------------------------------------------


def test_one_80_gb_gpu_cannot_tune_all_in_float32() -> None:
    plan = make_plan(recipe(), H100)
    assert not plan.fits
    fitting = {frozenset(remedy.settings) for remedy in remedies(plan) if remedy.plan.fits}
    assert frozenset({"parallel.offload"}) in fitting
    assert frozenset({"model.tuning", "optimizer.learning_rate"}) in fitting


@pytest.mark.parametrize(
    "name, machine, world_size, settings",
    [
        ("flux_dpmpp8", H100, 1, {}),
        ("flux_dpmpp8", MACHINES["a100-40"], 8, {"parallel.keep_gathered": "iteration", "model.ema": 0.9}),
        ("flux_dpmpp8", H200, 1, {**EIGHT_BIT, **EAGER, "parallel.update_batch": 16}),
        ("flux_lora", MACHINES["a100-40"], 2, {"parallel.sharding": "none", "prompts.per_rank": 4}),
    ],
)
def test_remedies_do_what_they_say(name: str, machine: Machine, world_size: int, settings: dict[str, Any]) -> None:
    asked = with_settings(recipe(name), settings)
    plan = make_plan(asked, machine, world_size)
    assert not plan.fits
    found = remedies(plan)
    assert found
    assert [remedy.plan.fits for remedy in found] == sorted((remedy.plan.fits for remedy in found), reverse=True)
    typed = replace(with_settings(asked, {"prompts.source": "prompts.txt"}), rewards={"mine": Reward()})
    for remedy in found:
        read = tomllib.loads(as_toml(typed))
        changed = parse(TrainCommand, read, remedy.flags.split(), prog="ngrpo train", name=name).recipe
        assert changed == with_settings(typed, remedy.settings)
        check(changed, world_size)
        again = make_plan(with_settings(asked, remedy.settings), machine, world_size)
        assert again.memory.peak == remedy.plan.memory.peak < plan.memory.peak
        assert again.fits == remedy.plan.fits


def test_several_remedies_together_where_none_is_enough() -> None:
    plan = make_plan(
        recipe(
            parallel__update_batch=0,
            train__gradient_accumulation_steps=32,
            parallel__stream="off",
            parallel__retain="off",
        ),
        H100,
    )
    best = remedies(plan)[0]
    assert best.plan.fits
    assert best.settings["parallel.update_batch"] == 4
    assert len(best.settings) > 1
    assert all(not remedy.plan.fits for remedy in remedies(plan)[1:])


def test_room_is_used_for_speed() -> None:
    plan = make_plan(with_settings(recipe(), EIGHT_BIT), H200)
    faster = speedups(plan)
    assert [next(iter(each.settings)) for each in faster] == [
        "parallel.rollout_dtype",
        "model.gradient_checkpointing",
    ]
    assert all(each.plan.fits and each.time < 1 for each in faster)
    assert "parallel.rollout_dtype" not in str(speedups(make_plan(recipe(), MACHINES["a100-80"], 8)))


def test_out_of_memory_is_explained() -> None:
    said = explain_out_of_memory(recipe(), DEV, 80 * GIB)
    assert "the fullest phase is the update, with 19" in said
    assert "44.3 GiB  trained weights" in said
    assert "What helps most: --parallel.offload True" in said or "--model.tuning lora" in said
    roomy = explain_out_of_memory(with_settings(recipe(), EIGHT_BIT), DEV, H200, 1)
    assert "What helps most: --" in roomy


def test_the_command_says_whether_it_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert plan_command(recipe(), "h100-80", 16) == 0
    shown = capsys.readouterr().out
    assert "full fine-tune, 720 x 720: 8 x h100-80 on each of 2 nodes" in shown
    assert "iteration: 16 prompts, 1 on each GPU; NFE_old 8, NFE_theta 1.33" in shown
    assert "weights: sharded over 16 GPUs, gathered once for an iteration" in shown
    assert "It fits: " in shown
    assert plan_command(recipe(), "h100-80") == 1
    shown = capsys.readouterr().out
    assert "It does not fit: 19" in shown
    assert "--parallel.offload True" in shown
    assert plan_command(recipe("shapes_cpu", parallel__compile="off"), "a100-40") == 0
    assert "seconds: not known for this GPU or dtype" in capsys.readouterr().out


def test_the_command_refuses_what_cannot_train() -> None:
    with pytest.raises(ValueError, match=r"no GPU 'h10': .*did you mean"):
        plan_command(recipe(), "h10")
    with pytest.raises(ValueError, match=r"--gpus 0 .*positive"):
        plan_command(recipe(), "h100-80", 0)
    with pytest.raises(ValueError, match=r"parallel\.master_dtype"):
        plan_command(recipe(parallel__master_dtype="bfloat16"), "h100-80")
    with pytest.raises(ValueError, match=r"model\.name_or_path"):
        plan_command(recipe(model__name_or_path="somebody/unknown"), "h100-80")
