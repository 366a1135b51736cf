"""Tiny FLUX pipelines with random weights, in FLUX.1's layout, and what loads and trains them in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ngrpo_train.__main__ import main
from ngrpo_train.models.model import FlowModel
from ngrpo_train.recipe.sections import Model, Parallel, Sampling
from ngrpo_train.shapes.pipeline import CLIP_LENGTH, clip_tokenizer, t5_tokenizer

SIZE = 32  # pixels, so 2 x 2 image tokens
PROMPTS = ["a large red circle on a blue background", "a dog", "an étoile, far away", "two cats on a mat"]


def _text_encoders(dim: int) -> dict[str, object]:
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=dim,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=dim,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=dim,
        d_ff=dim,
        d_kv=8,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": CLIPTextModel(clip).eval(),
        "text_encoder_2": T5EncoderModel(t5).eval(),
    }


def _save_pipeline(directory: Path, *, guidance_embeds: bool, scheduler: FlowMatchEulerDiscreteScheduler) -> str:
    dim = 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=dim,
            pooled_projection_dim=dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        # A fresh model is nearly blind to time, guidance and text, whose projections begin small.
        for parameter in transformer.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=16,
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=SIZE,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        encoders = _text_encoders(dim)
    FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **encoders).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def tiny_dev(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a pipeline like FLUX.1-dev: guidance embedding, dynamic shifting."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return _save_pipeline(tmp_path_factory.mktemp("dev"), guidance_embeds=True, scheduler=scheduler)


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a pipeline like FLUX.1-schnell: no guidance embedding, shift 1."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return _save_pipeline(tmp_path_factory.mktemp("schnell"), guidance_embeds=False, scheduler=scheduler)


@pytest.fixture(scope="session")
def load_flux() -> Callable[..., FlowModel]:
    """Loads a pipeline for training at a tiny size; keywords are fields of Model, Sampling or Parallel."""

    def load(directory: str, **changes: object) -> FlowModel:
        sections = []
        defaults = {
            Model: {"name_or_path": directory, "gradient_checkpointing": "none", "lora_rank": 4, "lora_alpha": 4},
            Sampling: {"height": SIZE, "width": SIZE, "max_sequence_length": 16, "num_inference_steps": 4},
            Parallel: {"device": "cpu", "compute_dtype": "float32"},
        }
        for section, values in defaults.items():
            names = section.__dataclass_fields__.keys() & changes.keys()
            sections.append(section(**values | {name: changes.pop(name) for name in names}))
        assert not changes, changes
        return FlowModel(*sections, torch.device("cpu"))

    return load


@pytest.fixture(scope="session")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A module of scorers, by name: `brightness` and `redness` of pictures."""
    directory = tmp_path_factory.mktemp("scorers")
    (directory / "tiny_scorers.py").write_text(
        "def brightness(images, prompts):\n"
        "    return images.float().mean((1, 2, 3)) / 255\n"
        "def redness(images, prompts):\n"
        "    return (images[:, 0].float() - images[:, 1:].float().mean(1)).mean((1, 2)) / 255\n"
    )
    return str(directory)


@pytest.fixture
def tiny_recipe(tiny_dev: str, scorers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of two iterations on `tiny_dev`, in `tmp_path`, where runs go too."""
    monkeypatch.syspath_prepend(scorers)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    path = Path("tiny.toml")
    path.write_text(f"""
        [model]
        name_or_path = "{tiny_dev}"
        gradient_checkpointing = "none"
        lora_rank = 4
        lora_alpha = 8
        [prompts]
        source = "prompts.txt"
        per_rank = 2
        [sampling]
        num_inference_steps = 4
        height = {SIZE}
        width = {SIZE}
        max_sequence_length = 16
        [algorithm]
        num_generations = 4
        num_anchors = 2
        num_train_steps = 2
        step_range = [0, 0.75]
        [rewards.brightness]
        path = "tiny_scorers:brightness"
        [rewards.redness]
        path = "tiny_scorers:redness"
        log_only = true
        [optimizer]
        learning_rate = 1e-3
        [train]
        steps = 2
        [parallel]
        device = "cpu"
        compute_dtype = "float32"
        [log]
        trackers = []
        export = false
        num_images = 2
        """)
    return path


@pytest.fixture
def ngrpo(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
