"""ImageReward: BLIP's text encoder reads the prompt while it looks at the picture; an MLP makes the score."""

# N pictures, M distinct prompts, L = 35 text tokens.

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from ngrpo_train.parallel.sending import sent
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards.pixels import normalise, shortest_edge_crop
from ngrpo_train.rewards.scorer import ModelScorer, Scorer
from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.rewards.towers import ScorerSize, Tower, block_flops, block_parameters
from ngrpo_train.rewards.weights import fill, find_file, mismatch, read_json, read_state, some

HUB_ID = "THUDM/ImageReward"
FILE, CONFIG = "ImageReward.pt", "med_config.json"
TOKENIZER = "google-bert/bert-base-uncased"
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of raw scores, as its authors measured them

_TOKENIZER_FILES = ("vocab.txt", "tokenizer.json")
_HEAD_WIDTH = 64

# Sizes of the released model.
_POSITIONS, _VOCABULARY = 512, 30524
_MLP = (768, 1024, 128, 64, 16, 1)

# Beginnings and ends of the official names, with those used here and in transformers.
_RENAMED = {
    r"^blip\.visual_encoder\.": "vision.",
    r"^vision\.cls_token$": "vision.embeddings.class_embedding",
    r"^vision\.pos_embed$": "vision.embeddings.position_embedding",
    r"^vision\.patch_embed\.proj\.": "vision.embeddings.patch_embedding.",
    r"^vision\.norm\.": "vision.post_layernorm.",
    r"^(vision)\.blocks\.(\d+)\.": r"\1.encoder.layers.\2.",
    r"^(vision\.encoder\.layers\.\d+)\.norm": r"\1.layer_norm",
    r"^(vision\.encoder\.layers\.\d+)\.attn\.qkv\.": r"\1.self_attn.qkv.",
    r"^(vision\.encoder\.layers\.\d+)\.attn\.proj\.": r"\1.self_attn.projection.",
    r"^blip\.text_encoder\.": "text.",
    r"^mlp\.layers\.": "mlp.",
}
UNUSED = re.compile(r"^blip\.(vision_proj|text_proj)\.|\.position_ids$")


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    """The scorer; `settings.path` is a hub id or directory with ImageReward.pt, or such a file.

    A med_config.json and a tokenizer beside it are read. Raises ValueError for weights or a tokenizer that cannot be
    used.
    """
    if settings.backend == "image-reward":
        from ngrpo_train.rewards.official import image_reward

        return image_reward(settings, device)
    if settings.backend != "native":
        raise ValueError(
            f'backend = {settings.backend!r} is not for this reward, which has "native" and "image-reward"'
        )
    file = find_file(settings.path or HUB_ID, FILE)
    official = read_state(file)
    architecture = read_architecture(official, file)
    tokenizer = load_tokenizer(settings.processor or beside(file), architecture.text.vocab_size)
    with torch.device("meta"):
        scorer = ImageReward(settings, device, architecture, tokenizer)
    fill(scorer, {_renamed(key): value for key, value in official.items() if not UNUSED.search(key)}, file)
    embeddings = scorer.text.embeddings
    embeddings.position_ids = torch.arange(embeddings.position_embeddings.num_embeddings)[None]  # no file holds these
    return scorer.ready()


@dataclass(frozen=True, slots=True)
class Architecture:
    vision: BlipVisionConfig
    text: BlipTextConfig
    mlp: dict[str, tuple[int, int]]
    """Inputs and outputs of each layer, by its name."""


class ImageReward(ModelScorer):
    """A scorer whose scores are about N(0, 1) over the pictures that it was trained on."""

    def __init__(
        self, settings: Reward, device: torch.device, architecture: Architecture, tokenizer: BertTokenizer
    ) -> None:
        super().__init__(settings, device)
        self.vision = BlipVisionModel(architecture.vision)
        self.text = BlipTextModel(architecture.text, add_pooling_layer=False)
        # In training there was dropout between the layers, and nothing else.
        self.mlp = nn.Sequential(OrderedDict((each, nn.Linear(*size)) for each, size in architecture.mlp.items()))
        self.tokenizer, self.size = tokenizer, architecture.vision.image_size

    def ready(self) -> Self:
        exact = self.mlp.state_dict()
        super().ready()
        self.mlp.float().load_state_dict(exact)  # the score is computed in float32
        return self

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, int64 [M, L]. No more can be shared: the prompt is read anew with each picture."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return sent(tokens.input_ids, self.device), sent(tokens.attention_mask, self.device)

    def score(self, pixels: Tensor, *encoded: Tensor) -> Tensor:
        ids, mask = encoded
        seen = self.vision(pixel_values=normalise(shortest_edge_crop(pixels, self.size))).last_hidden_state
        # Not a decoder, although its configuration says so: every token attends to all tokens.
        read = self.text(ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False).last_hidden_state
        return (self.mlp(read[:, 0].float()).squeeze(-1) - MEAN) / STD


