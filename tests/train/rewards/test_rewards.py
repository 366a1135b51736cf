"""Scorers: how they are found, what they are given, and that a failing one is an error that names it."""

import sys

import pytest
import torch

from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import RewardError, Rewards, Scores, find_scorer, refuse_non_finite
from ngrpo_train.shapes.judge import judge
from ngrpo_train.shapes.verifier import score

CPU = torch.device("cpu")
PROMPTS = [Prompt("a dog", 4), Prompt("a cat", 5)]
IMAGES = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 8, 8)  # three candidates of each prompt


def rewards_of(monkeypatch, *scorers, **settings):
    """Rewards `r0`, `r1`, ... of these functions."""
    module = type(sys)("scorers_under_test")
    for i, scorer in enumerate(scorers):
        setattr(module, f"r{i}", scorer)
    monkeypatch.setitem(sys.modules, "scorers_under_test", module)
    return Rewards({f"r{i}": Reward(path=f"scorers_under_test:r{i}", **settings) for i in range(len(scorers))})


def level(images, prompts):
    return images[:, 0, 0, 0].float()


# --- finding them


def test_shipped_rewards_are_found_by_name():
    assert find_scorer("shapes_verifier", Reward(), CPU) is score
    assert find_scorer("shapes_judge", Reward(), CPU) is judge


def test_an_unknown_name_is_answered_with_the_near_one_and_the_list():
    with pytest.raises(ValueError, match=r"^rewards\.shapes_juge: no reward of that name; did you mean shapes_judge\?"):
        find_scorer("shapes_juge", Reward(), CPU)
    with pytest.raises(
        ValueError, match=r"; there are aesthetic, clip, .*shapes_judge, .*, or set rewards\.nil\.path = "
    ):
        find_scorer("nil", Reward(), CPU)


@pytest.mark.parametrize(
    "path, reason",
    [
        ("nowhere:score", "No module named 'nowhere'"),
        ("math:nil", "module 'math' has no attribute 'nil'"),
        (":score", "must be package.module:Name"),
        ("math:pi", "is not callable"),
    ],
)
def test_a_path_that_leads_nowhere(path, reason):
    with pytest.raises(ValueError, match=rf"^rewards\.mine\.path = '{path}'.*{reason}"):
        find_scorer("mine", Reward(path=path), CPU)


# --- what they get and what comes of it


def test_scores_are_prompt_major_and_named(monkeypatch):
    seen = []

    def spy(images, prompts):
        seen.append((images, list(prompts)))
        return level(images, prompts)

    def listed(images, prompts):  # plain numbers will do
        return [len(prompt) + 0.5 for prompt in prompts]

    scores = rewards_of(monkeypatch, spy, listed)(IMAGES, PROMPTS)
    assert scores.names == ("r0", "r1")
    assert scores.all_RPG.dtype == torch.float32
    assert scores.all_RPG.tolist() == [[[0, 1, 2], [3, 4, 5]], [[5.5] * 3] * 2]
    [(images, prompts)] = seen
    assert images.dtype == torch.uint8
    assert torch.equal(images, IMAGES)
    assert prompts == ["a dog"] * 3 + ["a cat"] * 3


def test_weights_are_those_of_trained_rewards():
    rewards = Rewards(
        {
            "shapes_verifier": Reward(weight=2.0),
            "watched": Reward(weight=3.0, log_only=True, path="math:sqrt"),
            "off": Reward(weight=0.0, path="math:sqrt"),
            "shapes_judge": Reward(weight=-0.5),
        }
    )
    assert rewards.names == ("shapes_verifier", "watched", "off", "shapes_judge")
    assert rewards.trained == ("shapes_verifier", "shapes_judge")
    assert rewards.weights == (2.0, -0.5)


def test_no_graph_is_kept(monkeypatch):
    weight = torch.ones(1, requires_grad=True)
    scores = rewards_of(monkeypatch, lambda images, prompts: weight * level(images, prompts))(IMAGES, PROMPTS)
    assert not scores.all_RPG.requires_grad


def test_each_rank_sees_its_own_and_all(monkeypatch):
    rewards = rewards_of(monkeypatch, level)
    monkeypatch.setattr(processes, "all_gather", lambda x: torch.stack([x - 100, x]))
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    scores = rewards(IMAGES, PROMPTS)
    assert scores.all_RPG.tolist() == [[[-100, -99, -98], [-97, -96, -95], [0, 1, 2], [3, 4, 5]]]
    assert scores.local_RPG.tolist() == [[[0, 1, 2], [3, 4, 5]]]


