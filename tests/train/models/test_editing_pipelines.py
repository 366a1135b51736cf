"""Tiny pipelines of diffusers that edit and that fill, through the commands: what is drawn is what diffusers draws."""

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ngrpo_train.draws import stream
from ngrpo_train.sampling import pictures
from ngrpo_train.sampling.solvers import flow_sigmas

from ...families import FAMILIES, Family

Command = Callable[..., tuple[int, str, str]]
STEPS, SHIFT = 4, 2.0


@pytest.fixture(params=["kontext", "fill"])
def family(request: pytest.FixtureRequest, tiny_recipe: Path) -> Family:
    """A family with its pipeline in model/; beside it a dark and a bright picture, and a mask of their left half."""
    family = FAMILIES[request.param]
    family.save(Path("model"))
    size = family.sampling["height"], family.sampling["width"]
    for seed, name in enumerate(("a", "b")):
        noise = np.random.default_rng(seed).integers(128 * seed, 128 * seed + 128, (*size, 3), np.uint8)
        Image.fromarray(noise).save(f"{name}.png")
    mask = np.zeros(size, np.uint8)
    mask[:, : size[1] // 2] = 255
    Image.fromarray(mask).save("left.png")
    rows = [{"prompt": "a hat", "image": f"{name}.png", "mask": "left.png"} for name in ("a", "b")]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return family


def sampling_flags(family: Family) -> list[str]:
    asked = family.sampling | {"num_inference_steps": STEPS, "shift": SHIFT, "solver": "euler"}
    return [f"--sampling.{name.replace('_', '-')}={value}" for name, value in asked.items()]


def drawn_by_diffusers(family: Family, picture: str, slot: int) -> np.ndarray:
    """The stock pipeline's picture of the first prompt, from the noise and at the times of `ngrpo sample`."""
    pipeline = getattr(diffusers, family.kind).from_pretrained("model")
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    channels = pipeline.vae.config.latent_channels * 4  # packed two by two
    tokens = family.sampling["height"] * family.sampling["width"] // (2 * pipeline.vae_scale_factor) ** 2
    noise = torch.randn(tokens, channels, generator=stream(pictures._NOISE_SEED, 0, slot, "evaluation"))
    prepare = pipeline.prepare_latents
    pipeline.prepare_latents = lambda *arguments: (noise[None], *prepare(*arguments)[1:])
    given = {"image": Image.open(picture)} | (
        {"mask_image": Image.open("left.png")} if "mask" in family.pictures else {}
    )
    drawn = pipeline(
        prompt="a hat",
        generator=torch.Generator().manual_seed(0),  # which draws the latent of a masked picture
        num_inference_steps=STEPS,
        sigmas=flow_sigmas(STEPS, SHIFT).tolist()[:-1],
        **given,
        **family.call,
    )
    return np.array(drawn.images[0])


def test_sample_draws_what_diffusers_draws(ngrpo: Command, family: Family) -> None:
    mask = ["--mask=left.png"] if "mask" in family.pictures else []
    on_this_machine = ["--parallel.device=cpu", "--parallel.compute-dtype=float32"]
    asked = ["--image=a.png", *mask, "--prompt=a hat", "--per-prompt=2", "--out=drawn"]
    code, _, err = ngrpo("sample", "model", *asked, *sampling_flags(family), *on_this_machine)
    assert code == 0, err
    for slot in range(2):
        expected = drawn_by_diffusers(family, "a.png", slot).astype(int)
        drawn = np.array(Image.open(f"drawn/000_{slot:02d}.png")).astype(int)
        assert np.abs(drawn - expected).max() <= 1  # a pixel that is halfway between two bytes
        assert np.mean(drawn != expected) < 0.01
        assert np.mean(drawn_by_diffusers(family, "b.png", slot) != expected) > 0.1, "the picture matters"
    height, width, scale = family.sampling["height"], family.sampling["width"], 128 // family.sampling["width"]
    shown = np.array(Image.open("drawn/grid.png"))[: scale * height : scale, : scale * width : scale]
    source, kept = np.array(Image.open("a.png")), slice(width // 2 if mask else 0, None)
    assert np.array_equal(shown[:, kept], source[:, kept])
    assert not mask or (shown[:, : kept.start] == 128).all()


def test_it_trains_and_is_evaluated(ngrpo: Command, tiny_recipe: Path, family: Family) -> None:
    flags = ["--model.name-or-path=model", "--prompts.source=prompts.jsonl", "--evaluation.test=prompts.jsonl"]
    code, _, err = ngrpo("train", tiny_recipe, *flags, *sampling_flags(family))
    assert code == 0, err
    code, _, err = ngrpo("eval", "runs/tiny", "--as-trained", "--out=looked-at")
    assert code == 0, err
    scores = json.loads(Path("looked-at/summary.json").read_text())["all"]["models"]
    assert scores["model"]["brightness"]["mean"] != scores["tiny"]["brightness"]["mean"]
    page = Path("looked-at/pictures.html").read_text()
    assert page.index('src="../b.png"') < page.index('src="base/00001_00.png"') < page.index('src="model/00001_00.png"')

    rows = Path("prompts.jsonl").read_text().replace("b.png", "c.png")
    Path("prompts.jsonl").write_text(rows)
    code, _, err = ngrpo("train", tiny_recipe, *flags, *sampling_flags(family), "--log.output-dir=other")
    assert code == 2
    assert err.startswith(
        "ngrpo train: model.name_or_path = 'model' cannot draw 'a hat' (row 2 of its file) of prompts."
    )
