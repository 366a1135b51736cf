"""A model of the user's own, named in a recipe: a flow of a few numbers, without diffusers, trained by the commands."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ngrpo_train.models.model import Conditioning, FlowModel, load_adapter
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Model, Parallel, Sampling

TOKENS, CHANNELS, SIZE = 4, 3, 8  # a token is a square of 4 by 4 pixels of one colour
Command = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Colours:
    """What this model takes for text: which colours a prompt names, [P, 3]."""

    named: Tensor

    def rows(self, index: Tensor) -> "Colours":
        return Colours(self.named[index])

    @staticmethod
    def cat(parts: Sequence["Colours"]) -> "Colours":
        return Colours(torch.cat([part.named for part in parts]))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * CHANNELS + 1, 16)
        self.out = nn.Linear(16, CHANNELS)

    def forward(self, x: Tensor, sigma: Tensor, named: Tensor) -> Tensor:
        seen = torch.cat([x, named[:, None].expand_as(x), sigma[:, None, None].expand(*x.shape[:2], 1)], -1)
        return x + self.out(torch.tanh(self.mix(seen)))


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, sigma: Tensor, named: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, sigma, named)
        return x


class Squares:
    """An adapter: `name_or_path` is a file of weights, or "new"."""

    latent_shape = (TOKENS, CHANNELS)
    lora_targets = ("mix", "out")
    kind = None
    pictures = ()

    def __init__(
        self, spec: Model, sampling: Sampling, settings: Parallel, device: torch.device, *, embeddings: str = ""
    ) -> None:
        if (sampling.height, sampling.width) != (SIZE, SIZE):
            raise ValueError(
                f"sampling.height = {sampling.height} must be {SIZE}, and so must width: these are squares"
            )
        self.spec, self.dtype, self.device = spec, getattr(torch, settings.compute_dtype), device

    def empty_transformer(self) -> nn.Module:
        with torch.device("meta"):
            return Field()

    def blocks(self, transformer: nn.Module) -> dict[str, nn.Module]:
        return {f"layer {index}": layer for index, layer in enumerate(transformer.layers)}

    @torch.no_grad()
    def fill(self, weights: Mapping[str, Tensor]) -> None:
        stored = load_file(self.spec.name_or_path) if self.spec.name_or_path != "new" else {}
        for name, weight in weights.items():
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) / 4
            weight.copy_(stored.get(name, drawn))

    def velocity(self, transformer: nn.Module, x_NS: Tensor, sigma_N: Tensor, conditioning: Colours) -> Tensor:
        return transformer(x_NS.to(self.dtype), sigma_N.to(self.dtype), conditioning.named.to(self.dtype))

    def encode(self, prompts: Sequence[Prompt]) -> Colours:
        colours = [[float(name in prompt.text) for name in ("red", "green", "blue")] for prompt in prompts]
        return Colours(torch.tensor(colours, device=self.device))

    def decode(self, latents_NS: Tensor) -> Tensor:
        levels = ((latents_NS.float() / 4 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        squares = levels.mT.unflatten(2, (2, 2))
        return squares.repeat_interleave(SIZE // 2, 2).repeat_interleave(SIZE // 2, 3)

    def beside(self, spec: Model) -> "Squares":
        return Squares(
            spec, Sampling(height=SIZE, width=SIZE), Parallel(compute_dtype=str(self.dtype)[6:]), self.device
        )

    def save(self, directory: Path, transformer: nn.Module, trained: Mapping[str, Tensor]) -> None:
        save_file(dict(trained), directory / "squares.safetensors")


@pytest.fixture
def own(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a recipe that trains such a model; this very module is the one that it names."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    flags = {
        "model.name-or-path": "new",
        "model.adapter": "test_adapter:Squares",
        "sampling.height": SIZE,
        "sampling.width": SIZE,
        "checkpoint.every": 1,
        "checkpoint.keep": 9,
        "log.export": True,
        "optimizer.learning-rate": 0.05,
    }
    return [str(tiny_recipe), *(f"--{name}={value}" for name, value in flags.items())]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_figures(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    unlike = ("time/", "memory/")
    names = {name for name in {*first, *second} if not name.startswith(unlike)}
    return all(first[name] == second[name] for name in names)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_it_trains_resumes_and_draws(ngrpo: Command, own: list[str], tuning: str) -> None:
    own = [*own, f"--model.tuning={tuning}"]
    code, out, err = ngrpo("train", *own)
    assert code == 0, err
    assert "neighbor on new: 0.0 M trainable parameters" in out
    straight = Path("runs/tiny")
    trained = load_file(straight / "export" / "squares.safetensors")
    if tuning == "full":
        first = Field()
        squares = Squares(Model(name_or_path="new"), Sampling(height=SIZE, width=SIZE), Parallel(), torch.device("cpu"))
        squares.fill(dict(first.named_parameters()))
        assert trained.keys() == first.state_dict().keys()
        assert all(not torch.equal(trained[name], value) for name, value in first.state_dict().items())
    assert [line["step"] for line in lines(straight)] == [0, 1]
    assert lines(straight)[0]["policy/ratio_mean"] == pytest.approx(1, abs=1e-6)

    # From the first checkpoint on, elsewhere: the second iteration again, to the bit.
    code, _, err = ngrpo("train", *own, f"--resume={straight}/checkpoints/step_000001", "--log.output-dir=again")
    assert code == 0, err
    again = next(Path("again").rglob("squares.safetensors"))
    resumed = load_file(again)
    assert all(torch.equal(resumed[name], value) for name, value in trained.items())
    assert same_figures(lines(again.parents[1])[-1], lines(straight)[-1])

    code, out, err = ngrpo("sample", straight, "--prompt", "a red circle", "--out", "pictures")
    assert code == 0, err
    assert list(Path("pictures").glob("*.png"))


def test_an_own_model_beside_its_base(own: list[str]) -> None:
    """LoRA off is the base; another of the family draws beside it with this one's text."""
    spec = Model(name_or_path="new", adapter="test_adapter:Squares", tuning="lora", lora_rank=2, lora_alpha=2)
    sections = Sampling(height=SIZE, width=SIZE), Parallel(device="cpu", compute_dtype="float32")
    model = FlowModel(spec, *sections, torch.device("cpu"))
    x, sigma = torch.randn(2, *model.latent_shape), torch.full((2,), 0.5)
    text: Conditioning = model.encode(["a red circle", "a blue square"])
    before = model.sampling_velocity(x, sigma, text)
    with torch.no_grad():
        for parameter in model.trainable.values():
            parameter.add_(0.1)
    assert not torch.equal(model.sampling_velocity(x, sigma, text), before)
    with model.base_model():
        assert torch.equal(model.sampling_velocity(x, sigma, text), before)
    assert torch.equal(model.beside(spec).sampling_velocity(x, sigma, text), before)
    assert {name.split(".lora_")[0] for name in model.trainable} == {
        f"layers.{index}.{linear}" for index in range(2) for linear in ("mix", "out")
    }


