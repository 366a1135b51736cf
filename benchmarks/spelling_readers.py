"""How well readers read the spelling world's signs, and which letters they take for others.

    python benchmarks/spelling_readers.py --random 1000

Signs with all held-out words and with random ones are read as they are drawn, and as the world's VAE restores them.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from dataclasses import dataclass

import torch
import tyro
from diffusers import AutoencoderKL
from torch import Tensor

from ngrpo_train.recipe.rewards import Ocr
from ngrpo_train.rewards.shipped.ocr import load
from ngrpo_train.spelling.judge import read as read_by_judge
from ngrpo_train.spelling.world import COLOURS, LETTERS, WORD_LENGTH, Sign, draw, signs
from ngrpo_train.worlds import pipeline_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """What to read."""

    random: int = 1000
    """Signs with random words."""
    seed: int = 0


def readers() -> dict[str, object]:
    cpu = torch.device("cpu")
    settings = {"PP-OCRv6": Ocr(layout="line", line_width=64)}
    if shutil.which("tesseract"):
        settings["Tesseract"] = Ocr(layout="line", reader="tesseract")
    by_name = {name: load(name, each, cpu).read for name, each in settings.items()}
    return {**by_name, "the world's judge": read_by_judge}


@torch.no_grad()
def restored(images: Tensor) -> Tensor:
    vae = AutoencoderKL.from_pretrained(pipeline_dir("spelling") / "vae")
    parts = [vae.decode(vae.encode(2 * part - 1).latent_dist.mode()).sample for part in images.split(64)]
    return ((torch.cat(parts) + 1) / 2).clamp(0, 1)


def main(args: Readers) -> None:
    random.seed(args.seed)
    held_out = [*signs("validation"), *signs("test")]
    some = ["".join(random.choices(LETTERS, k=WORD_LENGTH)) for _ in range(args.random)]
    wanted = [*held_out, *(Sign(random.choice(list(COLOURS)), word) for word in some)]
    clean = draw(wanted, torch.Generator().manual_seed(args.seed))
    print(f"| reader | signs | {len(held_out)} held-out words | {args.random} random | letters taken for others |")
    print("|---|---|---|---|---|")
    for name, read in readers().items():
        for kind, images in (("drawn", clean), ("through the VAE", restored(clean))):
            texts = [text.replace(" ", "").upper() for text in read((255 * images).round().to(torch.uint8))]
            right = [text == sign.word for text, sign in zip(texts, wanted, strict=True)]
            shares = [sum(part) / len(part) for part in (right[: len(held_out)], right[len(held_out) :])]
            pairs = zip(texts, (sign.word for sign in wanted), strict=True)
            confused = Counter(
                f"{theirs} as {ours}"
                for text, word in pairs
                if len(text) == len(word)
                for ours, theirs in zip(text, word, strict=True)
                if ours != theirs
            )
            others = ", ".join(f"{pair} {count}" for pair, count in confused.most_common(8)) or "none"
            print(f"| {name} | {kind} | {shares[0]:.3f} | {shares[1]:.3f} | {others} |")


if __name__ == "__main__":
    main(tyro.cli(Readers, description=__doc__))
