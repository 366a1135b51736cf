"""T5 and CLIP against diffusers' own encode_prompt, wherever their weights wait; and which encoders they are."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from ngrpo_train.models import encoders as encoders_module
from ngrpo_train.models import placement as placement_module
from ngrpo_train.models.encoder_hash import encoder_hash
from ngrpo_train.models.encoders import TextEncoders, TextFeatures
from ngrpo_train.models.sizes import TEXT_PARTS

LENGTH = 16
PROMPTS = ["a large red circle on a blue background", "", "an étoile, far away 🐈", "a star on " * 20]
CPU = torch.device("cpu")


def load(directory):
    return FluxPipeline.from_pretrained(
        directory, transformer=None, vae=None, local_files_only=True, dtype=torch.float32
    )


def encoders(directory, placement="device", dtype=torch.float32, device=CPU):
    return TextEncoders(load(directory), device=device, dtype=dtype, max_sequence_length=LENGTH, placement=placement)


def of(encoders):
    """Parameters and buffers of both."""
    return [tensor for each in (encoders._clip, encoders._t5) for tensor in (*each.parameters(), *each.buffers())]


# --- encoding


@pytest.fixture(scope="module")
def stock(tiny_dev):
    with torch.no_grad():
        return load(tiny_dev).encode_prompt(PROMPTS, None, max_sequence_length=LENGTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placement", ["device", "offload", "shard"])  # one process: nothing to shard over
def test_encoding_is_diffusers(tiny_dev, stock, placement, dtype):
    encoder = encoders(tiny_dev, placement, dtype)
    for _ in range(2):
        conditioning = encoder.encode(PROMPTS)
        prompt_embeds, pooled, txt_ids = stock
        assert conditioning.prompt_embeds.shape == (4, LENGTH, 16)
        assert torch.equal(conditioning.prompt_embeds, prompt_embeds.to(dtype))
        assert torch.equal(conditioning.pooled, pooled.to(dtype))
        assert torch.equal(conditioning.txt_ids, txt_ids)
        assert not conditioning.prompt_embeds.requires_grad
    assert not any(tensor.requires_grad for tensor in of(encoder))
    assert not any(each.training for each in (encoder._clip, encoder._t5))


def test_encoding_in_bfloat16_is_diffusers(tiny_dev, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(encoders_module, "frozen_dtype", lambda device: torch.bfloat16)
    pipeline = load(tiny_dev).to(torch.bfloat16)
    with torch.no_grad():
        prompt_embeds, pooled, _ = pipeline.encode_prompt(PROMPTS, None, max_sequence_length=LENGTH)
    conditioning = encoders(tiny_dev, dtype=torch.float32).encode(PROMPTS)
    assert prompt_embeds.dtype == pooled.dtype == torch.bfloat16
    assert torch.equal(conditioning.prompt_embeds, prompt_embeds.float())
    assert torch.equal(conditioning.pooled, pooled.float())


def test_rows_and_cat(tiny_dev):
    whole = encoders(tiny_dev).encode(PROMPTS)
    first, last = whole.rows(torch.tensor([0, 1])), whole.rows(torch.tensor([2, 3, 2]))
    assert torch.equal(last.pooled, whole.pooled[[2, 3, 2]])
    joined = TextFeatures.cat([first, last])
    assert torch.equal(joined.prompt_embeds, whole.prompt_embeds[[0, 1, 2, 3, 2]])
    assert torch.equal(joined.pooled, whole.pooled[[0, 1, 2, 3, 2]])
    assert joined.txt_ids is whole.txt_ids


@pytest.mark.parametrize("fails", [False, True])
def test_offloaded_weights_are_copied_for_a_call_and_come_back(tiny_dev, stock, monkeypatch, fails):
    encoder = encoders(tiny_dev, "offload")
    tensors = of(encoder)
    at_rest = [tensor.data_ptr() for tensor in tensors]
    values = [tensor.clone() for tensor in tensors]
    # A CPU has no other memory to copy to: a clone is as good, and zeros in its place afterwards tell who still has it.
    copies = []

    def copied(on_host, device):
        assert device == CPU
        copies.append(on_host.clone())
        return copies[-1]

    monkeypatch.setattr(placement_module, "_copied", copied)
    during = []

    def look(*_):
        during.extend(tensor.data_ptr() for tensor in tensors)
        if fails:
            raise RuntimeError("out of memory")

    encoder._t5.register_forward_pre_hook(look)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            encoder.encode(PROMPTS)
    else:
        assert torch.equal(encoder.encode(PROMPTS).prompt_embeds, stock[0])
    assert during == [copy.data_ptr() for copy in copies]
    assert not set(during) & set(at_rest)
    for copy in copies:
        copy.zero_()
    assert [tensor.data_ptr() for tensor in tensors] == at_rest
    assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, values, strict=True))
    assert len(tensors) == len({*at_rest}), "tied weights are copied once"


@pytest.mark.gpu
def test_offloading_on_a_gpu(tiny_dev):
    device = torch.device("cuda")
    resident, offloaded = (encoders(tiny_dev, placement, device=device) for placement in ("device", "offload"))
    assert {tensor.dtype for tensor in of(offloaded) if tensor.is_floating_point()} == {torch.bfloat16}
    resident.encode(PROMPTS)  # cuBLAS takes its workspace
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        want, got = resident.encode(PROMPTS), offloaded.encode(PROMPTS)
        assert torch.equal(got.prompt_embeds, want.prompt_embeds)
        assert torch.equal(got.pooled, want.pooled)
        assert got.prompt_embeds.dtype == torch.float32
        assert all(tensor.device == CPU and tensor.is_pinned() for tensor in of(offloaded))
        del want, got
        assert torch.cuda.memory_allocated() == before


def test_a_long_prompt_warns_once(tiny_dev, caplog):
    encoder = encoders(tiny_dev)
    dense = " ".join(["a"] * 17)  # and an end: fewer letters than the other, and more tokens
    with caplog.at_level(logging.WARNING):
        encoder.encode(["a red star on a blue background"])
        assert not caplog.records
        encoder.encode([" ".join(["background"] * 15), dense])
        assert len(caplog.records) == 1
        encoder.encode([dense])
    assert [record.getMessage() for record in caplog.records] == [
        f"a prompt has 18 tokens and is cut to sampling.max_sequence_length = 16, as others may be: {dense!r:.60}"
    ]


# --- which text encoders


@pytest.fixture
def model(tiny_dev, tmp_path):
    """A copy of the tiny pipeline, to alter."""
    return Path(shutil.copytree(tiny_dev, tmp_path / "model"))


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weight(path, place):
    weights = load_file(path)
    largest = max(weights, key=lambda name: weights[name].numel())
    weights[largest].view(-1)[place] += 1
    save_file(weights, path, metadata={"format": "pt"})


ALTERATIONS = {
    "the first number of CLIP": lambda m: change_weight(m / "text_encoder" / "model.safetensors", 0),
    "the last number of T5": lambda m: change_weight(m / "text_encoder_2" / "model.safetensors", -1),
    "another dtype": lambda m: load(m).text_encoder.bfloat16().save_pretrained(m / "text_encoder"),
    "a config": lambda m: change_json(m / "text_encoder_2" / "config.json", layer_norm_epsilon=1e-5),
    "a tokenizer": lambda m: change_json(m / "tokenizer_2" / "tokenizer_config.json", model_max_length=99),
    "a tokenizer's file": lambda m: (m / "tokenizer" / "added_tokens.json").write_text("{}"),
}


@pytest.mark.parametrize("alter", ALTERATIONS.values(), ids=ALTERATIONS)
def test_another_encoder_has_another_hash(tiny_dev, model, alter):
    before = encoder_hash(model, TEXT_PARTS)
    assert before == encoder_hash(Path(tiny_dev), TEXT_PARTS)
    alter(model)
    assert encoder_hash(model, TEXT_PARTS) not in (before, None)


def test_a_hash_is_not_of_how_files_are_cut_or_who_wrote_them(tiny_dev, model):
    shutil.rmtree(model / "text_encoder_2")
    load(tiny_dev).text_encoder_2.save_pretrained(model / "text_encoder_2", max_shard_size="4KB")
    assert len(list((model / "text_encoder_2").glob("*.safetensors"))) > 1
    change_json(model / "text_encoder" / "config.json", transformers_version="4.43", _name_or_path="elsewhere")
    (model / "tokenizer" / ".DS_Store").write_text("")
    assert encoder_hash(model, TEXT_PARTS) == encoder_hash(Path(tiny_dev), TEXT_PARTS)


@pytest.mark.parametrize("part", ["tokenizer_2", "text_encoder", "text_encoder_2/model.safetensors"])
def test_no_hash_without_every_part(model, part):
    shutil.rmtree(model / part) if (model / part).is_dir() else (model / part).unlink()
    assert encoder_hash(model, TEXT_PARTS) is None
    assert encoder_hash(model / "nowhere", TEXT_PARTS) is None
