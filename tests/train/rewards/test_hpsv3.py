"""HPSv3: its file read by the official names, and scored, against Qwen2-VL's forward pass written out in float64."""

import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import Qwen2VLImageProcessorPil

from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import find_scorer
from ngrpo_train.rewards.pixels import normalise, resize
from ngrpo_train.rewards.qwen2_vl import picture_size
from ngrpo_train.rewards.shipped import hpsv3

CPU = torch.device("cpu")
VISION, VISION_HEADS, TEXT, HEADS, KEY_HEADS, INNER, LAYERS = 32, 2, 32, 2, 1, 48, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
CONFIG = {  # as Qwen2-VL-7B-Instruct has it, with tiny sizes
    "model_type": "qwen2_vl",
    "hidden_size": TEXT,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KEY_HEADS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "max_position_embeddings": 32768,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vocab_size": 152064,  # more than there are tokens
    "tie_word_embeddings": False,
    "vision_config": {
        "depth": LAYERS,
        "embed_dim": VISION,
        "num_heads": VISION_HEADS,
        "hidden_size": TEXT,
        "mlp_ratio": 4,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
}
PROMPTS = [
    "a photo of a bench",
    "a café, “quoted” {text_prompt} and 中文 on a sign: don't",
    "a long prompt, " + "of which the end is read too, " * 12 + "red",
]


def a_tokenizer():
    """Byte-level BPE with some of the instruction's words, so that the text is not as long as its characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([hpsv3.BEFORE_PROMPT.partition("\n")[2]], trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


TOKENIZER = a_tokenizer()
VOCABULARY = TOKENIZER.get_vocab_size() + 1  # the mark


# --- a tiny file by the official names, and what it means


def official_state():
    """Weights large enough for every one of them to move the score, by the names of transformers 4.45."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def parameter(name, *shape, std, mean=0.0):
        state[name] = mean + std * torch.randn(shape, generator=generator)

    def linear(name, out, into, bias=True):
        parameter(f"{name}.weight", out, into, std=1.5 * into**-0.5)
        if bias:
            parameter(f"{name}.bias", out, std=0.2)

    def norm(name, width, bias=True):
        parameter(f"{name}.weight", width, std=0.2, mean=1.0)
        if bias:
            parameter(f"{name}.bias", width, std=0.2)

    parameter("visual.patch_embed.proj.weight", VISION, 3, 2, 14, 14, std=0.04)
    for layer in range(LAYERS):
        block = f"visual.blocks.{layer}"
        norm(f"{block}.norm1", VISION)
        norm(f"{block}.norm2", VISION)
        linear(f"{block}.attn.qkv", 3 * VISION, VISION)
        linear(f"{block}.attn.proj", VISION, VISION)
        linear(f"{block}.mlp.fc1", 4 * VISION, VISION)
        linear(f"{block}.mlp.fc2", VISION, 4 * VISION)
    norm("visual.merger.ln_q", VISION)
    linear("visual.merger.mlp.0", 4 * VISION, 4 * VISION)
    linear("visual.merger.mlp.2", TEXT, 4 * VISION)
    parameter("model.embed_tokens.weight", VOCABULARY, TEXT, std=1.0)
    key_width = TEXT // HEADS * KEY_HEADS
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for name, out in (("q", TEXT), ("k", key_width), ("v", key_width)):
            linear(f"{block}.self_attn.{name}_proj", out, TEXT)
        linear(f"{block}.self_attn.o_proj", TEXT, TEXT, bias=False)
        for name, out, into in (("gate", INNER, TEXT), ("up", INNER, TEXT), ("down", TEXT, INNER)):
            linear(f"{block}.mlp.{name}_proj", out, into, bias=False)
        norm(f"{block}.input_layernorm", TEXT, bias=False)
        norm(f"{block}.post_attention_layernorm", TEXT, bias=False)
    norm("model.norm", TEXT, bias=False)
    parameter("lm_head.weight", VOCABULARY, TEXT, std=1.0)
    for name, out, into in ((0, 1024, TEXT), (3, 16, 1024), (5, 2, 16)):
        linear(f"rm_head.{name}", out, into)
    return state


def prepared_by_transformers(image):
    """Patches of a picture, uint8 [3, H, W], and their rows and columns."""
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 256 * 28 * 28, "longest_edge": 256 * 28 * 28})
    return processor(image.permute(1, 2, 0).numpy(), return_tensors="pt")


def bfloat16_frequencies(theta, width):
    """What a cast of the whole model leaves of the rotary frequencies: the authors' `model.to(torch.bfloat16)`."""
    return torch.tensor([theta ** (-i / width) for i in range(0, width, 2)]).bfloat16()


