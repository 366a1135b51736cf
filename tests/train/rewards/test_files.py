"""The table of what scorers read from the hub, against what they ask for when it is not there."""

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import find_scorer, weights
from ngrpo_train.rewards.files import HUB_FILES


@pytest.mark.parametrize("name", HUB_FILES)
def test_what_is_missing_is_in_the_table(name, monkeypatch):
    asked = []

    def nothing(repository, file, **_):
        asked.append((repository, file))
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(weights, "hf_hub_download", nothing)
    with pytest.raises(ValueError, match=rf"^rewards\.{name}: .*`hf download ") as raised:
        find_scorer(name, Reward(), torch.device("cpu"))
    assert "\n" not in str(raised.value)
    known = {repository: names for repository, names in HUB_FILES[name]}
    assert asked
    for repository, _ in asked:
        assert repository in known
    repository = asked[0][0]
    assert f"hf download {repository} {' '.join(known[repository])}" in str(raised.value)


def test_a_tokenizer_elsewhere_is_in_the_table():
    from ngrpo_train.rewards.clip_scorer import TOKENIZER
    from ngrpo_train.rewards.shipped.image_reward import TOKENIZER as BERT

    for name, tokenizer in (("hpsv2_1", TOKENIZER), ("pickscore", TOKENIZER), ("image_reward", BERT)):
        assert HUB_FILES[name][1][0] == tokenizer
