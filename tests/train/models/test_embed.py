"""Directories of embeddings: what is read back, what is added, what a kill leaves, what is refused, and two ranks."""

import json
import logging
import re
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from ngrpo_train.models import embed as embed_module
from ngrpo_train.models.embed import embed_command, training_prompts
from ngrpo_train.models.embedders import Embedder
from ngrpo_train.models.embeddings import EmbeddingCache, Encoders, Manifest
from ngrpo_train.models.encoder_hash import encoder_hash
from ngrpo_train.models.encoders import StoredTexts, TextEncoders
from ngrpo_train.models.loading import load_text_encoders
from ngrpo_train.models.sizes import TEXT_PARTS
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Evaluation, Model, Parallel, Prompts, Recipe, Sampling

from ..runs import ended, forked, free_ports

LENGTH = 16
SAMPLING = Sampling(max_sequence_length=LENGTH)
CPU = torch.device("cpu")
PROMPTS = [
    "a large red circle on a blue background",
    "a dog",
    "an étoile, far away",
    "🐈 auf der Straße, 「夜」",
    unicodedata.normalize("NFD", "an étoile, far away"),
    "two cats on a mat",
    "a star on " * 20,
]


def load(directory):
    return FluxPipeline.from_pretrained(
        directory, transformer=None, vae=None, local_files_only=True, dtype=torch.float32
    )


class Counted:
    """The tiny pipeline's text encoders, and what they were asked for. They die in the call after `survives` calls."""

    def __init__(self, directory, dtype=torch.bfloat16):
        self.encoders = TextEncoders(load(directory), device=CPU, dtype=dtype, max_sequence_length=LENGTH)
        self.again()

    def again(self):
        self.batches, self.survives = [], 10**6

    def encode(self, prompts):
        if len(self.batches) == self.survives:
            raise KeyboardInterrupt
        self.batches.append([prompt.text for prompt in prompts])
        return self.encoders.encode(self.batches[-1]).by_prompt()

    @property
    def prompts(self):
        return [prompt for batch in self.batches for prompt in batch]


def embed(encoder, texts, out, manifest, *, batch, sampling=SAMPLING, examples=()):
    embedder = Embedder(manifest=manifest, sampling=sampling, encode=encoder.encode, examples=examples)
    return embed_module.embed(embedder, [Prompt(text) for text in texts], out, batch=batch)


@pytest.fixture
def counted(tiny_dev):
    return Counted(tiny_dev)


@pytest.fixture(scope="module")
def manifest(tiny_dev):
    found = Encoders(pipeline="FluxPipeline", hash=encoder_hash(Path(tiny_dev), TEXT_PARTS))
    return Manifest(encoders=found, sampling={"max_sequence_length": LENGTH})


@pytest.fixture
def out(tmp_path):
    return tmp_path / "my embeddings"


@pytest.fixture
def two_in_a_shard(monkeypatch):
    monkeypatch.setattr(embed_module, "_SHARD_PROMPTS", 2)


def read(out, manifest, sampling=SAMPLING, device=CPU, dtype=torch.float32):
    return StoredTexts(EmbeddingCache(out, sampling, device, manifest.encoders), dtype)


