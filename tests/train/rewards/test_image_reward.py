"""ImageReward: its file read by the official names, and scored, against BLIP's forward pass written out in float64."""

import json
import math
import re

import pytest
import torch
from torch.nn import functional

from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import find_scorer
from ngrpo_train.rewards.shipped import image_reward

CPU = torch.device("cpu")
SIZE, PATCH, VISION, TEXT, LAYERS, POSITIONS = 32, 8, 128, 192, 2, 48
HEADS = {VISION: 2, TEXT: 3}
MLP = {0: (24, TEXT), 2: (16, 24), 4: (8, 16), 6: (4, 8), 7: (1, 4)}  # the other numbers are dropouts

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["a", "dog", "cat", "red", "circle", "on", "the", "##ed", ",", ".", "'", '"', "!", "50"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"##{letter}" for letter in LETTERS)]
ROW = {token: row for row, token in enumerate([*VOCABULARY, "[DEC]", "[ENC]"])}

PROMPTS = {  # as BERT splits them: lower case, no accents, longest pieces first, unknown as a whole
    "a red circle": "a red circle",
    "": "",
    "A Dog, on the 'RED' circles!": "a dog , on the ' red ' circle ##s !",
    "the dógs 🐈 [ENC]": "the dog ##s [UNK] [ENC]",
    "a red circle on the zebra": "a red circle on the [UNK]",
}


def ids_of(prompt):
    tokens = ["[CLS]", *PROMPTS[prompt].split(), "[SEP]"]
    return [ROW[token] for token in tokens]


# --- a tiny file by the official names, and what it means