def test_its_own_refusal_is_the_commands(ngrpo: Command, own: list[str]) -> None:
    refusal = "sampling.height = 12 must be 8, and so must width: these are squares"
    code, _, err = ngrpo("train", *own, "--sampling.height=12")
    assert (code, err) == (2, f"ngrpo train: model.adapter = 'test_adapter:Squares': {refusal}\n")


@pytest.mark.parametrize(
    "name, reason",
    [
        ("nowhere", ' must be "auto" or "package.module:Name"'),
        ("ngrpo_train.models.flux", ' must be "auto" or "package.module:Name"'),
        (":", ' must be "auto" or "package.module:Name"'),
        ("nowhere:Model", ": No module named 'nowhere': install it, or add its directory to PYTHONPATH"),
        ("ngrpo_train.models.flux:Nothing", ": module 'ngrpo_train.models.flux' has no attribute 'Nothing'"),
    ],
)
def test_an_adapter_that_is_not_there(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'model.adapter = {name!r}{reason}')}$"):
        load_adapter(Model(adapter=name), Sampling(), Parallel(), torch.device("cpu"))


@pytest.mark.parametrize("command", [["plan"], ["embed", "--out=text"]])
def test_what_knows_flux_alone_says_so(ngrpo: Command, own: list[str], command: list[str]) -> None:
    name, *flags = command
    code, _, err = ngrpo(name, *own, *flags)
    assert code == 2
    assert err.startswith(f"ngrpo {name}: model.adapter = 'test_adapter:Squares'")


def test_attention_of_diffusers_is_not_for_it(own: list[str]) -> None:
    sections = Sampling(height=SIZE, width=SIZE), Parallel(device="cpu", attention="flash", compute_dtype="float32")
    with pytest.raises(ValueError, match=r"^parallel\.attention = 'flash' is for models of diffusers"):
        FlowModel(Model(name_or_path="new", adapter="test_adapter:Squares"), *sections, torch.device("cpu"))