def assert_holds(out, manifest, prompts, counted):
    """One by one, as a batch of another size may round otherwise before bfloat16 does."""
    cache = read(out, manifest)
    for prompt in prompts:
        got, want = cache.encode([prompt]), counted.encoders.encode([prompt])
        torch.testing.assert_close(got.prompt_embeds, want.prompt_embeds.float(), rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(got.pooled, want.pooled.float(), rtol=2**-7, atol=1e-6)


# --- what is read is what was written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=lambda dtype: f"stored in {dtype}")
def test_a_cache_gives_diffusers_embeddings_in_the_dtype_they_were_asked_for(tiny_dev, manifest, out, stored, dtype):
    embed(Counted(tiny_dev, stored), PROMPTS, out, manifest, batch=len(PROMPTS))
    with torch.no_grad():
        prompt_embeds, pooled, txt_ids = load(tiny_dev).encode_prompt(PROMPTS, None, max_sequence_length=LENGTH)
    assert not torch.equal(prompt_embeds.bfloat16().float(), prompt_embeds), "this could not tell"
    asked = [3, 0, 3, 6]
    got = read(out, manifest, dtype=dtype).encode([PROMPTS[i] for i in asked])
    assert torch.equal(got.prompt_embeds, prompt_embeds[asked].to(stored).to(dtype))
    assert torch.equal(got.pooled, pooled[asked].to(stored).to(dtype))
    assert torch.equal(got.txt_ids, txt_ids)


@pytest.mark.gpu
def test_a_cache_on_a_gpu(counted, manifest, out):
    embed(counted, PROMPTS, out, manifest, batch=4)
    got, want = (read(out, manifest, device=torch.device(device)).encode(PROMPTS) for device in ("cuda", "cpu"))
    for part in ("prompt_embeds", "pooled", "txt_ids"):
        assert getattr(got, part).is_cuda
        assert torch.equal(getattr(got, part).cpu(), getattr(want, part))


def test_every_distinct_prompt_is_encoded_once(counted, manifest, out, two_in_a_shard):
    summary = embed(counted, [*PROMPTS, *PROMPTS[:3]], out, manifest, batch=3)
    assert counted.prompts == PROMPTS
    assert (summary.encoded, summary.present, summary.total, summary.shards) == (7, 0, 7, 4)
    shards = [f"embeddings_0000{i}.safetensors" for i in range(4)]
    assert sorted(path.name for path in out.iterdir()) == [*shards, "index.json", "manifest.json"]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "whoever may read one file may read all"
    assert summary.size_gib == sum((out / shard).stat().st_size for shard in shards) / 2**30
    assert_holds(out, manifest, PROMPTS, counted)


def test_a_shard_is_encoded_in_batches(counted, manifest, out):
    embed(counted, PROMPTS, out, manifest, batch=3)
    assert [len(batch) for batch in counted.batches] == [3, 3, 1]
    assert load_file(out / "embeddings_00000.safetensors").keys() == {
        f"{row}.{name}" for row in range(7) for name in ("prompt_embeds", "pooled")
    }
    assert_holds(out, manifest, PROMPTS, counted)


def test_a_list_that_has_grown_adds_only_what_is_new(counted, manifest, out):
    embed(counted, PROMPTS[:3], out, manifest, batch=2)
    in_use, first = read(out, manifest), out / "embeddings_00000.safetensors"
    written = first.stat().st_mtime_ns
    counted.again()
    summary = embed(counted, PROMPTS[::-1], out, manifest, batch=2)
    assert counted.prompts == PROMPTS[:2:-1]
    assert (summary.encoded, summary.present, summary.total, summary.shards) == (4, 3, 7, 2)
    assert first.stat().st_mtime_ns == written
    assert_holds(out, manifest, PROMPTS, counted)
    assert in_use.encode(PROMPTS[:3]).pooled.shape == (3, 16)

    counted.again()
    summary = embed(counted, PROMPTS[:5], out, manifest, batch=2)
    assert not counted.batches
    assert (summary.encoded, summary.present, summary.total) == (0, 5, 7)


def test_shards_are_numbered_on_past_five_digits(counted, manifest, out):
    embed(counted, PROMPTS[:1], out, manifest, batch=1)
    (out / "embeddings_00000.safetensors").rename(out / "embeddings_99999.safetensors")
    for count in (2, 3):
        embed(counted, PROMPTS[:count], out, manifest, batch=1)
    assert sorted(int(path.stem[11:]) for path in out.glob("*.safetensors")) == [99999, 100000, 100001]
    assert_holds(out, manifest, PROMPTS[:3], counted)


# --- kills and damage


@pytest.mark.parametrize("before", [0, 1], ids=["a new directory", "one that had some"])
def test_a_killed_command_goes_on_where_it_stopped(counted, manifest, out, two_in_a_shard, before):
    if before:
        embed(counted, PROMPTS[:before], out, manifest, batch=1)
        counted.again()
    counted.survives = 3  # a shard of two, and half of the next
    with pytest.raises(KeyboardInterrupt):
        embed(counted, PROMPTS, out, manifest, batch=1)
    assert counted.prompts == PROMPTS[before : before + 3]
    (out / "embeddings_00009.safetensors.partial").write_bytes(b"half a sh")
    (out / "index.json.partial").write_bytes(b"{")

    command = re.escape(f"`ngrpo embed RECIPE --out '{out}'`")
    if before:  # the index is still that of the first command
        assert_holds(out, manifest, PROMPTS[:before], counted)
        with pytest.raises(
            ValueError, match=rf"lacks the prompt 'a dog' and 5 others: {command} adds what is missing$"
        ):
            read(out, manifest).cache.refuse_missing([Prompt(text) for text in PROMPTS])
    else:
        with pytest.raises(ValueError, match=rf"^prompts\.embeddings = .* is unfinished .*: {command} completes it$"):
            read(out, manifest)

    counted.again()
    embed(counted, PROMPTS, out, manifest, batch=1)
    assert counted.prompts == PROMPTS[before + 2 :]
    assert not list(out.glob("*.partial"))
    assert_holds(out, manifest, PROMPTS, counted)


def test_a_kill_before_anything_was_written(counted, manifest, out):
    out.mkdir()
    (out / "manifest.json.partial").write_text('{"form')
    embed(counted, PROMPTS[:1], out, manifest, batch=1)
    assert_holds(out, manifest, PROMPTS[:1], counted)


@pytest.mark.parametrize("damage", ["cut short", "gone", "another header"])
def test_a_damaged_shard_is_refused_and_mended(counted, manifest, out, two_in_a_shard, caplog, damage):
    embed(counted, PROMPTS, out, manifest, batch=1)
    shard = out / "embeddings_00001.safetensors"
    content = shard.read_bytes()
    if damage == "cut short":
        shard.write_bytes(content[:-1])
    elif damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(b"\xff" * len(content))
    refusal = rf"^prompts\.embeddings = .* is damaged \(.*{shard.name}.*\): `ngrpo embed RECIPE .*`"
    if damage == "another header":
        cache = read(out, manifest)
        with pytest.raises(ValueError, match=refusal):
            cache.encode(PROMPTS)
    else:  # the size tells, before any work
        with pytest.raises(ValueError, match=refusal):
            read(out, manifest)
    counted.again()
    with caplog.at_level(logging.WARNING, "ngrpo_train.models.embed"):
        embed(counted, PROMPTS, out, manifest, batch=1)
    warnings = [record.getMessage() for record in caplog.records if record.name == "ngrpo_train.models.embed"]
    assert [shard.name in warning for warning in warnings] == [True] * (damage != "gone")
    assert counted.prompts == PROMPTS[2:4]
    assert_holds(out, manifest, PROMPTS, counted)


def test_a_shard_of_other_prompts_is_never_mistaken(counted, manifest, out, two_in_a_shard):
    embed(counted, PROMPTS[:4], out, manifest, batch=1)
    shutil.copy(out / "embeddings_00000.safetensors", out / "embeddings_00001.safetensors")
    cache = read(out, manifest)
    cache.encode(PROMPTS[:2])
    with pytest.raises(ValueError, match=r"embeddings_00001\.safetensors: not what index\.json says is in it"):
        cache.encode(PROMPTS[:3])


# --- what is refused


def test_a_missing_prompt_is_named(counted, manifest, out):
    embed(counted, PROMPTS[:2], out, manifest, batch=2)
    cache = read(out, manifest).cache
    cache.refuse_missing([Prompt(text) for text in PROMPTS[:2]])
    for refused in (cache.rows, cache.refuse_missing):
        with pytest.raises(
            ValueError, match=r"lacks the prompt 'a cat': `ngrpo embed RECIPE --out .*` adds what is mis"
        ):
            refused([Prompt("a dog"), Prompt("a cat"), Prompt("a cat")])


@pytest.mark.parametrize("exists", [False, True])
def test_what_is_no_directory_of_embeddings(manifest, out, exists):
    if exists:
        out.mkdir()
    with pytest.raises(
        ValueError, match=r"^prompts\.embeddings = .* is no directory of embeddings: `ngrpo embed RECIPE"
    ):
        read(out, manifest)


@pytest.mark.parametrize(
    "sampling, encoders, cause",
    [
        ({"max_sequence_length": 32}, {}, "was made for sampling.max_sequence_length = 16, and the recipe's is 32"),
        ({}, {"hash": "another"}, "was made by other text encoders or tokenizers than those of model.name_or_path"),
        ({}, {"pipeline": "FluxFillPipeline"}, "was made for a FluxPipeline, and model.name_or_path is a FluxFillP"),
        (
            {"guidance_scale": 4.0},
            {"guided": True},
            "was made without a negative prompt for each, and sampling.guidance_scale = 4 draws with one",
        ),
    ],
)
def test_other_settings_or_encoders_are_refused(counted, manifest, out, sampling, encoders, cause):
    embed(counted, PROMPTS[:2], out, manifest, batch=2)
    counted.again()
    asked, other = replace(SAMPLING, **sampling), replace(manifest, encoders=replace(manifest.encoders, **encoders))
    cause = re.escape(cause)
    with pytest.raises(
        ValueError, match=rf"^prompts\.embeddings = .* {cause}.*: write another directory with `ngrpo emb"
    ):
        read(out, other, asked)
    with pytest.raises(ValueError, match=rf"^--out = .* {cause}.*: give another directory$"):
        embed(counted, PROMPTS, out, other, batch=2, sampling=asked)
    assert not counted.batches
    unknown = replace(manifest, encoders=replace(manifest.encoders, hash=None))
    read(out, unknown).encode(PROMPTS[:2])  # nothing to compare with


@pytest.mark.parametrize(
    "content, cause",
    [('{"format": 1}', "is of format 1, and this version"), ("{", "has a manifest.json that cannot be")],
)
def test_a_manifest_of_no_use_is_refused(counted, manifest, out, content, cause):
    embed(counted, PROMPTS[:1], out, manifest, batch=1)
    (out / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^prompts\.embeddings = .* {cause}"):
        read(out, manifest)
    with pytest.raises(ValueError, match=rf"^--out = .* {cause}"):
        embed(counted, PROMPTS, out, manifest, batch=1)


def test_an_out_of_other_things_is_refused(counted, manifest, out):
    out.mkdir()
    (out / "thesis.tex").write_text("")
    for wrong in (out, out / "thesis.tex"):
        with pytest.raises(ValueError, match=r"^--out = .* exists and is not a directory of embeddings: give another"):
            embed(counted, PROMPTS, wrong, manifest, batch=1)
    with pytest.raises(ValueError, match=r"^--out = .* cannot be written to: Not a directory$"):
        embed(counted, PROMPTS, out / "thesis.tex" / "below", manifest, batch=1)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_full_disk_is_refused_after_the_first_batch(counted, manifest, out, monkeypatch):
    row = 2 * (LENGTH * 16 + 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=7 * row - 1))
    with pytest.raises(ValueError, match=r"^--out = .* has 0\.00 GiB free, and 7 prompts take about 0\.00 GiB$"):
        embed(counted, PROMPTS, out, manifest, batch=2)
    assert len(counted.batches) == 1
    assert not list(out.glob("embeddings*"))
    embed(counted, PROMPTS[:6], out, manifest, batch=2)


def test_a_prompt_in_another_form_than_the_examples_is_refused(counted, manifest, out):
    examples = counted.encode([Prompt(""), Prompt("a longer text")])
    odd = SimpleNamespace(encode=lambda some: [{"pooled": torch.zeros(16)} for _ in some])
    with pytest.raises(ValueError, match=r"^'a dog' is encoded into 1 tensors, and other prompts into 2$"):
        embed(odd, ["a dog"], out, replace(manifest, form="a form"), batch=1, examples=examples)


# --- the command


@pytest.fixture
def recipe(tiny_dev, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, prompts in {"train": PROMPTS[:3], "validation": PROMPTS[2:4], "test": PROMPTS[3:5]}.items():
        Path(f"{name}.txt").write_text("\n".join(prompts), encoding="utf-8")
    return Recipe(
        model=Model(name_or_path=tiny_dev),
        prompts=Prompts(source="train.txt"),
        sampling=Sampling(max_sequence_length=LENGTH),
        evaluation=Evaluation(validation="validation.txt", test="test.txt"),
        parallel=Parallel(device="cpu"),
    )


def test_the_command_encodes_all_that_training_asks_for(recipe, counted, manifest, out, capsys):
    asked = {setting: [prompt.text for prompt in prompts] for setting, prompts in training_prompts(recipe).items()}
    assert asked == {
        "prompts.source": PROMPTS[:3],
        "evaluation.validation": PROMPTS[2:4],
        "evaluation.test": PROMPTS[3:5],
    }
    assert embed_command(recipe, out) == 0
    assert re.search(
        rf"^5 prompts encoded; {out} has 5 prompts in 1 shard, 0\.00 GiB\n.*--prompts\.embeddings '{out}'$",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    assert_holds(out, manifest, PROMPTS[:5], counted)
    only = replace(recipe, evaluation=Evaluation(), prompts=Prompts(source="test.txt"))
    assert embed_command(only, out) == 0
    assert "0 prompts encoded, 2 were there; " in capsys.readouterr().out


def test_the_command_loads_neither_transformer_nor_vae(recipe, tiny_dev, counted, manifest, out):
    model = Path(shutil.copytree(tiny_dev, "model"))
    shutil.rmtree(model / "transformer")
    shutil.rmtree(model / "vae")
    embed_command(replace(recipe, model=Model(name_or_path="model")), out)
    assert_holds(out, manifest, PROMPTS[:5], counted)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            {"model": Model(name_or_path="some/model")},
            "model.name_or_path = 'some/model' is no directory here: some/model is not in",
        ),
        (
            {"model": Model(name_or_path="model")},
            "model.name_or_path = 'model' has no text_encoder_2, which its model",
        ),
        ({"sampling": Sampling(max_sequence_length=0)}, "sampling.max_sequence_length = 0 must be positive"),
        ({"prompts": Prompts(source="nowhere.txt")}, "prompts.source 'nowhere.txt': [Errno 2] No such file"),
        ({"evaluation": Evaluation(test="shapes:tset")}, "evaluation.test 'shapes:tset': unknown split"),
    ],
)
def test_what_the_command_cannot_use(recipe, tiny_dev, out, change, complaint):
    shutil.rmtree(Path(shutil.copytree(tiny_dev, "model")) / "text_encoder_2")
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}"):
        embed_command(replace(recipe, **change), out)
    with pytest.raises(ValueError, match=r"^--batch = 0 must be positive$"):
        embed_command(recipe, out, batch=0)
    assert not out.exists()


