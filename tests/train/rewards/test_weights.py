"""Files of weights: where they are looked for, what is read from them, what is said of those that cannot be used."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from ngrpo_train.rewards import weights
from ngrpo_train.rewards.weights import fill, find_file, find_state, read_json, read_state

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([1.0, -1.0])}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and what puts files of a repository into it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repository, **files):
        directory = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        snapshot = directory / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        (directory / "refs").mkdir(exist_ok=True)
        (directory / "refs" / "main").write_text("0" * 40)
        for name, content in files.items():
            (snapshot / name.replace("__", ".")).write_bytes(content)
        return snapshot

    return put


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# --- finding


def test_a_file_is_itself_and_a_directory_has_names(tmp_path):
    file = tmp_path / "any name.pt"
    file.touch()
    assert find_file(str(file), "other.pt") == file
    (tmp_path / "b.bin").touch()
    assert find_file(str(tmp_path), "a.bin", "b.bin") == tmp_path / "b.bin"
    (tmp_path / "a.bin").touch()
    assert find_file(str(tmp_path), "a.bin", "b.bin") == tmp_path / "a.bin"
    with pytest.raises(ValueError, match=r"has none of c\.bin, d\.bin$"):
        find_file(str(tmp_path), "c.bin", "d.bin")


@pytest.mark.parametrize("path", ["nowhere", "/no/such/file.pt", "a/b/c", "https://host/a"])
def test_neither_file_nor_hub_id(path):
    with pytest.raises(ValueError, match="is no file, no directory and no hub id"):
        find_file(path, "a.bin")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.pt").touch()
    assert find_file("~/a.pt", "other") == tmp_path / "a.pt"


@pytest.mark.parametrize(
    "fetch, command",
    [
        (None, "`hf download owner/name a.bin`"),
        (("a.bin", "config.json"), "`hf download owner/name a.bin config.json`"),
        ((), "`hf download owner/name`"),
    ],
)
def test_offline_without_it_in_the_cache_the_command_is_told(cache, fetch, command):
    with pytest.raises(ValueError, match=r"^owner/name is not in the cache, and HF_HUB_OFFLINE is set") as error:
        find_file("owner/name", "a.bin", "b.bin", fetch=fetch)
    assert command in one_line(error)


def test_offline_any_of_the_names_in_the_cache_will_do(cache):
    snapshot = cache("owner/name", b__bin=b"")
    assert find_file("owner/name", "a.bin", "b.bin") == snapshot / "b.bin"


def test_without_the_hub_the_cache_will_do_too(cache, monkeypatch):
    def unreachable(repository, name):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(weights, "hf_hub_download", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="and the hub cannot be reached: fetch it with"):
        find_file("owner/name", "a.bin", "b.bin")
    snapshot = cache("owner/name", b__bin=b"")
    assert find_file("owner/name", "a.bin", "b.bin") == snapshot / "b.bin"


def http_error(kind, status):
    # As much of a response as the error reads: which HTTP library makes it changes between versions of the hub's.
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} of the hub\nand more", response=response)


def test_a_repository_without_the_first_name_is_asked_for_the_next(monkeypatch):
    def download(repository, name):
        if name != "b.bin":
            raise http_error(RemoteEntryNotFoundError, 404)
        return f"/cache/{name}"

    monkeypatch.setattr(weights, "hf_hub_download", download)
    assert find_file("owner/name", "a.bin", "b.bin") == Path("/cache/b.bin")
    with pytest.raises(ValueError, match=r"^owner/name on the hub has none of a\.bin, c\.bin$"):
        find_file("owner/name", "a.bin", "c.bin")


def test_a_hub_in_trouble_is_one_line(monkeypatch):
    def download(repository, name):
        raise http_error(HfHubHTTPError, 503)

    monkeypatch.setattr(weights, "hf_hub_download", download)
    with pytest.raises(ValueError, match=r"^owner/name cannot be fetched from the hub: 503") as error:
        find_file("owner/name", "a.bin")
    one_line(error)


# --- reading


def assert_state(found, expected=STATE):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3, "name": "a run"},
        {"state_dict": {f"module.{name}": value for name, value in STATE.items()}},
    ],
    ids=["bare", "checkpoint", "from data parallel"],
)
def test_pytorch_files(tmp_path, content, legacy):
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    assert_state(read_state(tmp_path / "a.pt"))


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    assert_state(read_state(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("by_file", [False, True], ids=["directory", "index"])
def test_sharded(tmp_path, by_file):
    for name, value in STATE.items():
        save_file({name: value}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"{name}.safetensors" for name in STATE}}))
    file, state = find_state(str(index if by_file else tmp_path), "model.safetensors", index.name)
    assert file == index
    assert_state(state)
    (tmp_path / "bias.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has none of bias\.safetensors$"):
        find_state(str(index if by_file else tmp_path), index.name)


def test_sharded_in_the_cache(cache):
    index = json.dumps({"weight_map": {"weight": "s1.bin", "bias": "s2.bin"}}).encode()
    snapshot = cache("owner/name", pytorch_model__bin__index__json=index)
    with pytest.raises(ValueError, match=r"`hf download owner/name s1\.bin`"):
        find_state("owner/name", "pytorch_model.bin", "pytorch_model.bin.index.json")
    for name, shard in (("weight", "s1.bin"), ("bias", "s2.bin")):
        torch.save({name: STATE[name]}, snapshot / shard)
    assert_state(find_state("owner/name", "pytorch_model.bin", "pytorch_model.bin.index.json")[1])


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file ran')",))


def test_no_code_of_a_file_runs(tmp_path):
    torch.save({"weight": STATE["weight"], "trap": Trap()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Trap(), protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match="cannot be read as weights: it is damaged, or holds more than") as error:
            read_state(tmp_path / name)
        one_line(error)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 100, -1], ids=lambda keep: f"{keep} bytes")
def test_cut_short(tmp_path, suffix, keep):
    file = tmp_path / f"a.{suffix}"
    torch.save(STATE, file) if suffix == "pt" else save_file(STATE, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"a\.{suffix} cannot be read as weights: ") as error:
        read_state(file)
    one_line(error)


@pytest.mark.parametrize("content", [[STATE["weight"]], STATE["weight"], {"a": 1}, {"state_dict": [1]}], ids=str)
def test_no_table_of_tensors(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no table of tensors"):
        read_state(tmp_path / "a.pt")


def test_json(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON: Expecting"):
        read_json(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_json(file)
    file.write_text("[1]")
    with pytest.raises(ValueError, match="holds no JSON object"):
        read_json(file)


# --- filling


def test_a_model_on_the_meta_device_is_filled():
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    fill(model, STATE, Path("a.pt"))
    assert model(torch.tensor([1.0, 10.0, 100.0])).tolist() == [211, 542]


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda s: {"lora_A": s["weight"], "lora_B": s["bias"]}, "the weight weight, found only names such as lora_A"),
        (lambda s: {}, "the weight weight, found only names such as none"),
        (lambda s: {**s, "bias": torch.ones(3)}, r"bias of shape \[2\], found one of \[3\]"),
        (lambda s: {**s, "z": s["bias"], "extra": s["bias"]}, "2 weights, found extra and 1 more beside them"),
    ],
)
def test_another_models_weights(change, complaint):
    with pytest.raises(ValueError, match=rf"^a\.pt is not a file for this scorer: expected {complaint}") as error:
        fill(nn.Linear(3, 2), change(STATE), Path("a.pt"))
    one_line(error)
