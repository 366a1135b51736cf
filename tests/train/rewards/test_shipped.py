"""The rewards that ship: what a file says of its weights, against what its scorer asks for; what listing them costs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from ngrpo_train.recipe.rewards import settings_class
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import find_scorer, shipped, weights
from ngrpo_train.rewards.towers import NOTHING

FOLDER = Path(shipped.__file__).parent
WITH_WEIGHTS = ("aesthetic", "clip", "clip_iqa", "geneval", "hpsv2_1", "hpsv3", "image_reward", "pickscore")
OF_THE_WORLDS = (
    "motion_verifier",
    "shapes_judge",
    "shapes_verifier",
    "spelling_colour",
    "spelling_judge",
    "spelling_paper",
)


def test_every_file_is_a_reward():
    assert {*shipped.NAMES} == {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert {*shipped.NAMES} == {*WITH_WEIGHTS, *OF_THE_WORLDS, "ocr", "pairwise", "unified"}
    assert [name for name in shipped.NAMES if shipped.find(name).hub_files] == [*WITH_WEIGHTS]
    assert shipped.find("nil") is None


def test_a_further_reward_is_a_further_file(tmp_path, monkeypatch):
    """Found, loaded, sized and offered by name."""
    (tmp_path / "plain.py").write_text(
        "from ngrpo_train.rewards.shipped import Shipped\n"
        "REWARD = Shipped(load=lambda name, settings, device: lambda images, prompts: [1.0] * len(images))\n"
    )
    monkeypatch.setattr(shipped, "__path__", [*shipped.__path__, str(tmp_path)])
    monkeypatch.setattr(shipped, "NAMES", tuple(shipped.listed()))
    assert "plain" in shipped.NAMES
    assert find_scorer("plain", Reward(), torch.device("cpu"))([0, 0], ["a", "b"]) == [1.0, 1.0]
    assert shipped.find("plain").size(Reward()) == NOTHING
    with pytest.raises(ValueError, match=r"did you mean plain\?; there are aesthetic, .*, plain, "):
        find_scorer("plane", Reward(), torch.device("cpu"))
    sys.modules.pop("ngrpo_train.rewards.shipped.plain")


def test_a_reward_has_a_name_of_its_own_and_says_its_kind():
    cpu = torch.device("cpu")
    assert find_scorer("mine", Reward(kind="shapes_verifier"), cpu) is find_scorer("shapes_verifier", Reward(), cpu)
    with pytest.raises(
        ValueError, match=r"^rewards\.mine: kind = 'shapes_juge' .*; did you mean shapes_judge\?; there are "
    ):
        find_scorer("mine", Reward(kind="shapes_juge"), cpu)
    with pytest.raises(ValueError, match=r"^rewards\.mine: kind = 'nil' is no reward that ships; there are "):
        find_scorer("mine", Reward(kind="nil", remote="http://localhost:1"), cpu)
    with pytest.raises(ValueError, match=r"^rewards\.mine\.kind = 'clip' does not go with path = 'math:sqrt'"):
        find_scorer("mine", Reward(kind="clip", path="math:sqrt"), cpu)
    with pytest.raises(ValueError, match=r"^rewards\.mine: a judge needs a server: .* CodeGoat24/UnifiedReward"):
        find_scorer("mine", Reward(kind="unified"), cpu)


def test_listing_the_names_imports_none_of_them():
    code = (
        "import sys; from ngrpo_train.rewards import shipped; assert shipped.NAMES; "
        "print([name for name in sys.modules if name.startswith((shipped.__name__ + '.', 'transformers.models.clip'))])"
        "\nassert shipped.find('ocr'); print({'onnxruntime', 'cv2', 'rapidocr'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\nset()\n"


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_what_is_missing_is_what_the_file_says(name, monkeypatch):
    asked = []

    def nothing(repository, file, **_):
        asked.append((repository, file))
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(weights, "hf_hub_download", nothing)
    with pytest.raises(ValueError, match=rf"^rewards\.{name}: .*`hf download ") as raised:
        find_scorer(name, settings_class(name)(), torch.device("cpu"))
    assert "\n" not in str(raised.value)
    known = dict(shipped.find(name).hub_files)
    assert asked
    for repository, _ in asked:
        assert repository in known
    repository = asked[0][0]
    assert f"hf download {repository} {' '.join(known[repository])}" in str(raised.value)


def test_a_tokenizer_elsewhere_is_said_too():
    from ngrpo_train.rewards.clip_scorer import TOKENIZER
    from ngrpo_train.rewards.shipped.image_reward import TOKENIZER as BERT

    for name, tokenizer in (("hpsv2_1", TOKENIZER), ("pickscore", TOKENIZER), ("image_reward", BERT)):
        assert shipped.find(name).hub_files[1][0] == tokenizer