def load_tokenizer(path: str, rows: int) -> BertTokenizer:
    """BERT's tokenizer, from a directory or hub id, with the two tokens that BLIP added.

    Raises ValueError if there is no tokenizer, or if it has more tokens than `rows`, the weights' embeddings.
    """
    # For a directory without these files, transformers silently makes a tokenizer that knows no words.
    file = find_file(path, *_TOKENIZER_FILES)
    tokenizer = BertTokenizer.from_pretrained(file.parent, local_files_only=True)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) > rows:
        raise ValueError(
            f"processor = {path!r} has {len(tokenizer)} tokens, and the weights have embeddings for {rows}"
        )
    return tokenizer


def beside(file: Path) -> str:
    """The directory of a weights file if it has a tokenizer, else the official tokenizer's hub id."""
    return str(file.parent) if any((file.parent / name).is_file() for name in _TOKENIZER_FILES) else TOKENIZER


def read_architecture(official: Mapping[str, Tensor], file: Path) -> Architecture:
    """The architecture by the tensors of `file`, the rest as in BLIP. Raises ValueError if it holds another model."""

    def size(name: str, dimension: int) -> int:
        if name not in official:
            raise mismatch(file, f"ImageReward's weight {name}", f"only names such as {some(official)}")
        return official[name].shape[dimension]

    def count(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in official if key.startswith(prefix)})

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    patch, positions = size(f"{vision}.patch_embed.proj.weight", -1), size(f"{vision}.pos_embed", -2)
    layers = [key for key in official if re.fullmatch(r"mlp\.layers\.\d+\.weight", key)]
    med_config = file.with_name(CONFIG)
    heads = read_json(med_config).get("num_attention_heads") if med_config.is_file() else None
    return Architecture(
        BlipVisionConfig(
            image_size=patch * math.isqrt(positions - 1),
            patch_size=patch,
            hidden_size=size(f"{vision}.cls_token", -1),
            intermediate_size=size(f"{vision}.blocks.0.mlp.fc1.weight", 0),
            num_hidden_layers=count(f"{vision}.blocks."),
            num_attention_heads=size(f"{vision}.cls_token", -1) // _HEAD_WIDTH,
            layer_norm_eps=1e-6,
        ),
        BlipTextConfig(
            vocab_size=size(f"{text}.embeddings.word_embeddings.weight", 0),
            max_position_embeddings=size(f"{text}.embeddings.position_embeddings.weight", 0),
            hidden_size=size(f"{text}.embeddings.word_embeddings.weight", 1),
            encoder_hidden_size=size(f"{text}.encoder.layer.0.crossattention.self.key.weight", 1),
            intermediate_size=size(f"{text}.encoder.layer.0.intermediate.dense.weight", 0),
            num_hidden_layers=count(f"{text}.encoder.layer."),
            num_attention_heads=heads or size(f"{text}.embeddings.word_embeddings.weight", 1) // _HEAD_WIDTH,
            is_decoder=True,  # without it, transformers builds no cross-attention
        ),
        {key.split(".")[2]: (size(key, 1), size(key, 0)) for key in layers},
    )


def _renamed(key: str) -> str:
    for pattern, name in _RENAMED.items():
        key = re.sub(pattern, name, key)
    return key


# T tokens of a picture, h width of its tower, `width` of the text's tower.
def _size(side: int = 224, patch: int = 16, h: int = 1024, layers: int = 24) -> ScorerSize:
    """The size of BLIP's ViT-L/16, of BERT-base, which attends to it in every block, and of an MLP."""
    T, L, width, blocks = (side // patch) ** 2 + 1, MAX_TOKENS, 768, 12
    first = 3 * patch**2 * h
    vision = Tower(
        parameters=first + 2 * h + T * h + layers * block_parameters(h) + 2 * h,
        flops=2 * (T - 1) * first + layers * block_flops(T, h),
    )
    # Queries and output: width x width. Keys and values: h x width, for all tokens of the picture. And a norm.
    attends = 2 * (width * width + h * width) + 4 * width + 2 * width
    reads = 2 * (L * 2 * width * width + T * 2 * h * width) + 2 * 2 * L * T * width
    mlp = sum(before * after for before, after in pairwise(_MLP))
    text = Tower(
        parameters=(_VOCABULARY + _POSITIONS + 2) * width + blocks * (block_parameters(width) + attends),
        flops=blocks * (block_flops(L, width) + reads) + 2 * mlp,
    )
    values = T * (6 * h + 3 * (h // 64) * T)  # its attention stores the weights of every head
    return ScorerSize(vision, text, side, values, parameters_around=mlp + sum(_MLP[1:]), reads=True)


REWARD = Shipped(
    load=load,
    hub_files=((HUB_ID, (FILE,)), (TOKENIZER, ("vocab.txt",))),
    size=lambda settings: _size(),
)