# --- failures


@pytest.mark.parametrize(
    "scorer, complaint",
    [
        (lambda i, p: {}["palette"], r"failed on 6 pictures, the first for 'a dog': KeyError: 'palette'"),
        (lambda i, p: None, r"failed on 6 pictures, the first for 'a dog': "),
        (lambda i, p: level(i, p)[:5], r"returned a tensor of shape \[5\] for 6 pictures, the first for 'a dog'"),
        (lambda i, p: level(i, p)[:, None], r"returned a tensor of shape \[6, 1\] for 6 pictures"),
        (lambda i, p: level(i, p).mean(), r"returned a tensor of shape \[\] for 6 pictures"),
        (lambda i, p: [1, 2, 3, 4, float("nan"), 6], r"= nan for the prompt 'a cat'"),
        (lambda i, p: [float("-inf"), 2, 3, 4, 5, 6], r"= -inf for the prompt 'a dog'"),
    ],
)
def test_a_failure_names_reward_and_prompt(monkeypatch, scorer, complaint):
    with pytest.raises(RewardError, match=rf"^rewards\.r1 {complaint}") as raised:
        rewards_of(monkeypatch, level, scorer)(IMAGES, PROMPTS)
    assert "\n" not in str(raised.value)


def test_a_watched_reward_may_not_fail_either(monkeypatch):
    rewards = rewards_of(monkeypatch, lambda i, p: [float("nan")] * 6, log_only=True)
    with pytest.raises(RewardError, match=r"^rewards\.r0 = nan"):
        rewards(IMAGES, PROMPTS)


def test_a_failure_elsewhere_stops_this_rank_too(monkeypatch):
    rewards = rewards_of(monkeypatch, level)
    monkeypatch.setattr(processes, "all_gather", lambda x: torch.stack([x, x * float("nan")]))
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    with pytest.raises(RewardError, match="on another rank, which names it"):
        rewards(IMAGES, PROMPTS)


def test_finite_scores_pass():
    refuse_non_finite(("a",), torch.tensor([[0.0, -3e38]]), [Prompt("x"), Prompt("y")])
    assert Scores(("a",), ("a",), (1.0,), torch.zeros(1, 2, 3)).local_RPG.shape == (1, 2, 3)


# --- combining several

THREE = torch.tensor([[[0.0, 1.0]], [[9.0, -9.0]], [[5.0, 7.0]]])


def test_standardised_rewards_keep_their_own_rows_and_weights():
    scores = Scores(("a", "off", "b"), ("a", "b"), (1.0, 0.5), THREE)
    together, weights = scores.combined("standardized")
    assert together.tolist() == [[[0.0, 1.0]], [[5.0, 7.0]]]
    assert weights == (1.0, 0.5)


def test_a_raw_sum_is_one_reward():
    """0 + 0.5 * 5 = 2.5 and 1 + 0.5 * 7 = 4.5."""
    together, weights = Scores(("a", "off", "b"), ("a", "b"), (1.0, 0.5), THREE).combined("raw_sum")
    assert together.tolist() == [[[2.5, 4.5]]]
    assert weights == (1.0,)


def test_what_is_only_watched_is_not_scored_in_training(monkeypatch):
    def fails(images, prompts):
        raise AssertionError("scored")

    module = type(sys)("scorers_under_test")
    module.fails, module.level = fails, level
    monkeypatch.setitem(sys.modules, "scorers_under_test", module)
    rewards = Rewards(
        {
            "slow": Reward(path="scorers_under_test:fails", watch_only=True),
            "fast": Reward(path="scorers_under_test:level", weight=3.0),
        }
    )
    scores = rewards(IMAGES, PROMPTS)
    assert scores.names == ("fast",)
    assert (rewards.trained, rewards.weights) == (("fast",), (3.0,))
    with pytest.raises(RewardError, match=r"^rewards\.slow failed"):
        rewards.score(IMAGES, [Prompt("x")] * 6)


def test_pictures_are_laid_out_alike_wherever_they_come_from(monkeypatch):
    strides = []

    def spy(images, prompts):
        strides.append(images.stride())
        return level(images, prompts)

    rewards = rewards_of(monkeypatch, spy)
    pictures = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
    for images in (pictures, pictures.to(memory_format=torch.channels_last), pictures.expand(2, 3, 4, 5)):
        rewards.score(images, [Prompt("x"), Prompt("y")])
    assert set(strides) == {(60, 20, 5, 1)}
