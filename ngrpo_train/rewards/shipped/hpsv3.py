"""HPSv3 (arXiv 2508.03789): Qwen2-VL-7B reads the prompt after it has seen the picture; a head makes the score.

The head gives a mean and the logarithm of a deviation. The mean is the score. FLUX.1 [dev] has about 10.
"""

# N pictures, M distinct prompts, L tokens of text.

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig

from ngrpo_train.parallel.sending import sent
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards.clip_scorer import native_only
from ngrpo_train.rewards.pixels import normalise, resize
from ngrpo_train.rewards.qwen2_vl import FILES, Qwen2VL, beside, picture_size, read_config, read_tokenizer
from ngrpo_train.rewards.scorer import ModelScorer, Scorer
from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.rewards.towers import ScorerSize, Tower, block_flops, block_parameters
from ngrpo_train.rewards.weights import fill, find_state, mismatch, some

_OFFICIAL, _FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
_BODY = "Qwen/Qwen2-VL-7B-Instruct"

MARK = "<|Reward|>"
"""The token, added to Qwen2-VL's, whose state the head reads."""
PIXELS = 256 * 28 * 28
"""Pixels of a picture, of which 28 x 28 become a token."""
_HEAD = (1024, 16, 2)
_VOCABULARY = 151658

# The words of a conversation by Qwen2-VL's template, and the instruction by which the model was trained, to the space.
BEFORE_PICTURE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
BEFORE_PROMPT = """<|vision_end|>
You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall score \
to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the \
best.\x20

**Visual Quality:**\x20\x20
Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:
- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal \
body structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, \
with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements \
(e.g., hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, \
atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.
- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult \
material. If such content is present, the image quality and satisfaction score should be the lowest possible.\x20

**Text Alignment:**\x20\x20
Assess how well the image matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with \
the textual description. The subject should match the description in terms of number, appearance, and behavior.
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image \
adheres to this style.
- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically \
fit the scenario described in the prompt. The environment should support and enhance the subject without \
contradictions.
- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, \
expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical \
attributes should be preserved.
- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The \
generated content should not introduce elements that conflict with or distort the original description.
Textual prompt - """
AFTER_PROMPT = f"\n\n\n\nPlease provide the overall ratings of this image: {MARK}"
"""The official text goes on after the mark. The model reads from left to right, so that this does not matter."""

# The official names are those of transformers 4.45, or of a newer one, in which all are below "model.".
_RENAMED = {
    r"^model\.visual\.|^visual\.": "body.visual.",
    r"^model\.language_model\.|^model\.": "body.text.",
    r"^rm_head\.": "head.",
}
_UNUSED = "lm_head.weight"


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    """The scorer; `settings.path` is a hub id or directory with HPSv3.safetensors, or such a file.

    `settings.processor` is a hub id or directory with Qwen2-VL's configuration and tokenizer. If it is not set, they
    may lie beside the weights. Raises ValueError for files that cannot be used.
    """
    native_only(settings)
    file, official = find_state(settings.path or _OFFICIAL, _FILE)
    state = {_renamed(key): value for key, value in official.items() if key != _UNUSED}
    embeddings = state.get("body.text.embed_tokens.weight")
    if embeddings is None:
        raise mismatch(file, "HPSv3's weight model.embed_tokens.weight", f"only names such as {some(official)}")
    source = settings.processor or beside(file, _BODY)
    tokenizer = read_tokenizer(source, MARK, len(embeddings))
    with torch.device("meta"):
        scorer = HPSv3(
            settings,
            device,
            read_config(source, len(embeddings)),
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        )
    fill(scorer, state, file)
    scorer.body.restore_frequencies()
    return scorer.ready()


class HPSv3(ModelScorer):
    """A scorer whose language model reads the prompt anew for every picture."""

    def __init__(
        self, settings: Reward, device: torch.device, config: Qwen2VLConfig, tokenize: Callable[[str], list[int]]
    ) -> None:
        super().__init__(settings, device)
        self.body = Qwen2VL(config)
        first, second, last = _HEAD
        self.head = nn.Sequential(
            nn.Linear(config.text_config.hidden_size, first),
            nn.ReLU(),
            nn.Identity(),  # dropout, in training
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, last),
        )
        self.tokenize, self.lead = tokenize, tokenize(BEFORE_PICTURE)

    def ready(self) -> Self:
        exact = self.head.state_dict()
        super().ready()
        self.head.float().load_state_dict(exact)  # the score is computed in float32
        return self

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids, int64 [M, L], of the whole text around the picture, and the place of each mark among them, int64 [M]."""
        rows = [[*self.lead, *self.tokenize(BEFORE_PROMPT + prompt + AFTER_PROMPT)] for prompt in prompts]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return sent(ids, self.device), sent(torch.tensor([len(row) - 1 for row in rows]), self.device)

    def score(self, pixels: Tensor, *encoded: Tensor) -> Tensor:
        ids, marks = encoded
        height, width = pixels.shape[-2:]
        pixels = normalise(resize(pixels, *picture_size(height, width, PIXELS, self.body.step)))
        states = self.body(pixels, ids, len(self.lead))
        read = marks + states.shape[1] - ids.shape[1]  # the picture's tokens stand before the mark
        return self.head(states[torch.arange(len(read), device=read.device), read].float())[:, 0]


def _renamed(key: str) -> str:
    for pattern, name in _RENAMED.items():
        key, found = re.subn(pattern, name, key)
        if found:
            break
    return key


# T patches of a picture, S tokens of it, L tokens in all, h width of the vision tower, D of the language model.
TOKENS = 15 + 256 + 522 + 40
"""Tokens before the picture, of a picture, of the instruction, and of a prompt of usual length."""


def _size(h: int = 1280, blocks: int = 32, D: int = 3584, layers: int = 28, inner: int = 18944) -> ScorerSize:
    """The size of Qwen2-VL-7B, whose keys and values are 512 wide, with its head, for pictures of 448 x 448."""
    T, S, L, kv, patch = 1024, 256, TOKENS, 512, 2 * 3 * 14 * 14
    merger = (4 * h) ** 2 + 4 * h * D
    vision = Tower(
        parameters=patch * h + blocks * block_parameters(h) + 2 * h + merger + 4 * h + D,
        flops=2 * T * patch * h + blocks * block_flops(T, h) + 2 * S * merger,
    )
    layer = 2 * D * D + 2 * D * kv + 3 * D * inner
    head = sum(before * after for before, after in pairwise((D, *_HEAD)))
    text = Tower(
        parameters=_VOCABULARY * D + layers * (layer + D + 2 * kv + 2 * D) + D,
        flops=layers * (2 * L * layer + 2 * 2 * L * L * D) + 2 * head,
    )
    # In a feed-forward layer: three times its inside, its input and sums, and, until the end, embeddings and angles.
    values = L * (3 * inner + 4 * D + 2 * 128) + (L - S) * D
    return ScorerSize(vision, text, side=448, values=values, parameters_around=head + sum(_HEAD), reads=True)


REWARD = Shipped(
    load=load,
    hub_files=((_OFFICIAL, (_FILE,)), (_BODY, FILES)),
    size=lambda settings: _size(),
)