# --- two ranks

OF_RANKS = Manifest(encoders=Encoders(pipeline="FluxPipeline", hash="an encoder"), sampling={}, form="a form")


def on_a_rank(model: str, out: Path, prompts: list[str]) -> None:
    embed_module._SHARD_PROMPTS = 2
    with processes.joined(Parallel(device="cpu")) as launch:

        def encoders(placement):
            pipeline, _ = load_text_encoders(model, torch.float32)
            return TextEncoders(
                pipeline, device=launch.device, dtype=torch.float32, max_sequence_length=16, placement=placement
            )

        sharded = encoders("shard")
        assert all(isinstance(parameter, DTensor) for parameter in sharded._t5.parameters())
        for share in (prompts[:1], prompts[2:]) if processes.rank() else (prompts, prompts):  # as often, not as many
            encoded = sharded.encode(share)
        torch.save([encoded.prompt_embeds, encoded.pooled, encoded.txt_ids], out / f"sharded_{processes.rank()}.pt")
        whole = encoders("device")
        encoder = SimpleNamespace(encode=lambda some: whole.encode([prompt.text for prompt in some]).by_prompt())
        examples = encoder.encode([Prompt(prompts[0]), Prompt(prompts[1])])
        for known in (prompts[:1], prompts):
            summary = embed(encoder, known, out / "embeddings", OF_RANKS, batch=1, examples=examples)
        launch.print(summary)


