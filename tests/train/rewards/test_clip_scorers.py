"""HPSv2.1, PickScore, CLIP score and aesthetic: every layout of their files, read and scored, against formulas.

What open_clip's weights mean is written out in `clip_models`; for transformers' layout, transformers and PIL are asked.
"""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from ngrpo_train.recipe.rewards import ClipIqa, settings_class
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import clip_scorer, find_scorer
from ngrpo_train.rewards.shipped import aesthetic, clip, hpsv2_1, pickscore
from ngrpo_train.shapes.pipeline import clip_tokenizer

from .clip_models import (
    EMBED,
    LENGTH,
    PROMPTS,
    SIZE,
    VISION_WIDTH,
    OpenClip,
    open_clip_config,
    open_clip_state,
    padded_ids,
    pictures,
    tokenizer_directory,
    write_json,
)

CPU = torch.device("cpu")
EXACT = {"rtol": 0, "atol": 2e-6}  # float32 against float64, on cosines


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tokenizer_directory(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def hps_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": open_clip_state()}, file)
    return str(file)


@pytest.fixture(scope="module")
def hf_directory(tmp_path_factory, processor):
    """A CLIP as transformers saves it, with its tokenizer and preprocessor, and weights that all matter."""
    directory = tmp_path_factory.mktemp("hf")
    vocabulary = clip_tokenizer()
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": EMBED}
    config = CLIPConfig(
        projection_dim=EMBED,
        vision_config={**sizes, "hidden_size": 48, "intermediate_size": 96, "image_size": SIZE, "patch_size": 4},
        text_config={
            **sizes,
            "hidden_size": 32,
            "intermediate_size": 64,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": LENGTH,
            "bos_token_id": vocabulary.bos_token_id,
            "eos_token_id": vocabulary.eos_token_id,
            "pad_token_id": vocabulary.pad_token_id,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = 1.5 * module.in_features**-0.5 * torch.randn_like(module.weight)
    model.logit_scale.data.fill_(4.6052)
    model.save_pretrained(directory)
    clip_tokenizer().save_pretrained(directory)
    edges = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=edges).save_pretrained(directory)
    return directory


def pixels_of(images):
    return images.double() / 255


def squashed(images):
    return functional.interpolate(pixels_of(images), (SIZE, SIZE), mode="bicubic", antialias=True)


@torch.no_grad()
def transformers_scores(directory, images, prompts):
    """Cosines by transformers' own model, tokenizer padded to the longest, and processor on bytes."""
    model = CLIPModel.from_pretrained(directory).double().eval()
    inputs = clip_tokenizer()(prompts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    processor = CLIPImageProcessorPil.from_pretrained(directory)
    pixels = processor([image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")["pixel_values"]
    logits = model(**inputs, pixel_values=pixels.double()).logits_per_image
    return logits.diagonal() / model.logit_scale.exp()


# --- HPSv2.1: open_clip's names, nothing beside them


@pytest.mark.parametrize("layout", ["file", "directory", "data parallel", "bare", "safetensors"])
def test_hps_is_open_clips_cosine(tmp_path, processor, layout):
    state = open_clip_state()
    path = tmp_path / "HPS_v2.1_compressed.pt"
    if layout == "data parallel":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    elif layout == "bare":
        torch.save(state | {"attn_mask": torch.zeros(LENGTH, LENGTH)}, path)
    elif layout == "safetensors":
        save_file(state, path := tmp_path / "hps.safetensors")
    else:
        torch.save({"epoch": 1, "state_dict": state}, path)
    settings = Reward(path=str(tmp_path if layout == "directory" else path), processor=processor)
    images = pictures()
    scores = find_scorer("hpsv2_1", settings, CPU)(images, PROMPTS)
    assert scores.dtype == torch.float32
    exact = OpenClip(state).scores(pixels_of(images), PROMPTS)
    assert exact.std() > 0.05
    torch.testing.assert_close(scores.double(), exact, **EXACT)


def test_hps_fits_the_longest_edge_and_does_not_clamp(hps_file, processor):
    images = (
        (pictures(6, 10) // 128 * 255).repeat_interleave(3, -1).repeat_interleave(3, -2)
    )  # black and white, 18 x 30
    inside = functional.interpolate(pixels_of(images), (7, 12), mode="bicubic", antialias=True)
    assert inside.max() > 1.01
    pixels = torch.zeros(len(images), 3, 12, 12, dtype=torch.float64)
    pixels[:, :, 2:9] = inside
    scores = hpsv2_1.load("hpsv2_1", Reward(path=hps_file, processor=processor), CPU)(images, PROMPTS)
    torch.testing.assert_close(scores.double(), OpenClip(open_clip_state()).scores(pixels, PROMPTS), **EXACT)


# --- CLIP score: a configuration beside the weights


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("fit", ["squash", "shortest", "longest"])
def test_open_clips_layout(tmp_path, processor, weights, quick_gelu, fit):
    state, images = open_clip_state(), pictures(12, 24)
    if weights.endswith("bin"):
        torch.save(state, tmp_path / weights)
    else:
        save_file(state, tmp_path / weights)
    config = open_clip_config(resize_mode=fit)
    config["model_cfg"]["quick_gelu"] = quick_gelu
    write_json(tmp_path / "open_clip_config.json", config)
    pixels = pixels_of(images)
    if fit == "shortest":
        pixels = pixels[..., 6:18]
    else:
        height = 12 if fit == "squash" else 6
        by_rows = functional.interpolate(pixels, (12, 12), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = functional.interpolate(by_rows, (height, 12), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = functional.pad(pixels, (0, 0, (12 - height) // 2, (12 - height) // 2))
    exact = OpenClip(state, quick_gelu=quick_gelu).scores(pixels, PROMPTS)
    for path in (tmp_path, tmp_path / weights):
        scores = clip.load("clip", Reward(path=str(path), processor=processor), CPU)(images, PROMPTS)
        torch.testing.assert_close(scores.double(), exact, **EXACT)


def test_open_clips_own_mean_and_std(tmp_path, processor):
    state, images = open_clip_state(), pictures()
    save_file(state, tmp_path / "open_clip_model.safetensors")
    write_json(tmp_path / "open_clip_config.json", open_clip_config(mean=[0.5, 0.4, 0.3], std=[0.5, 0.6, 0.7]))
    scores = clip.load("clip", Reward(path=str(tmp_path), processor=processor), CPU)(images, PROMPTS)
    column = {"dtype": torch.float64}
    from_theirs = (pixels_of(images) - torch.tensor([0.5, 0.4, 0.3], **column)[:, None, None]) / torch.tensor(
        [0.5, 0.6, 0.7], **column
    )[:, None, None]
    usual = (
        torch.tensor(clip_scorer.CLIP_MEAN, **column)[:, None, None],
        torch.tensor(clip_scorer.CLIP_STD, **column)[:, None, None],
    )
    exact = OpenClip(state, quick_gelu=True).scores(from_theirs * usual[1] + usual[0], PROMPTS)
    torch.testing.assert_close(scores.double(), exact, **EXACT)


@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded", "2021", "both"])
def test_transformers_layout(tmp_path, hf_directory, layout):
    images = pictures()
    model = CLIPModel.from_pretrained(hf_directory)
    for file in hf_directory.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_text(file.read_text())
    if layout == "sharded":
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    elif layout in ("safetensors", "both"):
        model.save_pretrained(tmp_path)
    else:
        state = model.state_dict()
        if layout == "2021":  # as OpenAI's were converted: position ids among the weights, an end of text nowhere used
            state["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
            state["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
            config = json.loads((tmp_path / "config.json").read_text())
            config["text_config"]["eos_token_id"] = 2
            for tower in ("text_config", "vision_config"):
                config[f"{tower}_dict"] = config[tower]
            write_json(tmp_path / "config.json", config)
        torch.save(state, tmp_path / "pytorch_model.bin")
    if layout == "both":  # then open_clip's is the one
        save_file(open_clip_state(), tmp_path / "open_clip_model.safetensors")
        write_json(tmp_path / "open_clip_config.json", open_clip_config())
        exact = OpenClip(open_clip_state(), quick_gelu=True).scores(pixels_of(images), PROMPTS)
    else:
        exact = transformers_scores(hf_directory, images, PROMPTS)
        assert exact.std() > 0.05
    scores = clip.load("clip", Reward(path=str(tmp_path)), CPU)(images, PROMPTS)
    torch.testing.assert_close(scores.double(), exact, **EXACT)


@pytest.mark.parametrize("height, width", [(40, 40), (21, 12), (12, 19), (48, 31)])
def test_transformers_layout_prepares_bytes_as_its_processor(hf_directory, height, width):
    images = pictures(height, width)
    scores = clip.load("clip", Reward(path=str(hf_directory)), CPU)(images, PROMPTS)
    exact = transformers_scores(hf_directory, images, PROMPTS)
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-2)  # bytes are rounded, ours are not
    assert (scores - exact).abs().max() < 0.1 * exact.std()


def test_a_preprocessor_that_squashes(tmp_path, hf_directory):
    CLIPModel.from_pretrained(hf_directory).save_pretrained(tmp_path)
    clip_tokenizer().save_pretrained(tmp_path)
    edges = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(size=edges, crop_size=edges, image_mean=[0.5] * 3, image_std=[0.4] * 3).save_pretrained(
        tmp_path
    )
    images = pictures(24, 15)
    scores = clip.load("clip", Reward(path=str(tmp_path)), CPU)(images, PROMPTS)
    exact = transformers_scores(tmp_path, images, PROMPTS)
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-2)
    assert (scores - exact).abs().max() < 0.1 * exact.std()


# --- PickScore


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pickscore_is_scaled_by_the_model(hf_directory, dtype):
    images = pictures(SIZE, SIZE + 3)  # of which transformers cuts 1 on the left
    scorer = pickscore.load("pickscore", Reward(path=str(hf_directory), dtype=dtype), CPU)
    assert scorer.scale == pytest.approx(math.exp(4.6052), rel=1e-6)  # of bfloat16's digits, 98.9
    if dtype == "float32":
        exact = math.exp(4.6052) * transformers_scores(hf_directory, images, PROMPTS)
        torch.testing.assert_close(scorer(images, PROMPTS).double(), exact, rtol=0, atol=2e-4)


def test_pickscore_takes_a_file_beside_its_configuration(hf_directory):
    images = pictures()
    by_directory = pickscore.load("pickscore", Reward(path=str(hf_directory)), CPU)
    by_file = pickscore.load("pickscore", Reward(path=str(hf_directory / "model.safetensors")), CPU)
    assert torch.equal(by_directory(images, PROMPTS), by_file(images, PROMPTS))


# --- aesthetic


def mlp_state(features):
    generator = torch.Generator().manual_seed(1)
    state, widths = {}, [features, 1024, 128, 64, 16, 1]
    for i, (name, before, after) in enumerate(zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False)):
        weight = torch.randn(after, before, generator=generator) * before**-0.5
        state |= {f"layers.{name}.weight": weight, f"layers.{name}.bias": torch.full((after,), 0.1 * i)}
    return state


@pytest.mark.parametrize("layout", ["transformers", "open_clip"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_aesthetic_is_an_mlp_of_the_unit_embedding(tmp_path, hf_directory, layout, dtype):
    images, state = pictures(SIZE, SIZE + 3), mlp_state(EMBED)
    centre = images[..., 2:-1]  # as torchvision cuts it out
    torch.save(state, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    if layout == "transformers":
        tower = hf_directory
        pixels = CLIPImageProcessorPil.from_pretrained(tower)(
            [image.permute(1, 2, 0).numpy() for image in centre], return_tensors="pt"
        )["pixel_values"]
        with torch.no_grad():
            embedding = CLIPModel.from_pretrained(tower).double().get_image_features(pixels.double()).pooler_output
        x = embedding / embedding.norm(dim=-1, keepdim=True)
    else:
        tower = tmp_path / "tower"
        tower.mkdir()
        save_file(open_clip_state(), tower / "open_clip_model.safetensors")
        write_json(tower / "open_clip_config.json", open_clip_config())
        x = OpenClip(open_clip_state(), quick_gelu=True).images(pixels_of(centre))
    for name in (0, 2, 4, 6, 7):
        x = functional.linear(x, *(state[f"layers.{name}.{kind}"].double() for kind in ("weight", "bias")))
    assert x.std() > 0.02
    scorer = aesthetic.load("aesthetic", Reward(path=str(tmp_path), processor=str(tower), dtype=dtype), CPU)
    scores = scorer(images, PROMPTS)
    assert torch.equal(scores, scorer(images, ["another"] * len(images)))
    torch.testing.assert_close(scores.double(), x[:, 0], rtol=0, atol=3e-6 if dtype == "float32" else 0.05)
    embedded = scorer.embed_images(images.float() / 255)
    # The MLP is exact whatever the tower's arithmetic.
    x = embedded.double()
    for name in (0, 2, 4, 6, 7):
        x = functional.linear(x, *(state[f"layers.{name}.{kind}"].double() for kind in ("weight", "bias")))
    torch.testing.assert_close(scores.double(), x[:, 0], rtol=0, atol=1e-6)


# --- CLIP-IQA


@pytest.mark.parametrize("texts", [{}, {"good": "a red circle", "bad": "a blue star"}], ids=["quality", "of ones own"])
def test_clip_iqa_is_the_share_of_the_good_text_in_a_softmax(hf_directory, texts):
    """By transformers' own logits for the two texts, which stand in for every prompt."""
    images = pictures(SIZE, SIZE + 3)
    both = list(texts.values()) or ["Good photo.", "Bad photo."]
    cosines = torch.stack([transformers_scores(hf_directory, images, [text] * len(images)) for text in both], 1)
    exact = (math.exp(4.6052) * cosines).softmax(1)[:, 0]
    assert exact.std() > 0.05
    scorer = find_scorer("clip_iqa", ClipIqa(path=str(hf_directory), batch=4, **texts), CPU)
    scores = scorer(images, PROMPTS)
    assert torch.equal(scores, scorer(images, ["another"] * len(images)))
    # A sigmoid's slope is at most 1/4, and its argument is 100 times the difference of two cosines.
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=25 * 2 * EXACT["atol"])


# --- what all of them do


@pytest.fixture(params=["hpsv2_1", "pickscore", "clip", "clip_iqa", "aesthetic"])
def any_scorer(request, tmp_path, hps_file, hf_directory, processor):
    """Loads a scorer by further settings."""
    settings = {"path": str(hf_directory)}
    if request.param == "hpsv2_1":
        settings = {"path": hps_file, "processor": processor}
    elif request.param == "aesthetic":
        torch.save(mlp_state(EMBED), tmp_path / "mlp.pth")
        settings = {"path": str(tmp_path / "mlp.pth"), "processor": str(hf_directory)}
    elif request.param == "clip_iqa":
        settings |= {"good": "a red circle", "bad": "a blue star"}  # the usual texts are 0 or 1 with these weights
    kind = settings_class(request.param)
    return lambda device=CPU, **more: find_scorer(request.param, kind(**settings | more), device)


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_batches_are_single_pictures(any_scorer, batch):
    images = pictures(20, 14)
    scores = any_scorer(batch=batch)(images, PROMPTS)
    scorer = any_scorer()
    singles = torch.cat([scorer(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(len(images))])
    torch.testing.assert_close(scores, singles, rtol=0, atol=1e-6 * getattr(scorer, "scale", 1.0))


def test_each_distinct_prompt_is_encoded_once(hf_directory, monkeypatch):
    scorer = clip.load("clip", Reward(path=str(hf_directory), batch=2), CPU)
    images, tokenized, encoded = pictures(), [], []
    text_features, tokens = scorer.model.get_text_features, scorer.tokens
    monkeypatch.setattr(
        scorer.model, "get_text_features", lambda ids: (encoded.append(len(ids)), text_features(ids))[1]
    )
    monkeypatch.setattr(scorer, "tokens", lambda prompts: (tokenized.append(list(prompts)), tokens(prompts))[1])
    scorer(images, PROMPTS)
    assert tokenized == [PROMPTS[:5]]  # the sixth is the third again
    assert encoded == [2, 2, 1]


def test_bfloat16_scores_are_close_and_formed_in_float32(any_scorer):
    images = pictures()
    exact, scorer = any_scorer()(images, PROMPTS), any_scorer(dtype="bfloat16")
    assert {parameter.dtype for parameter in scorer.parameters()} == {torch.bfloat16}
    scores = scorer(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    assert (scores - exact).abs().max() < 0.3 * exact.std()
    torch.testing.assert_close(scorer.embed_images(images.float() / 255).norm(dim=-1), torch.ones(len(images)))


def test_offloaded_weights_wait_on_the_cpu_and_score_alike(any_scorer, monkeypatch):
    images, scorer, moves = pictures(), any_scorer(offload=True), []
    to = scorer.to
    monkeypatch.setattr(scorer, "to", lambda where: (moves.append(str(where)), to(where))[1])
    assert torch.equal(scorer(images, PROMPTS), any_scorer()(images, PROMPTS))
    assert moves == ["cpu", "cpu"]  # to the device, which here is the CPU too, and back
    assert {tensor.device.type for tensor in (*scorer.parameters(), *scorer.buffers())} == {"cpu"}
    assert not any(parameter.requires_grad for parameter in scorer.parameters())
    assert not scorer.training


@pytest.mark.gpu
def test_a_gpu_scores_as_the_cpu_does(any_scorer):
    images, device = pictures(), torch.device("cuda")
    expected = any_scorer()(images, PROMPTS)
    close = {"rtol": 0, "atol": 0.02 * expected.std().item()}  # cuDNN's convolutions may round their inputs to tf32
    for settings in ({}, {"offload": True}, {"batch": 2}):
        scorer = any_scorer(device, **settings)
        scores = scorer(images.to(device), PROMPTS)
        assert scores.device.type == "cuda"
        torch.testing.assert_close(scores.cpu(), expected, **close)
        torch.testing.assert_close(scorer(images, PROMPTS).cpu(), expected, **close)
        kept = {parameter.device.type for parameter in scorer.parameters()}
        assert kept == {"cpu" if settings.get("offload") else "cuda"}


def test_pixels_get_the_gradient_of_the_formula(hps_file, processor):
    images = pictures(20, 20)
    scorer = hpsv2_1.load("hpsv2_1", Reward(path=hps_file, processor=processor), CPU)
    pixels = (images.float() / 255).requires_grad_()
    scores = scorer.differentiable(pixels, PROMPTS)
    weights = torch.arange(1.0, 7.0)
    (gradient,) = torch.autograd.grad((weights * scores).sum(), pixels)
    double = pixels_of(images).requires_grad_()
    inside = functional.interpolate(double, (SIZE, SIZE), mode="bicubic", antialias=True)
    exact = OpenClip(open_clip_state()).scores(inside, PROMPTS)
    (exact_gradient,) = torch.autograd.grad((weights * exact).sum(), double)
    torch.testing.assert_close(scores.double(), exact, **EXACT)
    scale = exact_gradient.abs().max()
    assert scale > 1e-3
    torch.testing.assert_close(gradient.double() / scale, exact_gradient / scale, rtol=0, atol=1e-5)


def test_every_scorer_is_differentiable(any_scorer):
    scorer = any_scorer()
    generator = torch.Generator().manual_seed(0)
    pixels = (pictures(20, 26).float() / 510 + 0.25).requires_grad_()  # away from the clamp
    direction = torch.randn(pixels.shape, generator=generator)
    scores = scorer.differentiable(pixels, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    with torch.no_grad():
        ahead, behind = (scorer.differentiable(pixels + step * direction, PROMPTS).sum() for step in (2e-3, -2e-3))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / 4e-3, rtol=0.02, atol=1e-3)


def test_embeddings_are_open_clips_and_of_unit_length(hps_file, processor):
    scorer = hpsv2_1.load("hpsv2_1", Reward(path=hps_file, processor=processor), CPU)
    images = pictures()
    embedded = scorer.embed_images(images.float() / 255)
    assert embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.double(), OpenClip(open_clip_state()).images(pixels_of(images)), **EXACT)


# --- tokens


BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def words(scorer, prompt):
    ids = scorer.tokens([prompt])[0].tolist()
    end = ids.index(scorer.tokenizer.eos_token_id)
    assert ids[end + 1 :] == [0] * (LENGTH - end - 1)
    return scorer.tokenizer.convert_ids_to_tokens(ids[: end + 1])


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("", []),
        ("a red circle", ["a</w>", "red</w>", "circle</w>"]),
        ("  A\tRed\n\n CIRCLE ", ["a</w>", "red</w>", "circle</w>"]),
        ("a &quot;red&quot;", ["a</w>", '"</w>', "red</w>", '"</w>']),
        ("red &amp;lt; red", ["red</w>", "<</w>", "red</w>"]),
        ("red's 42", ["red</w>", "'", "s</w>", "4</w>", "2</w>"]),
        ("é", ["Ã", "©</w>"]),  # bytes C3 A9
        ("🐈", ["ð", "Ł", "Ĳ", "Ī</w>"]),  # bytes F0 9F 90 88
        ("red " * 300, ["red</w>"] * (LENGTH - 2)),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_tokens(hps_file, processor, prompt, expected):
    scorer = hpsv2_1.load("hpsv2_1", Reward(path=hps_file, processor=processor), CPU)
    assert words(scorer, prompt) == [BOS, *expected, EOS]


def test_typography_is_mended_with_ftfy_and_its_absence_told(hps_file, processor, monkeypatch, caplog):
    settings = Reward(path=hps_file, processor=processor)
    scorer = hpsv2_1.load("hpsv2_1", settings, CPU)
    monkeypatch.setattr(clip_scorer, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, "ngrpo_train.rewards.clip_scorer"):
        hpsv2_1.load("hpsv2_1", settings, CPU)
    assert "rewards.hpsv2_1: without ftfy" in caplog.text
    assert words(scorer, "&amp;quot;")[1:-1] == ['"</w>']
    assert words(scorer, "“")[1:-1] == ["â", "Ģ", "ľ</w>"]  # bytes E2 80 9C
    monkeypatch.undo()
    pytest.importorskip("ftfy")
    assert words(scorer, "“")[1:-1] == ['"</w>']


def test_pickscore_takes_prompts_as_they_are(hf_directory):
    assert words(clip.load("clip", Reward(path=str(hf_directory)), CPU), "&lt;")[1:-1] == ["<</w>"]
    scorer = pickscore.load("pickscore", Reward(path=str(hf_directory)), CPU)
    assert words(scorer, "&lt;")[1:-1] == ["&</w>", "l", "t</w>", ";</w>"]
    assert words(scorer, "“")[1:-1] == ["â", "Ģ", "ľ</w>"]


def test_ids_are_padded_as_open_clips(hps_file, processor):
    scorer = hpsv2_1.load("hpsv2_1", Reward(path=hps_file, processor=processor), CPU)
    assert torch.equal(scorer.tokens(PROMPTS), padded_ids(PROMPTS))


def test_tokenizer_of_vocabulary_and_merges(tmp_path, hps_file, processor):
    model = json.loads((Path(processor) / "tokenizer.json").read_text())["model"]
    write_json(tmp_path / "vocab.json", model["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    scorer = hpsv2_1.load("hpsv2_1", Reward(path=hps_file, processor=str(tmp_path)), CPU)
    assert torch.equal(scorer.tokens(PROMPTS), padded_ids(PROMPTS))
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"has none of merges\.txt"):
        hpsv2_1.load("hpsv2_1", Reward(path=hps_file, processor=str(tmp_path)), CPU)


# --- what cannot be used


def refused(name, **settings):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        find_scorer(name, Reward(**settings), CPU)
    text = str(error.value)
    assert text.startswith(f"rewards.{name}: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "name, command",
    [
        ("hpsv2_1", "`hf download xswu/HPSv2 HPS_v2.1_compressed.pt`"),
        ("pickscore", "`hf download yuvalkirstain/PickScore_v1 config.json model.safetensors`"),
        (
            "clip",
            "`hf download apple/DFN5B-CLIP-ViT-H-14-384 open_clip_config.json open_clip_pytorch_model.bin "
            "tokenizer.json`",
        ),
        ("aesthetic", "`hf download openai/clip-vit-large-patch14 config.json model.safetensors`"),
    ],
)
def test_missing_weights_offline_the_command_is_told(name, command):
    assert command in refused(name)


def test_other_files_missing_offline(hps_file, hf_directory):
    assert "`hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K tokenizer.json`" in refused("hpsv2_1", path=hps_file)
    mlp = "`hf download camenduru/improved-aesthetic-predictor sac+logos+ava1-l14-linearMSE.pth`"
    assert mlp in refused("aesthetic", processor=str(hf_directory))
    assert "`hf download some/clip`" in refused("clip", path="some/clip")


def test_each_others_files(tmp_path, hps_file, hf_directory, processor):
    hf_file = str(hf_directory / "model.safetensors")
    text = refused("pickscore", path=hps_file, processor=processor)
    assert "HPS_v2.1_compressed.pt is not a file for this scorer: expected a CLIP by transformers' names" in text
    assert "found logit_scale, text_projection" in text
    text = refused("hpsv2_1", path=hf_file, processor=processor)
    assert "model.safetensors is not a file for this scorer: expected open_clip's weight visual.conv1.weight" in text
    text = refused("aesthetic", path=hf_file, processor=str(hf_directory))
    assert "expected the weight layers.0.weight, found only names such as" in text
    text = refused("clip", path=hps_file, processor=processor)
    assert "has none of open_clip_config.json" in text


def test_files_of_something_else(tmp_path, hf_directory, processor):
    lora = {"base_model.model.q.lora_A.weight": torch.ones(2, 2), "base_model.model.q.lora_B.weight": torch.ones(2, 2)}
    save_file(lora, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((hf_directory / "config.json").read_text())
    settings = {"path": str(tmp_path), "processor": processor}
    assert "found base_model.model.q.lora_A.weight" in refused("pickscore", **settings)
    assert "found only names such as base_model" in refused("clip", **settings)
    file = str(tmp_path / "model.safetensors")
    assert "found only names such as base_model" in refused("hpsv2_1", path=file, processor=processor)
    write_json(tmp_path / "config.json", {"model_type": "siglip"})
    assert "expected model_type \"clip\", found 'siglip'" in refused("clip", path=str(tmp_path))


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            lambda s: s | {"visual.extra": torch.ones(1)},
            "expected only the weights of open_clip's CLIP, found visual.ex",
        ),
        (
            lambda s: s | {"transformer.resblocks.0.ls_1.weight": torch.ones(1)},
            "found transformer.resblocks.0.ls_1.wei",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "resblocks.0.mlp.c_fc" not in k},
            "expected the weight text_model.en",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "text_projection"},
            "expected open_clip's weight text_projection",
        ),
        (
            lambda s: s | {"visual.proj": torch.ones(VISION_WIDTH, EMBED + 1)},
            "visual_projection.weight of shape [24, 160]",
        ),
        (
            lambda s: s | {"visual.conv1.weight": torch.ones(VISION_WIDTH, 48)},
            "visual.conv1.weight of 4 dimensions, fou",
        ),
        (
            lambda s: s | {"visual.conv1.weight": torch.ones(96, 3, 4, 4)},
            "a vision tower of heads 80 wide, found one 96",
        ),
    ],
    ids=["surplus", "surplus in a block", "lacks a layer", "lacks an end", "shape", "dimensions", "another ViT"],
)
def test_almost_the_right_checkpoint(tmp_path, processor, change, complaint):
    torch.save({"state_dict": change(open_clip_state())}, tmp_path / "a.pt")
    text = refused("hpsv2_1", path=str(tmp_path / "a.pt"), processor=processor)
    assert complaint in text


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"model_cfg": {"vision_cfg": {"timm_model_name": "convnext"}}}, "vision_cfg.timm_model_name = 'convnext'"),
        ({"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}, "expected the setting image_size of a CLIP"),
        ({"preprocess_cfg": {"interpolation": "bilinear"}}, "other than bicubic resizing"),
        (
            {"preprocess_cfg": {"resize_mode": "stretch"}},
            "resize_mode = 'stretch' is not one of shortest, longest, squash",
        ),
    ],
)
def test_open_clip_configurations_that_are_not_read(tmp_path, processor, change, complaint):
    save_file(open_clip_state(), tmp_path / "open_clip_model.safetensors")
    write_json(tmp_path / "open_clip_config.json", open_clip_config() | change)
    assert complaint in refused("clip", path=str(tmp_path), processor=processor)


@pytest.mark.parametrize(
    "fields",
    [{"size": 20}, {"resample": 2}, {"do_normalize": False}, {"do_center_crop": False}, {"crop_size": 10}],
    ids=str,
)
def test_preprocessors_that_are_not_ours(tmp_path, hf_directory, fields):
    CLIPModel.from_pretrained(hf_directory).save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", {"size": SIZE, "crop_size": SIZE} | fields)
    assert "asks for another preprocessing than this scorer has" in refused("clip", path=str(tmp_path))


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path, processor):
    state = open_clip_state()
    state["token_embedding.weight"] = state["token_embedding.weight"][:500]
    torch.save(state, tmp_path / "a.pt")
    assert "has embeddings for 500 tokens" in refused("hpsv2_1", path=str(tmp_path / "a.pt"), processor=processor)


def test_what_is_no_tokenizer(tmp_path, hps_file):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is no CLIP tokenizer: " in refused("hpsv2_1", path=hps_file, processor=str(tmp_path))
    assert "is no file, no directory and no hub id" in refused("hpsv2_1", path=hps_file, processor="nowhere")


@pytest.mark.parametrize("name", ["hpsv2_1", "pickscore", "clip", "aesthetic"])
def test_backends_of_other_rewards(name):
    assert "backend = 'image-reward' is not for this reward" in refused(name, backend="image-reward")
