"""Weights arrive exactly, in every dtype and layout; models that cannot be loaded are refused in one line; what leaves.

The truth is diffusers': its own loader, its own transformer cast as it casts, and peft's own initialisation.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ngrpo_train.models import loading, sizes
from ngrpo_train.models.embed import embed_command
from ngrpo_train.models.export import export
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.recipe.sections import Model, Parallel, Recipe, Sampling
from ngrpo_train.run.trainer import Trainer

from ...tiny import PROMPTS, SIZE

WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")
TOKENS = 4
PARTS = ("vae", "text_encoder", "text_encoder_2")

# (tuning, what trained weights are kept in, what is computed in): plain modules, FSDP on a mesh of one, LoRA.
ARITHMETIC = [
    ("full", "float32", "float32"),
    ("full", "float32", "bfloat16"),
    ("full", "bfloat16", "bfloat16"),
    ("lora", "float32", "float32"),
    ("lora", "float32", "bfloat16"),
]


@pytest.fixture(scope="module")
def sharded_files(tiny_dev: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """`tiny_dev` with its transformer in several files and an index, as FLUX.1's is."""
    directory = tmp_path_factory.mktemp("sharded") / "model"
    stock(tiny_dev).save_pretrained(directory, max_shard_size="60KB")
    assert (directory / WEIGHTS).with_suffix(".safetensors.index.json").exists()
    assert len(list((directory / "transformer").glob("*.safetensors"))) > 2
    return str(directory)


@pytest.fixture
def broken(tiny_dev: str, tmp_path: Path) -> Path:
    """A copy of `tiny_dev` to break."""
    shutil.copytree(tiny_dev, tmp_path / "model")
    return tmp_path / "model"


def stock(directory: str | Path) -> Any:
    return FluxPipeline.from_pretrained(directory, local_files_only=True)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Whole, by the names that files have."""
    return {name.replace(".base_layer.", "."): processes.whole(p.detach()) for name, p in module.named_parameters()}


@torch.no_grad()
def velocities(flux: FlowModel, transformer: nn.Module) -> Tensor:
    """Velocities of PROMPTS at four times."""
    x = torch.randn(len(PROMPTS), TOKENS, 64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1.0, 0.9545, 0.6, 0.1])
    return flux.adapter.velocity(transformer, x, sigma, flux.encode(PROMPTS))


# --- what arrives


@pytest.mark.parametrize(
    "files, tuning, master, compute",
    [*(("tiny_dev", *each) for each in ARITHMETIC), *(("sharded_files", *ARITHMETIC[i]) for i in (1, 3))],
)
def test_weights_and_velocities_are_diffusers_own(
    request: pytest.FixtureRequest,
    load_flux: Callable[..., FlowModel],
    files: str,
    tuning: str,
    master: str,
    compute: str,
) -> None:
    """To the bit: nothing is rounded that diffusers does not round, the rotary embeddings least of all."""
    directory = request.getfixturevalue(files)
    flux = load_flux(directory, tuning=tuning, master_dtype=master, compute_dtype=compute)
    transformer = stock(directory).transformer
    kept = getattr(torch, master if tuning == "full" else compute)
    ours = weights_of(flux.transformer)
    for name, value in transformer.named_parameters():
        assert ours[name].dtype == kept
        assert torch.equal(ours[name], value.to(kept)), name
    theirs = transformer.to(getattr(torch, compute))
    ours_of = velocities(flux, flux.transformer)
    assert ours_of.dtype == getattr(torch, compute)
    assert torch.equal(ours_of, velocities(flux, theirs))
    assert ours_of.float().std() > 0.1


def test_frozen_parts_are_diffusers_own(tiny_dev: str, load_flux: Callable[..., FlowModel]) -> None:
    flux, pipeline = load_flux(tiny_dev), stock(tiny_dev)
    for part in PARTS:
        theirs = dict(getattr(pipeline, part).named_parameters())
        for name, value in getattr(flux.adapter.pipeline, part).named_parameters():
            assert torch.equal(value, theirs[name])
            assert not value.requires_grad


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_adapters_begin_as_pefts_gaussian(tiny_dev: str, load_flux: Callable[..., FlowModel], compute: str) -> None:
    """In float32, whatever the base computes in: the steps of training are smaller than bfloat16's last digit."""
    flux = load_flux(tiny_dev, tuning="lora", lora_rank=8, compute_dtype=compute)
    theirs = stock(tiny_dev).transformer
    theirs.add_adapter(LoraConfig(r=8, init_lora_weights="gaussian", target_modules=sizes.LORA_TARGETS))
    expected = {name: p for name, p in theirs.named_parameters() if ".lora_" in name}
    assert flux.trainable.keys() == expected.keys()
    assert {p.dtype for p in flux.trainable.values()} == {torch.float32}
    ours = {name: processes.local(p).detach() for name, p in flux.trainable.items()}
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in expected.items()}
    down, theirs_down = (
        torch.cat([p.detach().flatten() for name, p in each.items() if "lora_A" in name]) for each in (ours, expected)
    )
    assert down.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert theirs_down.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert all(not p.any() for name, p in ours.items() if "lora_B" in name)
    first, second = (p for name, p in ours.items() if "to_q.lora_A" in name and "single" in name)
    assert not torch.equal(first, second), "every layer has draws of its own"


