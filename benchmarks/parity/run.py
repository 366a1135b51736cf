"""Scores of our scorers and of the official packages, on the same random weights in the official files' layouts.

    python -m benchmarks.parity.run [--transformers-4 PYTHON] [--tiny] [--out CSV]

in the environment that build.sh makes. `--transformers-4` is the interpreter of the other environment that it makes,
where image-reward runs unmodified. Real sizes take 8 GiB of memory, 6 GB of disk and 20 minutes on one core. One row is
one size of pictures; those of 224 x 224 are not resized, so that their rows show arithmetic alone.
"""

import argparse
import csv
import itertools
import json
import os
import platform
import re
import string
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.rows import RESULTS
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import official
from ngrpo_train.rewards.scorer import Scorer
from ngrpo_train.rewards.shipped import hpsv2_1, image_reward

CPU = torch.device("cpu")
PICTURES = 2
SIZES = [(224, 224), (1024, 1024), (768, 512), (131, 97), (300, 1000)]  # height, width
PROMPTS = [
    "a large red circle on a blue background",
    "An “oil painting” of two cats &amp; a dog — in the style of Goya, 8k, [ENC] trending: it's 50% off!!",
    " ".join(f"word{i} of a long prompt," for i in range(60)),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    reward: str
    size: str
    """"real", or "tiny": two layers of each tower."""
    reference: str
    dtype: str
    """Dtype of our weights; the reference's are float32."""
    pictures: str
    n: int
    spread: float
    """The reference's highest score for one prompt less its lowest, on average over prompts."""
    max_abs_diff: float
    torch: str
    torchvision: str
    transformers: str
    """Our version; also the reference's, unless its name has another."""
    python: str
    date: str


Scores = dict[tuple[int, int], Tensor]


def pictures(height: int, width: int) -> Tensor:
    """Uint8 [PICTURES, 3, height, width] with soft colours, hard edges and noise."""
    generator = torch.Generator().manual_seed(0)
    soft = torch.rand(PICTURES, 3, 5, 7, generator=generator)
    images = nn.functional.interpolate(soft, (height, width), mode="bicubic").clamp(0, 1)
    images[..., height // 4 : height // 2, width // 3 : width // 2] = soft[:, :, :1, :1].round()
    images[..., height // 2 :, : width // 3] = torch.rand(
        PICTURES, 3, height - height // 2, width // 3, generator=generator
    )
    return (images * 255).round().to(torch.uint8)


def cases(height: int, width: int) -> tuple[Tensor, list[str]]:
    """Every picture with every prompt."""
    each = [prompt for prompt in PROMPTS for _ in range(PICTURES)]
    return pictures(height, width).repeat(len(PROMPTS), 1, 1, 1), each


def score(scorer: Scorer) -> Scores:
    return {size: scorer(*cases(*size)).view(len(PROMPTS), PICTURES) for size in SIZES}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights under which signals neither vanish nor explode, so that scores differ between pictures and prompts."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.normal_(1.0 if re.search(r"(norm|ln_).*weight$", name, re.IGNORECASE) else 0.0, 0.1)
        elif "embedding" in name or "pos_embed" in name or "cls_token" in name:
            parameter.normal_()
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)


# -- HPSv2.1 -----------------------------------------------------------------------------------------------------------

TINY_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}


def compare_hpsv2(tiny: bool, directory: Path) -> Iterator[Row]:
    open_clip = official.import_hpsv2()
    write_clip_tokenizer(open_clip.tokenizer._tokenizer, directory)
    with patch.dict(open_clip.factory._MODEL_CONFIGS, {"ViT-H-14": TINY_CLIP} if tiny else {}):
        model = open_clip.create_model("ViT-H-14")
        randomise(model)
        torch.save({"state_dict": model.state_dict()}, directory / "HPS_v2.1_compressed.pt")
        del model
        settings = Reward(path=str(directory), backend="hpsv2")
        reference = {f"hpsv2 {version('hpsv2')}": score(official.hpsv2(settings, CPU))}
    yield from compare("hpsv2_1", hpsv2_1.load, directory, tiny, reference)


def write_clip_tokenizer(tokenizer: Any, directory: Path) -> None:
    """The package's vocabulary in the files that transformers reads."""
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): row for token, row in tokenizer.encoder.items()}
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = [" ".join(pair) for pair in tokenizer.bpe_ranks]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


# -- ImageReward -------------------------------------------------------------------------------------------------------