@pytest.fixture(scope="module")
def on_two_ranks(tiny_dev, tmp_path_factory):
    """The directory that two ranks wrote in, and what they said."""
    directory = tmp_path_factory.mktemp("ranks")
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    logs = [directory / f"rank_{i}.txt" for i in range(2)]
    ranks = [
        forked(log, on_a_rank, tiny_dev, directory, PROMPTS, **group, RANK=str(i), LOCAL_RANK=str(i))
        for i, log in enumerate(logs)
    ]
    return directory, [ended(rank, log) for rank, log in zip(ranks, logs, strict=True)]


@pytest.mark.parametrize("rank, share", [(0, slice(None)), (1, slice(2, None))])
def test_sharded_encoders_give_what_one_process_does(on_two_ranks, tiny_dev, rank, share):
    prompts = PROMPTS[share]
    with torch.no_grad():
        want = load(tiny_dev).encode_prompt(prompts, None, max_sequence_length=LENGTH)
    got = torch.load(on_two_ranks[0] / f"sharded_{rank}.pt", weights_only=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))
    assert "returned a view" not in on_two_ranks[1][rank]


def test_two_ranks_write_one_cache(on_two_ranks, counted):
    directory, outputs = on_two_ranks
    out = directory / "embeddings"
    assert_holds(out, OF_RANKS, PROMPTS, counted)
    assert not load_file(out / "embeddings_00000.safetensors"), "the first prompt is the first example"
    index = json.loads((out / "index.json").read_text())
    assert [len(entry["prompts"]) for entry in index.values()] == [1, 2, 2, 2]  # 3 for one rank, 2 + 1 for the other
    assert f"6 prompts encoded, 1 were there; {out} has 7 prompts in 4 shards" in outputs[0]
    assert "prompts encoded" not in outputs[1]
