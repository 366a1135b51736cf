"""Qwen2-VL as the body of a reward model: a picture and the text after it become states, one for each token.

Rotary frequencies and positions are those of models that were tuned as HPSv3 was, which are not Qwen2-VL's own: see
`Qwen2VL`.
"""

# N pictures, T patches of a picture, S tokens of a picture, one for 2 x 2 patches, L tokens of text, D width of states.

from __future__ import annotations

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2VLConfig, Qwen2VLModel

from ngrpo_train.rewards.weights import find_file, mismatch, read_json

FILES = ("config.json", "tokenizer.json")
"""The files of a Qwen2-VL that are read, beside its weights."""

_VISION_THETA = 10000.0
_NARROWEST = 200  # times as long as wide, or as wide as long


def read_config(path: str, vocabulary: int) -> Qwen2VLConfig:
    """The configuration of the Qwen2-VL at `path`, a directory or hub id, but with `vocabulary` tokens.

    Raises ValueError where it cannot be found, or is another model's.
    """
    file = find_file(path, FILES[0], fetch=FILES)
    fields = read_json(file)
    if fields.get("model_type") != "qwen2_vl":
        raise mismatch(file, 'model_type "qwen2_vl"', repr(fields.get("model_type")))
    try:
        config = Qwen2VLConfig.from_dict(fields)
    except Exception as error:  # of many types, a different one for each field
        raise ValueError(f"{file} is no configuration of a Qwen2-VL: {str(error).splitlines()[0]:.200}") from error
    config.text_config.vocab_size = vocabulary
    return config


def read_tokenizer(path: str, added: str, vocabulary: int) -> Tokenizer:
    """The tokenizer of the Qwen2-VL at `path`, with the token `added`, which makes it `vocabulary` tokens.

    Raises ValueError where it cannot be found, or has another number of tokens.
    """
    file = find_file(path, FILES[1], fetch=FILES)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more particular
        raise ValueError(f"{file} is no tokenizer: {str(error).splitlines()[0]:.200}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([added])
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(
            f"{file} has {tokenizer.get_vocab_size()} tokens with {added}, and the weights have embeddings for "
            f"{vocabulary}: set processor to the model's own"
        )
    return tokenizer


def beside(file: Path, official: str) -> str:
    """The directory of a weights file if it has a tokenizer and a configuration, else `official`."""
    return str(file.parent) if all((file.parent / name).is_file() for name in FILES) else official


def picture_size(height: int, width: int, pixels: int, step: int) -> tuple[int, int]:
    """Height and width to which Qwen2-VL resizes a picture of `height` x `width`: multiples of `step`.

    They keep the aspect ratio nearly, and have `pixels` pixels: fewer if the picture has more, more if it has fewer.
    Raises ValueError for a picture more than 200 times as long as wide.
    """
    if max(height, width) > _NARROWEST * min(height, width):
        raise ValueError(f"a picture of {width}x{height} is more than {_NARROWEST} times as long as wide")
    # The same operations in the same order as in Qwen's code: 448.0 must not become 447.99 here and 448 there.
    rounded = [max(step, round(edge / step) * step) for edge in (height, width)]
    if math.prod(rounded) > pixels:
        shrink = math.sqrt((height * width) / pixels)
        rounded = [math.floor(edge / shrink / step) * step for edge in (height, width)]
    elif math.prod(rounded) < pixels:
        grow = math.sqrt(pixels / (height * width))
        rounded = [math.ceil(edge * grow / step) * step for edge in (height, width)]
    return rounded[0], rounded[1]


class Qwen2VL(nn.Module):
    """Qwen2-VL's vision tower, and its language model without the layer that predicts words.

    It differs from Qwen2-VL's own forward pass as a model of HPSv3's authors does, in training and in use. All tokens
    have positions one after the other, also those of a picture, where Qwen2-VL has rows and columns. And the rotary
    frequencies are rounded to bfloat16, because the whole model was cast to it. The vision tower's angles are too.
    """

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        both = Qwen2VLModel(config)
        self.visual, self.text, self.vision = both.visual, both.language_model, config.vision_config
        del self.visual.rotary_pos_emb  # `see` has angles of its own

    @property
    def step(self) -> int:
        """The edges of pictures are multiples of this number of pixels, so that 2 x 2 patches become a token."""
        return self.vision.patch_size * self.vision.spatial_merge_size

    def restore_frequencies(self) -> None:
        """Compute what no file holds, for a model that was made on "meta": the rotary frequencies of text."""
        rotary = self.text.rotary_emb = type(self.text.rotary_emb)(self.text.config)
        rotary.inv_freq = rotary.inv_freq.bfloat16().float()

    def see(self, pixels: Tensor) -> Tensor:
        """Tokens [N, S, D] of normalised pixels [N, 3, H, W], whose edges are multiples of `step`; differentiable."""
        visual = self.visual
        weight = visual.patch_embed.proj.weight.flatten(1)  # a convolution whose stride is its size
        x = functional.linear(self.patches(pixels).to(weight.dtype), weight)
        cos, sin = self._angles(pixels)
        for block in visual.blocks:
            qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, self.vision.num_heads, -1))
            query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [N, heads, T, width of a head] each
            query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
            attended = functional.scaled_dot_product_attention(query, key, value)
            x = x + block.attn.proj(attended.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return visual.merger(x).unflatten(0, (len(x), -1))

    def patches(self, pixels: Tensor) -> Tensor:
        """Patches [N, T, values] of pixels [N, 3, H, W], in Qwen2-VL's order: the four of a token stand together.

        A patch has each of its pixels twice, because Qwen2-VL sees a picture as a film of two frames.
        """
        patch, merge = self.vision.patch_size, self.vision.spatial_merge_size
        tokens = pixels.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))
        tokens = tokens.permute(0, 2, 5, 3, 6, 1, 4, 7)  # N, token's row and column, patch's, colour, pixel's
        frames = tokens.unsqueeze(-3).expand(*tokens.shape[:-2], self.vision.temporal_patch_size, *tokens.shape[-2:])
        return frames.flatten(5).flatten(1, 4)

    def _angles(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 [T, width of a head], of the patches' rotary angles: by row, then by column."""
        patch, merge = self.vision.patch_size, self.vision.spatial_merge_size
        half = self.vision.embed_dim // self.vision.num_heads // 2
        exponents = torch.arange(0, half, 2, device=pixels.device, dtype=torch.float32) / half
        frequencies = (1.0 / _VISION_THETA**exponents).bfloat16()
        rows, columns = (
            torch.outer(torch.arange(edge // patch, device=pixels.device, dtype=torch.bfloat16), frequencies)
            for edge in pixels.shape[-2:]
        )
        grid = torch.stack([rows[:, None].expand(-1, len(columns), -1), columns.expand(len(rows), -1, -1)], 2)
        grid = grid.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).transpose(1, 2)  # as in `patches`
        angles = grid.flatten(4).flatten(0, 3).repeat(1, 2)
        return angles.cos().float(), angles.sin().float()

    def forward(self, pixels: Tensor, ids: Tensor, lead: int) -> Tensor:
        """States [N, S + L, D] of texts, int64 [N, L], with a picture each after the first `lead` tokens.

        The state of a token depends on what stands before it alone. So texts may be filled up at their ends with
        anything.
        """
        words = self.text.embed_tokens(ids)
        inputs = torch.cat([words[:, :lead], self.see(pixels), words[:, lead:]], 1)
        return self.text(inputs_embeds=inputs, use_cache=False).last_hidden_state


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys turned by their angles, in float32, and back in their own dtype."""
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
