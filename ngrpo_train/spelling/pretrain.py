"""Make the weights that ship with the spelling world: `python -m ngrpo_train.spelling.pretrain --out DIR`.

Four stages, one after the other, on drawn signs: the VAE, from that of the shapes world; the text encoders, which learn
to tell the letters of a word; the rectified flow, together with them; and the judge. Words are those of `train` and
random ones; held-out words are left out. Captions are noisy on purpose, as web captions are: each letter is replaced by
a random one with some probability. So the flow learns to misspell, which RL then repairs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ngrpo_train.spelling.judge import Judge, letters
from ngrpo_train.spelling.pipeline import CLIP_LENGTH, MAX_SEQUENCE_LENGTH, untrained_pipeline
from ngrpo_train.spelling.world import COLOURS, LETTERS, WORD_LENGTH, Sign, draw, words
from ngrpo_train.worlds import pipeline_dir
from ngrpo_train.worlds.pretraining import Progress, encode, one_cycle, token_ids, train_judge, train_vae
from ngrpo_train.worlds.small_flux import standardised, train_flow

_LETTERS_OF_T5 = slice(6, 10)  # its tokens: a, colour, sign, that, says, a space, then the letters
_RANDOM_WORDS = 0.6  # share of signs whose word is random letters, so that no letter and no pair is rare
_SMALL_LETTERS = 0.2  # share of captions that write the word in small letters
# Fonts of the judge, and their sizes at which a letter is 16 pixels wide.
_FONTS = {"DejaVuSansMono-Bold": 26, "DejaVuSansMono": 26, "DejaVuSansMono-BoldOblique": 26, "cmtt10": 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrain:
    """Settings of the run that made the shipped weights."""

    out: Path = Path("spelling_weights")
    """Directory to write `pipeline/` and `judge.safetensors` to."""
    seed: int = 0
    vae_steps: int = 700
    text_steps: int = 600
    pictures: int = 8_000
    """Pictures whose latents the flow is trained on."""
    flow_steps: int = 2_500
    judge_steps: int = 1_000
    caption_noise: float = 0.3
    """Probability that a letter of a training caption is replaced by a random one."""


def main(args: Pretrain) -> None:
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    pipeline = untrained_pipeline()

    pipeline.vae.load_state_dict(load_file(pipeline_dir("shapes") / "vae" / "diffusion_pytorch_model.safetensors"))
    train_vae(pipeline.vae, lambda n: draw(some_signs(n), generator), args.vae_steps, generator, learning_rate=2.5e-3)
    wanted = some_signs(args.pictures)
    drawn = (draw(wanted[i : i + 64], generator) for i in range(0, len(wanted), 64))
    latents = standardised(pipeline.vae, encode(pipeline.vae, drawn, generator))

    def misled(rows: Sequence[int]) -> list[str]:
        return [caption(misspelt(wanted[row], args.caption_noise)) for row in rows]

    teach_letters(pipeline, args.text_steps)
    length, steps = MAX_SEQUENCE_LENGTH, args.flow_steps
    train_flow(pipeline, latents, misled, steps, generator, text_length=length, batch=32, average=3e-3)
    # Half the bytes, and nothing that can be seen: the flow's own noise is far greater than bfloat16's.
    pipeline.transformer.to(torch.bfloat16)
    pipeline.save_pretrained(args.out / "pipeline")

    judge = Judge()
    train_judge(judge, pipeline.vae, lambda n: _drawn(n, generator), _judge_loss, args.judge_steps, generator)
    save_file(judge.state_dict(), args.out / "judge.safetensors")


def some_signs(count: int) -> list[Sign]:
    """Signs with random words, two in five of them words to train on; never a held-out word."""
    held_out = {*words("validation"), *words("test")}
    signs: list[Sign] = []
    while len(signs) < count:
        word = random.choice(words("train"))
        if random.random() < _RANDOM_WORDS:
            word = "".join(random.choices(LETTERS, k=WORD_LENGTH))
        if word not in held_out:
            signs.append(Sign(random.choice(list(COLOURS)), word))
    return signs


def misspelt(sign: Sign, probability: float) -> Sign:
    changed = (random.choice(LETTERS) if random.random() < probability else letter for letter in sign.word)
    return Sign(sign.colour, "".join(changed))


def caption(sign: Sign) -> str:
    small = random.random() < _SMALL_LETTERS
    return str(Sign(sign.colour, sign.word.lower()) if small else sign)


def teach_letters(pipeline: FluxPipeline, steps: int, batch: int = 64) -> None:
    """Teach T5 to tell letter and place at each letter's token, and CLIP to tell all letters at the end.

    Without it, the flow would have to find letters in untrained embeddings. The heads are thrown away.
    """
    t5, clip = pipeline.text_encoder_2.train(), pipeline.text_encoder.train()
    width = pipeline.transformer.config.joint_attention_dim
    letter, place = nn.Linear(width, len(LETTERS)), nn.Linear(width, WORD_LENGTH)
    all_letters = nn.Linear(width, WORD_LENGTH * len(LETTERS))
    update = one_cycle([t5, clip, letter, place, all_letters], 3e-3, steps)
    progress = Progress("text", steps)
    places = torch.arange(WORD_LENGTH).repeat(batch)
    for step in range(steps):
        wanted = some_signs(batch)
        texts, asked = [caption(sign) for sign in wanted], letters(wanted).flatten()
        embedded = t5(token_ids(pipeline.tokenizer_2, texts, MAX_SEQUENCE_LENGTH))[0]
        tokens = embedded[:, _LETTERS_OF_T5].flatten(0, 1)
        pooled = clip(token_ids(pipeline.tokenizer, texts, CLIP_LENGTH)).pooler_output
        loss = F.cross_entropy(letter(tokens), asked) + F.cross_entropy(place(tokens), places)
        loss = loss + F.cross_entropy(all_letters(pooled).view(len(asked), -1), asked)
        update(loss)
        progress.report(step, loss)


def _drawn(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Signs in one of several fonts, and their letters."""
    wanted, font = some_signs(count), random.choice(list(_FONTS))
    return draw(wanted, generator, font, _FONTS[font]), letters(wanted)


def _judge_loss(judge: nn.Module, images: Tensor, asked: Tensor) -> Tensor:
    return F.cross_entropy(judge(images).flatten(0, 1), asked.flatten())


if __name__ == "__main__":
    main(tyro.cli(Pretrain, description=__doc__))
