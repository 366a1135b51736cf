"""Which pictures a model takes beside the text, and the refusal of prompts that lack them; nothing is loaded."""

import json

import diffusers
import pytest
from PIL import Image

from ngrpo_train.models.directory import pipeline_class_name
from ngrpo_train.models.needs import Pictures, pictures_of, pictures_of_pipeline, refuse_without_pictures
from ngrpo_train.prompts import Prompt, load_prompts
from ngrpo_train.recipe.sections import Model

EDITING = Pictures(needed=("image",))
FILLING = Pictures(needed=("image", "mask"))
EITHER = Pictures(optional=("image",))


class Restorer:
    """An adapter's class, as far as it is asked here."""

    pictures = ("image", "depth")


@pytest.mark.parametrize(
    "name, pictures",
    [
        ("FluxPipeline", Pictures()),
        ("FluxKontextPipeline", EDITING),
        ("FluxFillPipeline", FILLING),
        ("Flux2Pipeline", EITHER),
        ("Flux2KleinPipeline", EITHER),
        ("StableDiffusion3Pipeline", Pictures()),
        ("QwenImagePipeline", Pictures()),
        ("QwenImageEditPipeline", EDITING),
        ("QwenImageEditPlusPipeline", EDITING),
        ("ZImagePipeline", Pictures()),
        ("ChromaPipeline", Pictures()),
        ("Lumina2Pipeline", Pictures()),
        ("SanaPipeline", Pictures()),
        ("LTXPipeline", Pictures()),
        ("WanPipeline", Pictures()),
        ("WanImageToVideoPipeline", EDITING),
    ],
)
def test_a_pipelines_class_says_which_pictures_it_takes(tmp_path, name, pictures):
    assert pictures_of_pipeline(getattr(diffusers, name)) == pictures
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    assert pictures_of(Model(name_or_path=str(tmp_path))) == pictures


def test_where_the_class_is_found(tmp_path, monkeypatch):
    """On this machine, among published configs, in the hub's cache."""
    asked = []

    def from_hub(repository, file):
        asked.append(repository)
        (tmp_path / "cached.json").write_text('{"_class_name": "FluxFillPipeline"}')
        return str(tmp_path / "cached.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", from_hub)
    known = ["shapes", "black-forest-labs/FLUX.1-dev", "random:flux-schnell", "random:flux-dev:2+4"]
    assert {pipeline_class_name(name) for name in known} == {"FluxPipeline"}
    assert [pipeline_class_name(str(tmp_path)), pipeline_class_name("new"), asked] == ["", "", []]
    assert pictures_of(Model(name_or_path="someone/fills")) == FILLING
    assert asked == ["someone/fills"]


def test_a_model_that_is_nowhere_is_left_to_its_loading(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "PipelineOfNextYear"}')
    for name in ("nobody/nothing", str(tmp_path)):
        assert pictures_of(Model(name_or_path=name)) is None
        refuse_without_pictures(Model(name_or_path=name), {"train": [Prompt("a dog")]})


def test_an_adapter_of_ones_own_says_it_by_its_class(tmp_path):
    adapter = f"{__name__}:Restorer"
    assert pictures_of(Model(adapter=adapter)) == Pictures(needed=("image", "depth"))
    for silent in ("json:loads", "ngrpo_train.models.pipeline:Pipeline"):  # then the pipeline's class says it
        for kind, pictures in (("FluxPipeline", Pictures()), ("FluxFillPipeline", FILLING)):
            (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
            assert pictures_of(Model(adapter=silent, name_or_path=str(tmp_path))) == pictures
    with pytest.raises(ValueError, match=r"^model\.adapter = 'nowhere:Model': No module named 'nowhere'"):
        pictures_of(Model(adapter="nowhere:Model"))


# --- prompts that lack them


def written(folder, *rows):
    (folder / "p.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"prompt {i}", **row}) for i, row in enumerate(rows))
    )
    Image.new("RGB", (8, 4)).save(folder / "a.png")
    Image.new("L", (8, 4)).save(folder / "m.png")
    Image.new("L", (4, 8)).save(folder / "turned.png")
    return load_prompts(str(folder / "p.jsonl"))


def refusal_of(pictures, **prompts):
    with pytest.raises(ValueError, match=r"^the model ") as caught:
        pictures.refuse("the model", prompts)
    return str(caught.value)


def test_the_first_row_that_lacks_a_picture_is_named_and_the_others_are_counted(tmp_path):
    whole = {"image": "a.png", "mask": "m.png"}
    prompts = written(tmp_path, whole, {**whole, "image": "b.png"}, whole, {"image": "a.png", "mask": "turned.png"}, {})
    no_file = f"[Errno 2] No such file or directory: '{tmp_path}/b.png'"
    assert refusal_of(FILLING, train=prompts[:1], test=prompts) == (
        "the model cannot draw 'prompt 1' (row 2 of its file) and 2 more of 5 of test: needs the picture that the "
        f'row\'s field "image" names: {no_file}'
    )
    assert refusal_of(FILLING, test=prompts[3:4]) == (
        "the model cannot draw 'prompt 3' (row 4 of its file) of test: needs a mask of its picture's size, 8x4, in the "
        "row's field \"mask\", and 'turned.png' is 4x8"
    )
    FILLING.refuse("the model", {"train": prompts[:1], "test": prompts[2:3]})
    EDITING.refuse("the model", {"train": prompts[3:4]})
    Pictures().refuse("the model", {"train": prompts})


def test_optional_pictures_are_for_all_rows_or_for_none(tmp_path):
    prompts = written(tmp_path, {"image": "a.png"}, {"image": ""}, {"image": None}, {}, {"image": "none.png"})
    EITHER.refuse("the model", {"train": prompts[:1], "test": prompts[:1]})
    EITHER.refuse("the model", {"train": prompts[1:4], "test": [Prompt("a dog")]})
    assert refusal_of(EITHER, train=prompts[1:3], test=prompts[:1]) == (
        "the model takes a picture with every prompt of a run or with none: 'prompt 0' (row 1 of its file) of test "
        "names 'a.png' in its row's field \"image\", and 'prompt 1' (row 2 of its file) of train names none"
    )
    lacking = "the model cannot draw 'prompt 4' (row 5 of its file) of train: needs the picture"
    assert refusal_of(EITHER, train=[prompts[0], prompts[4]]).startswith(lacking)


def test_many_files_are_looked_at_once_each(tmp_path, monkeypatch):
    """A prompt list may edit one picture in many ways."""
    for i in range(50):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{i}.png")
    prompts = written(tmp_path, *({"image": f"{i % 50}.png", "way": i} for i in range(2000)))
    opened, really = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: (opened.append(file.name), really(file))[1])
    EDITING.refuse("the model", {"train": prompts})
    assert sorted(opened) == sorted(f"{i}.png" for i in range(50))
