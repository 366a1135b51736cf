"""Sources of prompts with styles: directories, HPDv2 and datasets of a hub that answers on this machine, or cannot."""

import json
import logging
import re
import threading
from collections import Counter
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

from ngrpo_train.prompts import Prompt, load_prompts

STYLES = ["anime", "concept-art", "paintings", "photo"]
STRANGE = ['a "quoted", blue square', "étoile 星\u2028🐈", "two\nlines"]


def as_json(*prompts):
    return json.dumps([*prompts], ensure_ascii=False).encode()


def tagged(*pairs):
    """Prompts of (text,) or (text, style)."""
    return [Prompt(text, row={"style": style[0]} if any(style) else {}) for text, *style in pairs]


def load_tagged(source, field="prompts.source"):
    return load_prompts(source, field, by_style=True)


def texts_of(source):
    return [prompt.text for prompt in load_prompts(source)]


def refused(source, reason):
    with pytest.raises(ValueError, match=reason) as refusal:
        load_tagged(source, "evaluation.test")
    assert str(refusal.value).startswith(f"evaluation.test {source!r}: ")
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# --- styles in files and directories


@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.csv", "p.parquet"])
def test_a_row_may_have_a_style(tmp_path, name):
    rows = [("a cat", "photo"), (STRANGE[0], " anime "), ("a dog", ""), ("a cat", "anime"), ("a cat", "photo")]
    objects = [{"prompt": text, "style": style} for text, style in rows]
    path = tmp_path / name
    if name == "p.json":
        path.write_text(json.dumps(objects))
    elif name == "p.jsonl":
        path.write_text("\n".join(json.dumps(entry) for entry in objects))
    elif name == "p.csv":
        path.write_text(
            "style,prompt\n" + "".join(f'{style},"{text.replace(chr(34), chr(34) * 2)}"\n' for text, style in rows)
        )
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        texts, styles = zip(*rows, strict=True)
        parquet.write_table(pyarrow.table({"style": [style or None for style in styles], "prompt": texts}), path)
    expected = [("a cat", "photo"), (STRANGE[0], "anime"), ("a dog", ""), ("a cat", "anime")]
    assert load_tagged(str(path)) == tagged(*expected)
    assert texts_of(str(path)) == ["a cat", STRANGE[0], "a dog"]


def test_a_style_need_not_be_text(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "style": null}\n{"prompt": "b", "style": 3}\n"c"')
    assert load_tagged(str(tmp_path / "p.jsonl")) == tagged(("a", ""), ("b", "3"), ("c", ""))


def test_the_only_column_but_the_style_has_the_prompts(tmp_path):
    (tmp_path / "p.csv").write_text("caption,style\na cat,photo\n")
    assert load_tagged(str(tmp_path / "p.csv")) == tagged(("a cat", "photo"))