def official_state():
    """Weights large enough for every one of them to move the score."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def parameter(name, *shape, std):
        state[name] = std * torch.randn(shape, generator=generator)

    def linear(name, out, into):
        parameter(f"{name}.weight", out, into, std=into**-0.5)
        parameter(f"{name}.bias", out, std=0.2)

    def norm(name, width):
        parameter(f"{name}.weight", width, std=0.2)
        state[f"{name}.weight"] += 1
        parameter(f"{name}.bias", width, std=0.2)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    parameter(f"{vision}.cls_token", 1, 1, VISION, std=0.5)
    parameter(f"{vision}.pos_embed", 1, (SIZE // PATCH) ** 2 + 1, VISION, std=0.5)
    parameter(f"{vision}.patch_embed.proj.weight", VISION, 3, PATCH, PATCH, std=0.1)
    parameter(f"{vision}.patch_embed.proj.bias", VISION, std=0.2)
    for layer in range(LAYERS):
        block = f"{vision}.blocks.{layer}"
        norm(f"{block}.norm1", VISION)
        linear(f"{block}.attn.qkv", 3 * VISION, VISION)
        linear(f"{block}.attn.proj", VISION, VISION)
        norm(f"{block}.norm2", VISION)
        linear(f"{block}.mlp.fc1", 2 * VISION, VISION)
        linear(f"{block}.mlp.fc2", VISION, 2 * VISION)
    norm(f"{vision}.norm", VISION)

    state[f"{text}.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    parameter(f"{text}.embeddings.word_embeddings.weight", len(ROW), TEXT, std=1.0)
    parameter(f"{text}.embeddings.position_embeddings.weight", POSITIONS, TEXT, std=0.5)
    norm(f"{text}.embeddings.LayerNorm", TEXT)
    for layer in range(LAYERS):
        block = f"{text}.encoder.layer.{layer}"
        for attention, width in (("attention", TEXT), ("crossattention", VISION)):
            linear(f"{block}.{attention}.self.query", TEXT, TEXT)
            linear(f"{block}.{attention}.self.key", TEXT, width)
            linear(f"{block}.{attention}.self.value", TEXT, width)
            linear(f"{block}.{attention}.output.dense", TEXT, TEXT)
            norm(f"{block}.{attention}.output.LayerNorm", TEXT)
        linear(f"{block}.intermediate.dense", 2 * TEXT, TEXT)
        linear(f"{block}.output.dense", TEXT, 2 * TEXT)
        norm(f"{block}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", 16, VISION)
    linear("blip.text_proj", 16, TEXT)
    for layer, (out, into) in MLP.items():
        linear(f"mlp.layers.{layer}", out, into)
    return state


def expected_score(state, pixels, ids, heads=HEADS[TEXT]):
    """Float64 for pixels [3, SIZE, SIZE] in [0, 1] and the ids of one prompt, without any padding."""
    state = {name: value.double() for name, value in state.items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name, eps):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attend(query, key, value, heads):
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (query, key, value))
        weight = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        return (weight @ value).transpose(0, 1).flatten(1)

    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None, None]
    pixels = (pixels.double() - mean) / std
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    side = SIZE // PATCH
    patches = pixels.view(3, side, PATCH, side, PATCH).permute(1, 3, 0, 2, 4).reshape(side**2, -1)
    patches = patches @ state[f"{vision}.patch_embed.proj.weight"].flatten(1).T
    patches = patches + state[f"{vision}.patch_embed.proj.bias"]
    x = torch.cat([state[f"{vision}.cls_token"][0], patches]) + state[f"{vision}.pos_embed"][0]
    for layer in range(LAYERS):
        block = f"{vision}.blocks.{layer}"
        query, key, value = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(query, key, value, HEADS[VISION]), f"{block}.attn.proj")
        hidden = functional.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    seen = norm(x, f"{vision}.norm", 1e-6)

    x = state[f"{text}.embeddings.word_embeddings.weight"][ids]
    x = x + state[f"{text}.embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x, f"{text}.embeddings.LayerNorm", 1e-12)
    for layer in range(LAYERS):
        block = f"{text}.encoder.layer.{layer}"
        for attention in ("attention", "crossattention"):
            name = f"{block}.{attention}"
            source = x if attention == "attention" else seen
            query = linear(x, f"{name}.self.query")
            key, value = linear(source, f"{name}.self.key"), linear(source, f"{name}.self.value")
            read = linear(attend(query, key, value, heads), f"{name}.output.dense")
            x = norm(x + read, f"{name}.output.LayerNorm", 1e-12)
        hidden = functional.gelu(linear(x, f"{block}.intermediate.dense"))
        x = norm(x + linear(hidden, f"{block}.output.dense"), f"{block}.output.LayerNorm", 1e-12)
    x = x[0]
    for layer in MLP:
        x = linear(x, f"mlp.layers.{layer}")
    return (x[0] - 0.16717362830052426) / 1.0333394966054072


def pictures(count, height=SIZE, width=SIZE):
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def state():
    return official_state()


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bert")
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    return str(directory)


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    file = tmp_path_factory.mktemp("image_reward") / "ImageReward.pt"
    torch.save(state, file)
    return file


@pytest.fixture
def load(file, processor):
    def load(device=CPU, **settings):
        settings = {"path": str(file), "processor": processor} | settings
        return image_reward.load("image_reward", Reward(**settings), device)

    return load


def expected_scores(state, images, prompts, **settings):
    pixels = images.double() / 255
    scores = [expected_score(state, *each, **settings) for each in zip(pixels, map(ids_of, prompts), strict=True)]
    return torch.stack(scores).float()


# --- scores


def test_scores_are_the_formula(load, state):
    images, prompts = pictures(len(PROMPTS)), list(PROMPTS)
    expected = expected_scores(state, images, prompts)
    assert expected.std() > 0.1
    other_pictures = expected_scores(state, images.flip(0), prompts)
    assert (expected - other_pictures).abs().amax() > 0.05  # so that the comparison sees the picture
    got = load()(images, prompts)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_norms_add_blips_small_constants(state, processor, tmp_path):
    """Inputs as small as the constants under the roots, 1e-6 and 1e-12, tell them from others."""
    inputs = re.compile(r".*(cls_token|pos_embed|patch_embed|word_embeddings|position_embeddings)")
    small = {name: value * (1e-3 if inputs.match(name) else 1) for name, value in state.items()}
    torch.save(small, tmp_path / "ImageReward.pt")
    images, prompts = pictures(2), list(PROMPTS)[:2]
    scorer = image_reward.load("image_reward", Reward(path=str(tmp_path), processor=processor), CPU)
    torch.testing.assert_close(scorer(images, prompts), expected_scores(small, images, prompts), rtol=0, atol=1e-5)


def test_batches_and_single_pictures_score_alike(load):
    images, prompts = pictures(7), [*PROMPTS, *list(PROMPTS)[:2]]
    together = load()(images, prompts)
    torch.testing.assert_close(load(batch=3)(images, prompts), together, rtol=0, atol=2e-6)
    singles = [load()(images[i : i + 1], [prompts[i]]) for i in range(7)]
    torch.testing.assert_close(torch.cat(singles), together, rtol=0, atol=2e-6)


def test_the_centre_is_cut_where_torchvision_cuts_it(load, state):
    tall = pictures(2, height=SIZE + 3)  # 1.5 pixels above: 2
    prompts = list(PROMPTS)[:2]
    expected = expected_scores(state, tall[..., 2 : 2 + SIZE, :], prompts)
    torch.testing.assert_close(load()(tall, prompts), expected, rtol=0, atol=1e-5)


def test_larger_pictures_are_reduced(load, state):
    """Where four pixels by four are one colour, a reduction by four gives (nearly) that colour back."""
    small = functional.interpolate(pictures(1, 4, 4).float(), SIZE, mode="bicubic").clamp(0, 255).round()
    large = small.repeat_interleave(4, -1).repeat_interleave(4, -2).to(torch.uint8)
    prompt = list(PROMPTS)[:1]
    expected, other = (expected_scores(state, image, prompt) for image in (small, pictures(1)))
    scorer = load()
    assert (scorer(large, prompt) - expected).abs() < 0.1 * (other - expected).abs()


def test_pixels_get_the_formulas_gradient(load, state):
    prompts = list(PROMPTS)[:2]
    pixels = (pictures(2) / 255).requires_grad_()
    load().differentiable(pixels, prompts).sum().backward()
    exact = pixels.detach().double().requires_grad_()
    for image, prompt in zip(exact, prompts, strict=True):
        expected_score(state, image, ids_of(prompt)).backward()
    assert exact.grad.abs().amax() > 1e-4
    torch.testing.assert_close(pixels.grad, exact.grad.float(), rtol=0, atol=1e-4 * exact.grad.abs().amax().item())


def test_bfloat16_towers_have_a_float32_head(load, state):
    images, prompts = pictures(len(PROMPTS)), list(PROMPTS)
    scorer = load(dtype="bfloat16")
    assert {p.dtype for module in (scorer.vision, scorer.text) for p in module.parameters()} == {torch.bfloat16}
    for layer in MLP:
        assert torch.equal(scorer.mlp.get_submodule(str(layer)).weight, state[f"mlp.layers.{layer}.weight"])
    got, expected = scorer(images, prompts), expected_scores(state, images, prompts)
    assert got.dtype == torch.float32
    assert not torch.equal(got, got.bfloat16().float())
    assert 0 < (got - expected).abs().max() < 0.15 * expected.std()


def test_offloaded_weights_visit_the_device(load, monkeypatch):
    images, prompts = pictures(2), list(PROMPTS)[:2]
    expected, scorer = load()(images, prompts), load(offload=True)
    moves = []
    monkeypatch.setattr(scorer, "to", lambda where: moves.append(str(where)))
    assert torch.equal(scorer(images, prompts), expected)
    assert moves == ["cpu", "cpu"]  # there and back
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in scorer.parameters())


# --- prompts


@pytest.mark.gpu
def test_a_gpu_scores_as_the_cpu_does(load):
    images, prompts, device = pictures(len(PROMPTS)), list(PROMPTS), torch.device("cuda")
    expected = load()(images, prompts)
    close = {"rtol": 0, "atol": 0.02 * expected.std().item()}  # cuDNN's convolutions may round their inputs to tf32
    for settings in ({}, {"offload": True}):
        scores = load(device, **settings)(images.to(device), prompts)
        assert scores.device.type == "cuda"
        torch.testing.assert_close(scores.cpu(), expected, **close)


def test_prompts_become_berts_tokens(load):
    ids, mask = load().encode(list(PROMPTS))
    assert ids.shape == mask.shape == (len(PROMPTS), 35)
    for row, seen, prompt in zip(ids.tolist(), mask.tolist(), PROMPTS, strict=True):
        tokens = ids_of(prompt)
        assert row == tokens + [0] * (35 - len(tokens))
        assert seen == [1] * len(tokens) + [0] * (35 - len(tokens))


def test_long_prompts_are_cut_to_35_tokens(load, state):
    scorer, images = load(), pictures(2)
    prompts = [" ".join(["red", "dog", "circle"] * 100), " ".join(["red", "dog", "circle"] * 11 + ["cat"] * 267)]
    cut = [ROW["[CLS]"], *[ROW["red"], ROW["dog"], ROW["circle"]] * 11, ROW["[SEP]"]]
    ids, mask = scorer.encode(prompts)
    assert ids.tolist() == [cut, cut]
    assert mask.all()
    expected = torch.stack([expected_score(state, image / 255, cut) for image in images]).float()
    torch.testing.assert_close(scorer(images, prompts), expected, rtol=0, atol=1e-5)


def test_each_distinct_prompt_is_tokenised_once(load, monkeypatch):
    scorer, seen = load(batch=2), []
    encode = scorer.encode
    monkeypatch.setattr(scorer, "encode", lambda prompts: seen.append(list(prompts)) or encode(prompts))
    scorer(pictures(6), ["a dog"] * 3 + ["a cat"] * 3)
    assert seen == [["a dog", "a cat"]]


# --- files


def test_a_directory_may_have_the_tokenizer_too(state, processor, load, tmp_path):
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    images, prompts = pictures(2), list(PROMPTS)[:2]
    got = find_scorer("image_reward", Reward(path=str(tmp_path)), CPU)(images, prompts)
    assert torch.equal(got, load()(images, prompts))


def test_med_config_has_a_say_in_heads(state, processor, tmp_path):
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps({"num_attention_heads": 12, "vocab_size": 30524}))
    images, prompts = pictures(2), list(PROMPTS)[:2]
    settings = Reward(path=str(tmp_path), processor=processor)
    expected = expected_scores(state, images, prompts, heads=12)
    assert (expected - expected_scores(state, images, prompts)).abs().min() > 1e-3
    got = image_reward.load("image_reward", settings, CPU)(images, prompts)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def changed(state, **changes):
    return {name: value for name, value in (state | changes).items() if value is not None}


KEY = "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({KEY: None}, "expected the weight text.encoder.layer.1.crossattention.self.key.weight, found only names such"),
        ({KEY: torch.ones(TEXT, 7)}, rf"1\.crossattention.* of shape \[{TEXT}, {VISION}\], found one of \[{TEXT}, 7\]"),
        ({"blip.visual_encoder.cls_token": None}, "ImageReward's weight blip.visual_encoder.cls_token, found only"),
        ({"mlp.layers.7.weight": None}, "expected .* weights, found mlp.7.bias and 0 more beside them"),
        ({"blip.itm_head.weight": torch.ones(2)}, "found blip.itm_head.weight and 0 more beside them"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(state, processor, tmp_path, changes, complaint):
    torch.save(changed(state, **changes), tmp_path / "x.pt")
    settings = Reward(path=str(tmp_path / "x.pt"), processor=processor)
    with pytest.raises(
        ValueError, match=rf"^rewards\.image_reward: .*x\.pt is not a file for this scorer: .*{complaint}"
    ):
        find_scorer("image_reward", settings, CPU)


def test_other_files_are_refused(load, tmp_path):
    torch.save({"state_dict": {"visual.conv1.weight": torch.ones(2)}}, tmp_path / "hps.pt")
    with pytest.raises(ValueError, match=r"hps\.pt is not a file for this .*, found only names such as visual\.conv1"):
        load(path=str(tmp_path / "hps.pt"))
    with pytest.raises(ValueError, match=r"has none of ImageReward\.pt$"):
        load(path=str(tmp_path))
    with pytest.raises(ValueError, match=r"THUDM/ImageReward .*`hf download THUDM/ImageReward ImageReward\.pt`"):
        load(path="")


def test_tokenizers_that_do_not_fit_are_refused(load, tmp_path):
    with pytest.raises(
        ValueError, match=r"google-bert/bert-base-uncased .*`hf download google-bert/bert-base-uncased "
    ):
        load(processor="")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has none of vocab\.txt, tokenizer\.json$"):
        load(processor=str(tmp_path / "empty"))
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, "more"]), encoding="utf-8")
    complaint = f"processor = '{tmp_path}' has {len(ROW) + 1} tokens, and the weights have embeddings for {len(ROW)}"
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}$"):
        load(processor=str(tmp_path))


def test_another_rewards_backend_is_refused(load):
    with pytest.raises(
        ValueError, match=r'^backend = \'hpsv2\' is not for this reward, which has "native" and "image-r'
    ):
        load(backend="hpsv2")
