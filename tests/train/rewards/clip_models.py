"""Tiny CLIPs with random weights as open_clip saves them, and open_clip's forward pass, written out, in float64."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ngrpo_train.shapes.pipeline import clip_tokenizer

SIZE, PATCH, LENGTH, EMBED = 12, 4, 16, 24
VISION_WIDTH, VISION_HEAD = 160, 80
TEXT_WIDTH, TEXT_HEAD = 128, 64
LAYERS = 2

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None, None]

PROMPTS = ["a large red circle on a blue background", "", "a dog", "a star on " * 20, "un café 🐈", "a dog"]


def pictures(height: int = SIZE, width: int = SIZE, count: int = len(PROMPTS)) -> Tensor:
    """Uint8, with edges as sharp as they come."""
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def tokenizer_directory(directory: Path) -> str:
    clip_tokenizer().save_pretrained(directory)
    return str(directory)


def open_clip_state(seed: int = 0) -> dict[str, Tensor]:
    """Weights by open_clip's names, large enough for every one of them to move the score."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return std * torch.randn(shape, generator=generator)

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + normal(width, std=0.2), f"{name}.bias": normal(width, std=0.2)}

    def tower(prefix: str, width: int) -> dict[str, Tensor]:
        state = {}
        for layer in range(LAYERS):
            block = f"{prefix}transformer.resblocks.{layer}."
            state |= norm(block + "ln_1", width) | norm(block + "ln_2", width)
            for name, rows, columns in [
                ("attn.in_proj_", 3 * width, width),
                ("attn.out_proj.", width, width),
                ("mlp.c_fc.", 4 * width, width),
                ("mlp.c_proj.", width, 4 * width),
            ]:
                state[f"{block}{name}weight"] = normal(rows, columns, std=1.5 * columns**-0.5)
                state[f"{block}{name}bias"] = normal(rows, std=0.2)
        return state

    vocabulary, positions = len(clip_tokenizer()), (SIZE // PATCH) ** 2 + 1
    return {
        "logit_scale": torch.tensor(3.3),
        "text_projection": normal(TEXT_WIDTH, EMBED, std=0.2),
        "token_embedding.weight": normal(vocabulary, TEXT_WIDTH, std=1.0),
        "positional_embedding": normal(LENGTH, TEXT_WIDTH, std=0.5),
        **tower("", TEXT_WIDTH),
        **norm("ln_final", TEXT_WIDTH),
        "visual.proj": normal(VISION_WIDTH, EMBED, std=0.2),
        "visual.class_embedding": normal(VISION_WIDTH, std=0.5),
        "visual.positional_embedding": normal(positions, VISION_WIDTH, std=0.5),
        "visual.conv1.weight": normal(VISION_WIDTH, 3, PATCH, PATCH, std=0.2),
        **norm("visual.ln_pre", VISION_WIDTH),
        **tower("visual.", VISION_WIDTH),
        **norm("visual.ln_post", VISION_WIDTH),
    }


def open_clip_config(**changes: object) -> dict[str, object]:
    """open_clip_config.json of these models; `changes` are of its preprocess_cfg."""
    return {
        "model_cfg": {
            "embed_dim": EMBED,
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": SIZE,
                "layers": LAYERS,
                "width": VISION_WIDTH,
                "head_width": VISION_HEAD,
                "patch_size": PATCH,
            },
            "text_cfg": {
                "context_length": LENGTH,
                "vocab_size": len(clip_tokenizer()),
                "width": TEXT_WIDTH,
                "heads": TEXT_WIDTH // TEXT_HEAD,
                "layers": LAYERS,
            },
        },
        "preprocess_cfg": {
            "mean": MEAN.flatten().tolist(),
            "std": STD.flatten().tolist(),
            "interpolation": "bicubic",
            "resize_mode": "squash",
            **changes,
        },
    }


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


class OpenClip:
    """The forward pass."""

    def __init__(self, state: dict[str, Tensor], *, quick_gelu: bool = False) -> None:
        self.state = {name: value.double() for name, value in state.items()}
        self.quick_gelu = quick_gelu

    def images(self, pixels: Tensor) -> Tensor:
        """Unit vectors of pixels [N, 3, SIZE, SIZE] in [0, 1]."""
        s = self.state
        patches = functional.unfold((pixels.double() - MEAN) / STD, PATCH, stride=PATCH)  # [N, 3 * PATCH**2, patches]
        x = (s["visual.conv1.weight"].flatten(1) @ patches).transpose(1, 2)
        first = s["visual.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + s["visual.positional_embedding"]
        x = self._transformer("visual.", self._norm("visual.ln_pre", x), VISION_HEAD, causal=False)
        return functional.normalize(self._norm("visual.ln_post", x[:, 0]) @ s["visual.proj"], dim=-1)

    def texts(self, ids: Tensor) -> Tensor:
        """Unit vectors of ids [M, LENGTH], the end of text being the highest of a row."""
        s = self.state
        x = s["token_embedding.weight"][ids] + s["positional_embedding"]
        x = self._norm("ln_final", self._transformer("", x, TEXT_HEAD, causal=True))
        return functional.normalize(x[torch.arange(len(ids)), ids.argmax(-1)] @ s["text_projection"], dim=-1)

    def scores(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return (self.images(pixels) * self.texts(padded_ids(prompts))).sum(-1)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}weight"].T + self.state[f"{name}bias"]

    def _transformer(self, prefix: str, x: Tensor, head: int, *, causal: bool) -> Tensor:
        mask = torch.full((x.shape[1],) * 2, float("-inf" if causal else 0), dtype=x.dtype).triu(1)
        for layer in range(LAYERS):
            block = f"{prefix}transformer.resblocks.{layer}."
            heads = self._linear(block + "attn.in_proj_", self._norm(block + "ln_1", x))
            q, k, v = (part.unflatten(-1, (-1, head)).transpose(1, 2) for part in heads.chunk(3, dim=-1))
            attended = (q @ k.transpose(-1, -2) * head**-0.5 + mask).softmax(-1) @ v
            x = x + self._linear(block + "attn.out_proj.", attended.transpose(1, 2).flatten(2))
            hidden = self._linear(block + "mlp.c_fc.", self._norm(block + "ln_2", x))
            gate = (1.702 * hidden).sigmoid() if self.quick_gelu else 0.5 * (1 + torch.erf(hidden * 0.5**0.5))
            x = x + self._linear(block + "mlp.c_proj.", hidden * gate)
        return x


def padded_ids(prompts: list[str]) -> Tensor:
    """As open_clip: cut to LENGTH with the end of text last, filled up with 0."""
    tokenizer = clip_tokenizer()
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        ids = ids if len(ids) <= LENGTH else [*ids[: LENGTH - 1], tokenizer.eos_token_id]
        rows.append(ids + [0] * (LENGTH - len(ids)))
    return torch.tensor(rows)