def test_a_directory_of_styles(tmp_path):
    (tmp_path / "photo.json").write_bytes(as_json("a cat", *STRANGE, "a cat"))
    (tmp_path / "anime.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "anime.png").write_bytes(b"no prompts")
    (tmp_path / "concept-art.jsonl").write_text('{"prompt": "a fish", "style": "ink"}\n"a bird"')
    expected = [("a cat", "anime"), ("a dog", "anime"), ("a fish", "ink"), ("a bird", "concept-art")]
    photos = [(text, "photo") for text in ["a cat", *STRANGE]]
    assert load_tagged(str(tmp_path)) == tagged(*expected, *photos)
    assert texts_of(str(tmp_path)) == ["a cat", "a dog", "a fish", "a bird", *STRANGE]


def test_a_directory_that_is_not_one_of_styles(tmp_path):
    refused(str(tmp_path), r"there are no \.txt, .* files in this directory$")
    (tmp_path / "benchmark").mkdir()
    refused(str(tmp_path), "it has the directories benchmark$")
    for name in ("train.json", "test.json"):
        (tmp_path / name).write_bytes(as_json("a cat"))
    refused(str(tmp_path), "has splits, not styles: give one of its files, such as test.json")


def test_a_bad_file_in_a_directory_is_named(tmp_path):
    (tmp_path / "anime.json").write_bytes(as_json("a cat"))
    (tmp_path / "photo.json").write_bytes(b'["a cat", 3]')
    refused(str(tmp_path), r"photo\.json: entry 2 is neither")


def test_smoke():
    prompts = load_tagged("smoke")
    assert Counter(prompt.style for prompt in prompts) == {**dict.fromkeys(STYLES, 9), "difficult": 6}
    assert len(load_prompts("smoke")) == 42
    assert {prompt.style for prompt in prompts[:8]} >= set(STYLES)  # a few of them are a fair sample


# --- the hub


class Hub:
    """Answers as the hub does, for datasets of files; `gated` ones list their files and keep them."""

    def __init__(self):
        self.datasets, self.gated, self.downloads = {}, set(), []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def commit(self, name):
        return sha1(repr(sorted(self.datasets[name].items())).encode()).hexdigest()

    def answer(self, request):
        path = unquote(request.path.partition("?")[0])
        parts = re.fullmatch(r"(?:/api)?/datasets/([^/]+/[^/]+)/(.*)", path)
        if not parts or parts[1] not in self.datasets:
            return self.send(request, 401, b"", {"X-Error-Code": "RepoNotFound"})
        name, rest = parts.groups()
        files, commit = self.datasets[name], self.commit(name)
        if rest.startswith("revision/"):
            return self.send(request, 200, json.dumps({"id": name, "sha": commit, "siblings": []}).encode())
        if rest.startswith("tree/"):
            tree = [
                {"type": "file", "path": file, "size": len(content), "oid": sha1(content).hexdigest()}
                for file, content in files.items()
            ]
            return self.send(request, 200, json.dumps(tree).encode())
        if name in self.gated:
            return self.send(request, 403, b"", {"X-Error-Code": "GatedRepo"})
        file = rest.split("/", 2)[2]
        if request.command == "GET":
            self.downloads.append(f"{name}/{file}")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{sha1(files[file]).hexdigest()}"'}
        return self.send(request, 200, files[file], headers)

    def send(self, request, status, body, headers=None):
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def hub(cache, monkeypatch):
    hub = Hub()
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def unplug(monkeypatch):
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


SPLITS = {
    "README.md": b"# Prompts",
    "dataset_infos.json": b"{}",
    "data/train-00000-of-00002-0a1b.json": as_json("a cat", "a dog"),
    "data/train-00001-of-00002-0a1b.json": as_json("a fish", "a cat"),
    "data/validation_unique-00000-of-00001.json": as_json("a bird"),
    "data/test.jsonl": json.dumps({"prompt": STRANGE[1], "style": "photo"}).encode(),
}


@pytest.mark.parametrize(
    "split, prompts",
    [
        ("train", tagged(("a cat",), ("a dog",), ("a fish",))),
        ("training", tagged(("a cat",), ("a dog",), ("a fish",))),
        ("validation_unique", tagged(("a bird",))),
        ("test", tagged((STRANGE[1], "photo"))),
    ],
)
def test_a_split_of_a_dataset_is_all_that_is_downloaded(hub, split, prompts, caplog):
    caplog.set_level(logging.INFO, "ngrpo_train")
    hub.datasets["some/prompts"] = SPLITS
    assert load_tagged(f"hub:some/prompts:{split}") == prompts
    assert load_tagged(f"hub:some/prompts/data:{split}") == prompts
    wanted = [name for name in SPLITS if split.removesuffix("ing") in name]
    assert sorted(hub.downloads) == [f"some/prompts/{name}" for name in wanted]  # once each
    said = f"downloading {len(wanted)} prompt files of some/prompts, 0.00 GiB"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_an_unclear_choice_of_split_is_refused(hub):
    hub.datasets["some/prompts"] = SPLITS
    known = "test, train, validation_unique"
    refused("hub:some/prompts", f"there are splits {known}: add one of them, such as :test")
    refused("hub:some/prompts:tran", rf"no split 'tran'; known are {known}; did you mean train\?")
    refused("hub:some/prompts:validation", f"no split 'validation'; known are {known}")
    assert not hub.downloads


@pytest.mark.parametrize(
    "files, source, reason",
    [
        (["a.txt", "b.csv"], "", r"its prompt files are a\.txt, b\.csv: add one of them, such as /a\.txt"),
        (["a.txt", "b.csv"], ":test", r"no split 'test'; its prompt files are a\.txt, b\.csv"),
        (["a.txt", "b.csv"], "/b.tsv", r"no b\.tsv; its prompt files are a\.txt, b\.csv; did you mean b\.csv\?"),
        (["a.txt", "b.csv"], "/c.csv", r"no c\.csv; its prompt files are a\.txt, b\.csv; did you mean b\.csv\?"),
        (["a.txt", "b.csv"], "/a.txt:test", r"a\.txt is one file: leave out the split 'test'"),
        (["p.png"], "", r"it has no prompt files \(\.txt, "),
        (["p.png"], "/p.txt", r"no p\.txt; it has no prompt files"),
        (["en/train.json", "fr/train.json"], "", "several folders: add one of them, such as /en"),
        (["train-00000-of-00003.json"], "", r"only 1 of its 3 files are here"),
    ],
)
def test_a_dataset_that_leaves_open_what_is_meant(hub, files, source, reason):
    hub.datasets["some/prompts"] = dict.fromkeys(files, as_json("a cat"))
    refused(f"hub:some/prompts{source}", reason)


@pytest.mark.parametrize("files", [["prompts.json"], ["train.json", "about.json"], ["train/0.json", "about.json"]])
def test_the_only_file_or_split_need_not_be_named(hub, files):
    hub.datasets["some/prompts"] = dict(zip(files, [as_json(*STRANGE), b"{}"], strict=False))
    assert load_tagged("hub:some/prompts") == tagged(*((text,) for text in STRANGE))


def test_a_file_and_a_folder_of_styles(hub):
    files = {"odd [1]/anime.json": as_json("a cat"), "odd [1]/photo.json": as_json("a cat"), "odd 1/x.json": b"["}
    hub.datasets["some/prompts"] = files
    assert load_tagged("hub:some/prompts/odd [1]/photo.json") == tagged(("a cat", ""))
    assert load_tagged("hub:some/prompts/odd [1]") == tagged(("a cat", "anime"), ("a cat", "photo"))
    refused("hub:some/prompts/odd 1", r"odd 1/x\.json: Expecting value")


@pytest.mark.parametrize("name", ["prompts", "", "a/b/", "a/b:", "a/b:c:d", "/a/b"])
def test_what_is_no_dataset(name):
    refused(f"hub:{name}", "is not of the form hub:OWNER/DATASET")


def test_a_dataset_that_is_not_there_or_not_open(hub):
    refused("hub:some/prompts", "there is no dataset some/prompts on the hub, or it is private: check the spelling")
    hub.datasets["some/prompts"] = {"p.json": as_json("a cat")}
    hub.gated.add("some/prompts")
    refused("hub:some/prompts", "some/prompts is gated: accept its licence on its hub page, then run `hf auth login`")


def test_without_the_hub_the_cache_will_do(hub, unplug, caplog):
    hub.datasets["some/prompts"] = SPLITS
    online = load_tagged("hub:some/prompts:train"), load_tagged("hub:some/prompts/data/test.jsonl")
    assert not caplog.records
    unplug()
    assert (load_tagged("hub:some/prompts:train"), load_tagged("hub:some/prompts/data/test.jsonl")) == online
    assert "does not give some/prompts: its files in the cache are used" in caplog.text
    command = "hf download --repo-type dataset some/prompts data/b.txt"
    refused("hub:some/prompts/data/b.txt", f"HF_HUB_OFFLINE is set: fetch it with `{command}`")
    refused("hub:some/prompts/c", r"`hf download --repo-type dataset some/prompts --include 'c/\*'`")


@pytest.mark.parametrize(
    "source, arguments",
    [
        ("hub:some/prompts", ""),
        ("hub:some/prompts:test", "--include '*test*'"),
        ("hub:some/prompts/a b", "--include 'a b/*'"),
        ("hub:some/prompts/p.json", "p.json"),
    ],
)
def test_with_neither_the_command_is_said(cache, source, arguments):
    command = f"`hf download --repo-type dataset some/prompts {arguments}".rstrip() + "`"
    refused(source, re.escape(f"is not in the cache, and HF_HUB_OFFLINE is set: fetch it with {command}"))


def test_a_hub_that_does_not_answer(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens at the discard port
    refused("hub:some/prompts/p.json", "the hub cannot be reached: fetch it with `hf download")


# --- HPDv2


def hpdv2(per_style):
    benchmark = {f"benchmark/{s}.json": as_json(*(f"{s} {i}" for i in range(per_style)), "a cat") for s in STYLES}
    pairs = [{"human_preference": [0, 1], "prompt": text, "file_path": ["a.jpg", "b.jpg"]} for text in "abab"]
    return benchmark | {
        "benchmark/drawbench.json": as_json("a dog"),
        "train.json": as_json(*pairs),
        "test.json": as_json({"prompt": "c", "rank": [1, 2]}),
    }


@pytest.mark.parametrize("repository", ["zhwang/HPDv2", "ymhao/HPDv2"])
def test_hpdv2(hub, repository, caplog):
    hub.datasets[repository] = hpdv2(per_style=799)
    expected = [(text, style) for style in STYLES for text in [*(f"{style} {i}" for i in range(799)), "a cat"]]
    assert load_tagged("hpdv2:benchmark") == tagged(*expected)
    assert len(load_prompts("hpdv2:benchmark")) == 4 * 799 + 1
    assert load_tagged("hpdv2:train") == tagged(("a",), ("b",))
    assert load_tagged("hpdv2:test") == tagged(("c",))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    refused(
        "hpdv2:benchmarks", r"unknown split 'benchmarks'; known are benchmark, train, test; did you mean benchmark\?"
    )


def test_a_benchmark_of_another_size_is_said_aloud(hub, caplog):
    hub.datasets["zhwang/HPDv2"] = hpdv2(per_style=799) | {"benchmark/photo.json": as_json("a cat")}
    load_tagged("hpdv2:benchmark")
    assert [record.getMessage() for record in caplog.records] == ["benchmark/photo.json has 1 prompts, HPDv2 800"]


def test_the_second_copy_of_hpdv2_does_for_a_first_that_is_incomplete(hub):
    hub.datasets = {"zhwang/HPDv2": {"train.json": as_json("a")}, "ymhao/HPDv2": hpdv2(per_style=1)}
    assert texts_of("hpdv2:test") == ["c"]
    assert texts_of("hpdv2:train") == ["a"]


def test_hpdv2_without_the_hub(cache):
    files = " ".join(f"benchmark/{style}.json" for style in STYLES)
    refused("hpdv2:benchmark", f"fetch it with `hf download --repo-type dataset zhwang/HPDv2 {files}`")


def test_a_local_copy_of_hpdv2(tmp_path):
    for name, content in hpdv2(per_style=2).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    benchmark = load_tagged(str(tmp_path / "benchmark"))
    assert Counter(prompt.style for prompt in benchmark) == {**dict.fromkeys(STYLES, 3), "drawbench": 1}
    assert texts_of(str(tmp_path / "train.json")) == ["a", "b"]