def test_adapters_are_a_function_of_the_seed(tiny_dev: str) -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(drawn))
        sections = Model(name_or_path=tiny_dev, tuning="lora", lora_rank=4), Sampling(height=SIZE, width=SIZE)
        settings = Parallel(device="cpu", compute_dtype="float32")
        flux = FlowModel(*sections, settings, torch.device("cpu"), seed=seed)
        drawn.append(torch.cat([p.detach().flatten() for p in flux.trainable.values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_random_draws_of_others_are_left_alone(tiny_dev: str, load_flux: Callable[..., FlowModel]) -> None:
    torch.manual_seed(3)
    load_flux(tiny_dev)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


# --- models that cannot be loaded


def change(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(directory / WEIGHTS)
    edit(weights)
    save_file(weights, directory / WEIGHTS)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda d: change(d, lambda w: w.pop("proj_out.weight")),
        "lacks the weight proj_out.weight in its transformer directory",
    ),
    "unexpected": (
        lambda d: change(d, lambda w: w.update(surplus=torch.zeros(3))),
        "has, unlike its config, the weight surplus in its transformer directory",
    ),
    "misshapen": (
        lambda d: change(d, lambda w: w.update({"proj_out.weight": torch.zeros(3, 5)})),
        "has proj_out.weight of shape [3, 5]; its config says [64, 32]",
    ),
    "twice": (
        lambda d: shutil.copy(d / WEIGHTS, (d / WEIGHTS).with_suffix(".fp16.safetensors")),
        "has the weight time_text_embed.timestep_embedder.linear_1.weight in more than one file of its transfor",
    ),
    "none": (lambda d: (d / WEIGHTS).unlink(), "has no *.safetensors in its transformer directory"),
    "cut short": (lambda d: cut(d / WEIGHTS), "cannot be loaded: Error while deserializing header"),
    "no weights at all": (lambda d: (d / WEIGHTS).write_bytes(b"<html>"), "cannot be loaded: Error while deserializ"),
    "text encoder cut short": (lambda d: cut(d / "text_encoder_2" / "model.safetensors"), "cannot be loaded: "),
    "config": (lambda d: (d / "transformer" / "config.json").write_text("{"), "cannot be loaded: "),
    "tokenizer": (lambda d: shutil.rmtree(d / "tokenizer_2"), "has no tokenizer_2, which its model_index.json names"),
    "vocabulary": (
        lambda d: [path.unlink() for path in (d / "tokenizer_2").iterdir() if "config" not in path.name],
        "has no vocabulary in its tokenizer_2",
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_what_cannot_be_loaded_is_refused_in_one_line(
    broken: Path, load_flux: Callable[..., FlowModel], case: str
) -> None:
    break_it, message = BREAKS[case]
    break_it(broken)
    with pytest.raises(ValueError, match=re.escape(f"model.name_or_path = '{broken}' {message}")) as raised:
        load_flux(str(broken))
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("model.name_or_path = ")


def test_a_config_without_a_class_is_taken_for_flux(broken: Path, load_flux: Callable[..., FlowModel]) -> None:
    """As `ngrpo plan` does, which reads the same file."""
    path = broken / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config["_class_name"]
    path.write_text(json.dumps(config))
    assert load_flux(str(broken)).transformer.config.num_layers == 1


def test_the_command_says_it_too(ngrpo: Callable[..., tuple[int, str, str]], tiny_recipe: Path, broken: Path) -> None:
    cut(broken / WEIGHTS)
    code, _, err = ngrpo("train", tiny_recipe, f"--model.name-or-path={broken}")
    assert code == 2
    assert err.startswith(f"ngrpo train: model.name_or_path = '{broken}' cannot be loaded: ")
    assert err.count("\n") == 1


# --- random weights


@pytest.fixture
def shrunken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The known architectures, small, under their own names."""
    small = {}
    for name, known in ((name, sizes.KNOWN[name]) for name in ("flux-dev", "flux-schnell")):
        transformer = {
            "num_layers": 2,
            "num_single_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 48,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        }
        clip = {"hidden_size": 32, "intermediate_size": 32, "projection_dim": 32, "num_hidden_layers": 1}
        t5 = {"d_model": 48, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2}
        small[name] = (
            known.changed("transformer", **transformer)
            .changed("vae", block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4)
            .changed("text_encoder", **clip, num_attention_heads=2)
            .changed("text_encoder_2", **t5)
        )
    monkeypatch.setattr(sizes, "KNOWN", small)
    sizes._random.cache_clear()
    yield
    sizes._random.cache_clear()


@pytest.mark.parametrize(
    "name, tuning, master, compute",
    [
        ("random:flux-dev", *ARITHMETIC[1]),
        ("random:flux-dev", *ARITHMETIC[4]),
        ("random:flux-schnell", *ARITHMETIC[2]),
    ],
)
def test_random_weights_keep_activations_sane(
    shrunken: None, load_flux: Callable[..., FlowModel], name: str, tuning: str, master: str, compute: str
) -> None:
    flux = load_flux(name, tuning=tuning, master_dtype=master, compute_dtype=compute, max_sequence_length=24)
    base = {p.dtype for n, p in flux.transformer.named_parameters() if ".lora_" not in n}
    assert base == {getattr(torch, master if tuning == "full" else compute)}
    assert {p.dtype for part in PARTS for p in getattr(flux.adapter.pipeline, part).parameters()} == {torch.float32}
    assert bool(flux.transformer.config.guidance_embeds) is (name == "random:flux-dev")
    assert all(
        processes.local(p).detach().float().isfinite().all() for p in flux.transformer.parameters()
    )  # memory is poisoned in tests: each of them was written
    found = velocities(flux, flux.transformer)
    assert found.dtype == getattr(torch, compute)
    assert 0.05 < found.float().std() < 20
    assert not torch.equal(found[0], found[1])
    pictures = flux.decode(found.float())
    assert pictures.float().std() > 1


def test_random_weights_are_the_same_each_time(shrunken: None, load_flux: Callable[..., FlowModel]) -> None:
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(weights_of(load_flux("random:flux-dev").transformer))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    first, second = (made[0][f"transformer_blocks.{i}.attn.to_q.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    # Of a matrix [out, in], entries of variance 1 / in; norms and biases as they begin.
    assert first.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert (made[0]["transformer_blocks.0.attn.norm_q.weight"] == 1).all()
    assert (made[0]["transformer_blocks.0.attn.to_q.bias"] == 0).all()


def test_random_weights_without_text_encoders(
    shrunken: None, load_flux: Callable[..., FlowModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = loading.load_parts("random:flux-dev", None, torch.device("cpu"), torch.bfloat16, text=False)
    assert parts.text_encoder is parts.text_encoder_2 is parts.tokenizer is None
    empty = loading.empty_transformer("random:flux-dev", None)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {p.dtype for p in parts.vae.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "name, answer", [("random:flux-dv", "did you mean random:flux-dev?"), ("random:", "there are random:flux-dev")]
)
def test_an_unknown_random_model_is_answered(load_flux: Callable[..., FlowModel], name: str, answer: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.name_or_path = '{name}': there are random:flux-dev, ") as raised:
        load_flux(name)
    assert answer in str(raised.value)


# --- downloads


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("rank, order", [("0", ["work", "barrier"]), ("1", ["barrier", "work"])])
def test_a_nodes_first_process_goes_first(
    monkeypatch: pytest.MonkeyPatch, rank: str, order: list[str], fails: bool
) -> None:
    """And the others do not wait for ever where it fails."""
    seen: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(processes, "barrier", lambda: seen.append("barrier"))
    with pytest.raises(OSError, match="no network") if fails else nullcontext(), processes.node_leader_first():
        seen.append("work")
        if fails:
            raise OSError("no network")
    assert seen == order


def test_a_model_is_downloaded_once_and_without_the_parts_nobody_reads(
    tiny_dev: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(loading, "pipeline_class_name", lambda name: "FluxPipeline")
    monkeypatch.setattr(FluxPipeline, "download", lambda name, **options: asked.append((name, options)) or tiny_dev)
    loading._downloaded.cache_clear()
    for _ in range(2):
        assert loading.find_directory("some/model", sizes.TEXT_PARTS) == Path(tiny_dev)
    loading._downloaded.cache_clear()
    assert asked == [("some/model", dict.fromkeys(sizes.TEXT_PARTS))]


# --- what leaves


@pytest.mark.parametrize("master, compute", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_an_export_is_the_trained_weights_and_the_frozen_parts(
    sharded_files: str, load_flux: Callable[..., FlowModel], tmp_path: Path, master: str, compute: str
) -> None:
    flux = load_flux(sharded_files, master_dtype=master, compute_dtype=compute)
    with torch.no_grad():
        for parameter in flux.trainable.values():
            processes.local(parameter).add_(0.25)
    export(flux, tmp_path / "export")
    before, after = stock(sharded_files), FluxPipeline.from_pretrained(tmp_path / "export", local_files_only=True)
    for name, value in after.transformer.named_parameters():
        trained = (dict(before.transformer.named_parameters())[name].to(getattr(torch, master)) + 0.25).detach()
        assert torch.equal(value.float(), trained.to(getattr(torch, compute)).float()), name
    for part in PARTS:
        theirs = dict(getattr(before, part).named_parameters())
        assert all(torch.equal(p, theirs[name]) for name, p in getattr(after, part).named_parameters())
    assert before.scheduler.config == after.scheduler.config
    for part in ("tokenizer", "tokenizer_2"):
        assert getattr(after, part)(PROMPTS).input_ids == getattr(before, part)(PROMPTS).input_ids
    files = {path.relative_to(tmp_path / "export") for path in (tmp_path / "export").rglob("*") if path.is_file()}
    kept = {path.relative_to(sharded_files) for path in Path(sharded_files).rglob("*") if path.is_file()}
    assert {path for path in files ^ kept if path.parts[0] != "transformer"} == set()


@pytest.mark.parametrize("at_hand", [True, False], ids=["text encoders at hand", "only their embeddings"])
def test_an_export_of_a_run_on_embeddings(
    tiny_dev: str,
    load_flux: Callable[..., FlowModel],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    at_hand: bool,
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    model = tmp_path / "model"
    shutil.copytree(tiny_dev, model)
    recipe = Recipe(model=Model(name_or_path=str(model)))
    recipe = replace(
        recipe,
        prompts=replace(recipe.prompts, source=str(tmp_path / "prompts.txt"), embeddings=str(tmp_path / "embedded")),
        sampling=replace(recipe.sampling, height=SIZE, width=SIZE, max_sequence_length=16),
        parallel=replace(recipe.parallel, device="cpu", compute_dtype="float32"),
    )
    assert embed_command(recipe, tmp_path / "embedded", batch=4) == 0
    if not at_hand:
        for part in sizes.TEXT_PARTS:
            shutil.rmtree(model / part)
    trainer = Trainer.make(recipe, recipe.parallel, cursor=None, rewards=None, device=torch.device("cpu"), stage=None)
    export(trainer.model, tmp_path / "export")
    assert ("lacks ['text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2']" in caplog.text) is not at_hand
    absent = {} if at_hand else dict.fromkeys(sizes.TEXT_PARTS)  # which diffusers asks for by name
    pipeline = FluxPipeline.from_pretrained(tmp_path / "export", local_files_only=True, **absent)
    flux = load_flux(tiny_dev)
    assert torch.equal(velocities(flux, pipeline.transformer), velocities(flux, stock(tiny_dev).transformer))
    for part in sizes.TEXT_PARTS:
        assert (getattr(pipeline, part) is None) is not at_hand


def test_random_weights_export_what_was_trained(
    shrunken: None, load_flux: Callable[..., FlowModel], tmp_path: Path
) -> None:
    flux = load_flux("random:flux-dev")
    export(flux, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["transformer", "vae"]
    stored = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(stored[name], value) for name, value in weights_of(flux.transformer).items())