MED_CONFIG = {  # BLIP's, for a text encoder with cross-attention
    "hidden_size": 768,
    "encoder_width": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "vocab_size": 30524,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "add_cross_attention": True,
}
TINY_MED_CONFIG = MED_CONFIG | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def compare_image_reward(tiny: bool, directory: Path, transformers_4: str) -> Iterator[Row]:
    config = TINY_MED_CONFIG if tiny else MED_CONFIG
    (directory / "med_config.json").write_text(json.dumps(config))
    vocabulary = directory / "bert-base-uncased"  # where the package looks for it
    write_bert_vocabulary(vocabulary, config["vocab_size"] - 2)
    package, blip = official.import_image_reward()
    with ExitStack() as smaller:
        if tiny:
            smaller.enter_context(patch.object(blip, "create_vit", tiny_vit))
            smaller.enter_context(patch.object(package, "MLP", lambda _, mlp=package.MLP: mlp(config["hidden_size"])))
        with patch.object(blip, "init_tokenizer"):
            model = package.ImageReward(str(directory / "med_config.json"))
        randomise(model)
        torch.save(model.state_dict(), directory / "ImageReward.pt")
        del model
        settings = Reward(path=str(directory), processor=str(vocabulary), backend="image-reward")
        reference = {f"image-reward {version('image-reward')}": score(official.image_reward(settings, CPU))}
    if transformers_4 and not tiny:
        name, scores = score_unmodified(transformers_4, directory)
        reference[name] = scores
    yield from compare("image_reward", image_reward.load, directory, tiny, reference, processor=str(vocabulary))


def tiny_vit(vit: str, image_size: int, *_: Any) -> tuple[nn.Module, int]:
    from ImageReward.models.BLIP.vit import VisionTransformer

    return VisionTransformer(image_size, patch_size=16, embed_dim=128, depth=2, num_heads=2), 128


def write_bert_vocabulary(directory: Path, size: int) -> None:
    """BERT's 100 first rows and single characters where BERT has them, then pieces of up to three letters."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    letters = string.ascii_lowercase
    pieces = (
        mark + "".join(piece)
        for characters, length in ((string.printable.strip() + "“”—", 1), (letters, 2), (letters, 3))
        for mark in ("", "##")
        for piece in itertools.product(characters, repeat=length)
        if not set(piece) & set(string.ascii_uppercase)
    )
    rows = [special.get(row) or (f"[unused{row}]" if row < 104 else next(pieces)) for row in range(size)]
    directory.mkdir()
    (directory / "vocab.txt").write_text("\n".join(rows), encoding="utf-8")


def score_unmodified(python: str, directory: Path) -> tuple[str, Scores]:
    """Score with the package in another environment; returns the name of that reference, and its scores."""
    listed = []
    for size in SIZES:
        for image, prompt in zip(*cases(*size), strict=True):
            listed.append((str(directory / f"{len(listed)}.png"), prompt))
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(listed[-1][0])
    (directory / "pictures.json").write_text(json.dumps(listed))
    command = [str(Path(python).absolute()), "-m", "benchmarks.parity.unmodified", "pictures.json", "unmodified.json"]
    root = Path(__file__).parents[2]
    subprocess.run(command, cwd=directory, env=os.environ | {"PYTHONPATH": str(root)}, check=True)
    answer = json.loads((directory / "unmodified.json").read_text())
    scores = torch.tensor(answer["scores"]).view(len(SIZES), len(PROMPTS), PICTURES)
    return answer["reference"], dict(zip(SIZES, scores, strict=True))


# -- Both --------------------------------------------------------------------------------------------------------------


def compare(
    reward: str,
    load: Callable[..., Scorer],
    directory: Path,
    tiny: bool,
    references: dict[str, Scores],
    **settings: Any,
) -> Iterator[Row]:
    for dtype in ("float32", "bfloat16"):
        ours = score(load(reward, Reward(path=str(directory), dtype=dtype, **settings), CPU))
        for reference, theirs in references.items():
            for (height, width), expected in theirs.items():
                yield Row(
                    reward=reward,
                    size="tiny" if tiny else "real",
                    reference=reference,
                    dtype=dtype,
                    pictures=f"{width}x{height}",
                    n=expected.numel(),
                    spread=(expected.amax(1) - expected.amin(1)).mean().item(),
                    max_abs_diff=(ours[height, width] - expected).abs().max().item(),
                    torch=torch.__version__,
                    torchvision=version("torchvision"),
                    transformers=version("transformers"),
                    python=platform.python_version(),
                    date=date.today().isoformat(),
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers-4", metavar="PYTHON", default="")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes only")
    parser.add_argument("--out", type=Path, default=RESULTS / "reward_parity.csv")
    arguments = parser.parse_args()
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for tiny in (True,) if arguments.tiny else (True, False):
            for comparison in (compare_hpsv2, partial(compare_image_reward, transformers_4=arguments.transformers_4)):
                with tempfile.TemporaryDirectory() as directory:
                    for row in comparison(tiny, Path(directory)):
                        values = asdict(row) | {
                            name: f"{getattr(row, name):.3g}" for name in ("spread", "max_abs_diff")
                        }
                        writer.writerow(values)
                        file.flush()
                        print(*list(values.values())[:8], flush=True)


if __name__ == "__main__":
    main()