def expected_score(state, image, prompt):
    """The mean, in float64, of a picture, uint8 [3, H, W]: bytes resized by PIL, and all of the official text."""
    state = {name: value.double() for name, value in state.items()}
    prepared = prepared_by_transformers(image)
    [[_, rows, columns]] = prepared["image_grid_thw"].tolist()

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def layer_norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def rms_norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def heads(x, count):
        return x.unflatten(-1, (count, -1)).transpose(0, 1)

    def rotated(x, angles):
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos().double(), angles.sin().double()  # rounded as the angles are
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def attend(query, key, value, mask=0.0):
        weights = (query @ key.mT / math.sqrt(query.shape[-1]) + mask).softmax(-1)
        return (weights @ value).transpose(0, 1).flatten(1)

    # Patches stand in squares of two by two.
    squares = [(row, column) for row in range(0, rows, 2) for column in range(0, columns, 2)]
    places = torch.tensor([(row + i, column + j) for row, column in squares for i in (0, 1) for j in (0, 1)])
    frequencies = bfloat16_frequencies(10000.0, VISION // VISION_HEADS // 2)
    angles = (places[..., None].bfloat16() * frequencies).flatten(1)
    x = prepared["pixel_values"].double() @ state["visual.patch_embed.proj.weight"].flatten(1).T
    for layer in range(LAYERS):
        block = f"visual.blocks.{layer}"
        query, key, value = (heads(part, VISION_HEADS) for part in _thirds(linear, layer_norm, x, block))
        x = x + linear(attend(rotated(query, angles), rotated(key, angles), value), f"{block}.attn.proj")
        hidden = linear(layer_norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(hidden * (1.702 * hidden).sigmoid(), f"{block}.mlp.fc2")
    x = layer_norm(x, "visual.merger.ln_q").view(-1, 4 * VISION)
    seen = linear(functional.gelu(linear(x, "visual.merger.mlp.0")), "visual.merger.mlp.2")

    ids = ids_of(official_text(prompt, len(seen)))
    mark = ids.index(VOCABULARY - 1)
    ids = torch.tensor(ids)
    x = state["model.embed_tokens.weight"][ids]
    x[ids == TOKENIZER.token_to_id("<|image_pad|>")] = seen
    frequencies = bfloat16_frequencies(1e6, TEXT // HEADS).float()
    angles = torch.arange(len(ids)).float()[:, None] * frequencies  # float32 numbers in every version of transformers
    future = torch.full((len(ids), len(ids)), -math.inf, dtype=torch.float64).triu(1)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        before = rms_norm(x, f"{block}.input_layernorm")
        query = heads(linear(before, f"{block}.self_attn.q_proj"), HEADS)
        key, value = (heads(linear(before, f"{block}.self_attn.{name}_proj"), KEY_HEADS) for name in "kv")
        key, value = (each.repeat_interleave(HEADS // KEY_HEADS, 0) for each in (rotated(key, angles), value))
        x = x + linear(attend(rotated(query, angles), key, value, future), f"{block}.self_attn.o_proj")
        before = rms_norm(x, f"{block}.post_attention_layernorm")
        hidden = functional.silu(linear(before, f"{block}.mlp.gate_proj")) * linear(before, f"{block}.mlp.up_proj")
        x = x + linear(hidden, f"{block}.mlp.down_proj")
    x = rms_norm(x, "model.norm")[mark]
    x = linear(x, "rm_head.0").relu()
    x = linear(x, "rm_head.3").relu()
    return linear(x, "rm_head.5")[0]


def _thirds(linear, layer_norm, x, block):
    return linear(layer_norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, -1)


def official_text(prompt, tokens):
    """The conversation as Qwen2-VL's template and the package write it, to its end."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * tokens
        + f"{hpsv3.BEFORE_PROMPT}{prompt}{hpsv3.AFTER_PROMPT}\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
    )


def ids_of(text):
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.add_special_tokens(["<|Reward|>"])
    return tokenizer.encode(text, add_special_tokens=False).ids


def expected_scores(state, images, prompts):
    return torch.stack([expected_score(state, *each) for each in zip(images, prompts, strict=True)])


def pictures(height, width, count=3):
    """Soft colours, with a hard edge."""
    generator = torch.Generator().manual_seed(height * width)
    soft = torch.rand(count, 3, 4, 5, generator=generator)
    images = functional.interpolate(soft, (height, width), mode="bicubic").clamp(0, 1)
    images[..., : height // 3, width // 2 :] = soft[..., :1, :1].round()
    return (255 * images).round().to(torch.uint8)


@pytest.fixture(scope="module")
def state():
    return official_state()


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    TOKENIZER.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    file = tmp_path_factory.mktemp("hpsv3") / "HPSv3.safetensors"
    save_file(state, file)
    return file


@pytest.fixture
def load(file, processor):
    def load(device=CPU, **settings):
        return hpsv3.load("hpsv3", Reward(**({"path": str(file), "processor": str(processor)} | settings)), device)

    return load


# --- scores


def test_scores_are_the_formula(load, state):
    """Of pictures that need no resizing; three prompts of different lengths, of which two are filled up."""
    images = pictures(448, 448)
    expected = expected_scores(state, images, PROMPTS)
    assert expected.std() > 0.1
    assert (expected[0] - expected_score(state, images[1], PROMPTS[0])).abs() > 0.02  # so that it sees the picture
    got = load()(images, PROMPTS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)
    wide = pictures(224, 896, 1)
    torch.testing.assert_close(
        load()(wide, PROMPTS[1:2]).double(), expected_scores(state, wide, PROMPTS[1:2]), rtol=0, atol=2e-5
    )


def test_pictures_of_other_sizes_are_resized_as_bytes_are(load, state):
    """PIL rounds to bytes, and ours are not rounded."""
    images, other = pictures(300, 420, 1), pictures(421, 299, 1)
    expected, another = (expected_scores(state, each, PROMPTS[:1]) for each in (images, other))
    got = load()(images, PROMPTS[:1])
    assert (got - expected).abs() < 0.1 * (another - expected).abs()


def test_batches_and_single_pictures_score_alike(load):
    images, prompts = pictures(448, 448, 4), [*PROMPTS, PROMPTS[0]]
    together = load()(images, prompts)
    torch.testing.assert_close(load(batch=3)(images, prompts), together, rtol=0, atol=2e-5)
    singles = [load()(images[i : i + 1], [prompts[i]]) for i in range(4)]
    torch.testing.assert_close(torch.cat(singles), together, rtol=0, atol=2e-5)


def test_the_end_of_a_long_prompt_counts(load):
    prompts = [PROMPTS[2], PROMPTS[2].replace("red", "blue")]
    first, second = load()(pictures(448, 448, 1).expand(2, -1, -1, -1), prompts)
    assert (first - second).abs() > 1e-3


def test_pixels_get_the_gradient_that_differences_have(load):
    scorer, prompts = load(), PROMPTS[:1]
    pixels = (pictures(448, 448, 1) / 255 * 0.8 + 0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.differentiable(pixels, prompts).sum(), pixels)
    direction = gradient / gradient.norm()
    ahead, behind = (scorer.differentiable(pixels + step * direction, prompts).item() for step in (0.01, -0.01))
    assert (ahead - behind) / 0.02 == pytest.approx(gradient.norm().item(), rel=0.05)


def test_bfloat16_has_a_float32_head(load, state):
    images = pictures(448, 448)
    scorer = load(dtype="bfloat16")
    assert {parameter.dtype for parameter in scorer.body.parameters()} == {torch.bfloat16}
    for name in (0, 3, 5):
        assert torch.equal(scorer.head.get_submodule(str(name)).weight, state[f"rm_head.{name}.weight"])
    got, expected = scorer(images, PROMPTS), load()(images, PROMPTS)
    assert got.dtype == torch.float32
    assert 0 < (got - expected).abs().max() < 0.3 * expected.std()


@pytest.mark.gpu
def test_a_gpu_scores_as_the_cpu_does(load):
    images, device = pictures(448, 448), torch.device("cuda")
    expected = load()(images, PROMPTS)
    for settings in ({}, {"offload": True}):
        scores = load(device, **settings)(images.to(device), PROMPTS)
        assert scores.device.type == "cuda"
        torch.testing.assert_close(scores.cpu(), expected, rtol=0, atol=1e-3)


# --- pictures and words


@pytest.mark.parametrize(
    "size, expected",
    [
        ((448, 448), (448, 448)),  # 200,704 pixels
        ((1024, 1024), (448, 448)),
        ((720, 720), (448, 448)),
        ((512, 768), (364, 532)),  # reduced to fewer: 365.8 and 548.7 are 13 and 19 times 28, rounded down
        ((768, 512), (532, 364)),
        ((300, 420), (392, 532)),  # enlarged to more: 378.6 and 530.1 are 14 and 19 times 28, rounded up
        ((20, 20), (448, 448)),
        ((224, 896), (224, 896)),
        ((10, 2000), (56, 6356)),
    ],
    ids=str,
)
def test_sizes_of_pictures(size, expected):
    assert picture_size(*size, 256 * 28 * 28, 28) == expected
    assert not any(edge % 28 for edge in expected)


def test_a_strip_is_refused():
    with pytest.raises(ValueError, match=r"^a picture of 2001x10 is more than 200 times as long as wide$"):
        picture_size(10, 2001, 256 * 28 * 28, 28)


@pytest.mark.parametrize("height, width", [(448, 448), (300, 420)])
def test_patches_are_the_processors(load, height, width):
    scorer, (image,) = load(), pictures(height, width, 1)
    size = picture_size(height, width, 256 * 28 * 28, 28)
    ours = scorer.body.patches(normalise(resize(image[None] / 255, *size)))[0]
    theirs = prepared_by_transformers(image)["pixel_values"]
    assert ours.shape == theirs.shape == (math.prod(size) // 14**2, 2 * 3 * 14 * 14)
    byte = 1 / 255 / 0.26  # the least of the three deviations
    atol = 1e-5 if size == (height, width) else 2 * byte  # PIL rounds twice, and at an edge it cuts off what we round
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    assert (ours - theirs).abs().mean() < 0.5 * byte


def test_the_instruction_is_the_published_one():
    """Of the package hpsv3 1.0.0, to the space: the checksum of what it puts around the prompt."""
    text = hpsv3.BEFORE_PROMPT.removeprefix("<|vision_end|>") + "{text_prompt}" + hpsv3.AFTER_PROMPT + "\n\nEND\n"
    published = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
    assert hashlib.sha256(text.encode()).hexdigest() == published


def test_prompts_become_the_tokens_before_the_mark(load):
    scorer = load()
    ids, marks = scorer.encode(PROMPTS)
    assert ids.shape == (len(PROMPTS), marks.max() + 1)
    for row, mark, prompt in zip(ids.tolist(), marks.tolist(), PROMPTS, strict=True):
        whole = ids_of(official_text(prompt, 0))
        assert row[: mark + 1] == whole[: whole.index(VOCABULARY - 1) + 1]
        assert row[mark + 1 :] == [0] * (len(row) - mark - 1)


def test_each_distinct_prompt_is_tokenised_once(load, monkeypatch):
    scorer, seen = load(batch=2), []
    encode = scorer.encode
    monkeypatch.setattr(scorer, "encode", lambda prompts: seen.append(list(prompts)) or encode(prompts))
    monkeypatch.setattr(scorer, "score", lambda pixels, ids, marks: marks.float())
    scorer(pictures(28, 28, 4), ["a dog"] * 2 + ["a cat"] * 2)
    assert seen == [["a dog", "a cat"]]


# --- files


def test_names_of_newer_files(state, processor, load, tmp_path):
    """Below "model.", as transformers saves them since 4.52; and with tokenizer and configuration beside them."""
    newer = {
        {"visual": f"model.{name}", "model": name.replace("model.", "model.language_model.", 1)}.get(
            name.split(".")[0], name
        ): value
        for name, value in state.items()
    }
    assert "model.visual.merger.ln_q.bias" in newer
    assert "model.language_model.norm.weight" in newer
    save_file(newer, tmp_path / "HPSv3.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((processor / name).read_bytes())
    got = find_scorer("hpsv3", Reward(path=str(tmp_path)), CPU)
    expected = load()
    assert all(torch.equal(one, other) for one, other in zip(got.parameters(), expected.parameters(), strict=True))


def refused(**settings):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        find_scorer("hpsv3", Reward(**settings), CPU)
    text = str(error.value)
    assert text.startswith("rewards.hpsv3: ")
    assert "\n" not in text
    return text


def test_missing_files_offline_the_commands_are_told(file):
    assert "`hf download MizzenAI/HPSv3 HPSv3.safetensors`" in refused()
    assert "`hf download Qwen/Qwen2-VL-7B-Instruct config.json tokenizer.json`" in refused(path=str(file))


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda s: s | {"model.extra": torch.ones(1)}, "weights, found body.text.extra and 0 more beside them"),
        (lambda s: {k: v for k, v in s.items() if "rm_head.3" not in k}, "expected the weight head.3.weight, found"),
        (lambda s: {k: v for k, v in s.items() if "embed_tokens" not in k}, "expected HPSv3's weight model.embed_tok"),
        (lambda s: s | {"rm_head.5.weight": torch.ones(1, 16)}, "head.5.weight of shape [2, 16], found one of [1, 16]"),
        (lambda s: s | {"model.embed_tokens.weight": torch.ones(9, TEXT)}, "and the weights have embeddings for 9: se"),
    ],
    ids=["surplus", "lacks a layer", "lacks words", "shape", "tokens"],
)
def test_almost_the_right_file(state, processor, tmp_path, change, complaint):
    save_file(change(state), tmp_path / "HPSv3.safetensors")
    assert complaint in refused(path=str(tmp_path), processor=str(processor))


def test_what_is_no_qwen(file, processor, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((processor / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "qwen2_5_vl"}))
    settings = {"path": str(file), "processor": str(tmp_path)}
    assert "expected model_type \"qwen2_vl\", found 'qwen2_5_vl'" in refused(**settings)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": "wide"}))
    assert "config.json is no configuration of a Qwen2-VL: " in refused(**settings)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is no tokenizer: " in refused(**settings)
    assert "backend = 'hpsv2' is not for this reward" in refused(backend="hpsv2")
