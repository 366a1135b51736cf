"""Videos before scorers: which frames stand for one, the mean of their scores, and scorers that want the whole."""

import math
import sys
from fractions import Fraction

import pytest
import requests
import torch
from torch import Tensor

from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.ranges import check_ranges
from ngrpo_train.recipe.rewards import Pairwise
from ngrpo_train.recipe.sections import Prompts, Recipe, Reward, Sampling
from ngrpo_train.rewards import RewardError, Rewards, find_scorer, remote, wire
from ngrpo_train.rewards.frames import are_pictures, chosen_frames, places

from .servers import answer, completion, judging, scripted, serving

FRAMES, PROMPTS = 9, [Prompt("a dog"), Prompt("a black cat")]
# Level 10 * i in all pixels of frame i of the first video, and 1 more in each of the second's.
VIDEOS = (10 * torch.arange(FRAMES) + torch.arange(2)[:, None]).byte()[..., None, None, None].expand(2, FRAMES, 3, 4, 6)


def level(images: Tensor, prompts: list[str]) -> Tensor:
    """A scorer of pictures: the level of a picture's first pixel, and the length of its prompt as a fraction."""
    assert images.is_contiguous()
    assert images.shape[1:] == (3, 4, 6)
    return images[:, 0, 0, 0].float() + torch.tensor([len(prompt) / 100 for prompt in prompts])


def motion(videos: Tensor, prompts: list[str]) -> Tensor:
    """A scorer of videos: the mean change from a frame to the next."""
    return videos.float().diff(dim=1).mean((1, 2, 3, 4))


motion.takes_videos = True  # type: ignore[attr-defined]


@pytest.fixture
def own(monkeypatch):
    """Settings of a reward that is this function."""

    def settings(scorer, **more):
        module = sys.modules.get("scorers_of_frames") or type(sys)("scorers_of_frames")
        setattr(module, scorer.__name__, scorer)
        monkeypatch.setitem(sys.modules, "scorers_of_frames", module)
        return Reward(path=f"scorers_of_frames:{scorer.__name__}", **more)

    monkeypatch.delenv(remote.TOKEN_VARIABLE, raising=False)
    return settings


# --- the choice


@pytest.mark.parametrize(
    "frames, count, expected",
    [
        ("first", 5, [0]),
        ("middle", 5, [2]),
        ("middle", 4, [2]),
        ("last", 5, [4]),
        ("all", 5, [0, 1, 2, 3, 4]),
        (1, 5, [2]),
        (2, 8, [2, 6]),
        (3, 9, [1, 4, 7]),
        (4, 81, [10, 30, 50, 70]),
        (4, 4, [0, 1, 2, 3]),
        (9, 4, [0, 1, 2, 3]),
        (4, 1, [0]),
    ],
)
def test_frames_by_hand(frames, count, expected):
    assert places(frames, count) == expected


def test_a_number_takes_the_middle_of_each_part():
    for count in range(1, 30):
        for n in range(1, count + 1):
            middles = [math.floor(Fraction(count, n) * (i + Fraction(1, 2))) for i in range(n)]
            assert places(n, count) == middles
            assert len(set(middles)) == n


def test_frames_of_a_video_and_of_a_picture():
    assert torch.equal(chosen_frames(VIDEOS, 3), VIDEOS[:, [1, 4, 7]])
    assert torch.equal(chosen_frames(VIDEOS[:, 0], 3), VIDEOS[:, :1])


def test_what_is_a_picture():
    assert are_pictures(VIDEOS)
    assert are_pictures(VIDEOS[:, 0])
    assert not are_pictures(VIDEOS.float())
    assert not are_pictures(VIDEOS[:, :, :1])
    assert not are_pictures(torch.zeros(2, 3, 100, dtype=torch.uint8))


# --- scores


@pytest.mark.parametrize(
    "frames, mean", [("first", 0), ("middle", 40), ("last", 80), ("all", 40), (2, (20 + 60) / 2), (5, 200 / 5)]
)
def test_a_videos_score_is_the_mean_of_its_frames(own, frames, mean):
    """Places of 5 are 0, 2, 4, 6, 8. The second video is one level brighter, and its prompt has 11 letters."""
    scores = Rewards({"level": own(level, frames=frames)}).score(VIDEOS, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor([[mean + 0.05, mean + 1.11]]))
    assert scores.dtype == torch.float32


def test_without_a_choice_four_frames_are_scored(own):
    seen = []

    def spy(images, prompts):
        seen.append((images[:, 0, 0, 0].tolist(), prompts))
        return level(images, prompts)

    Rewards({"spy": own(spy)}).score(VIDEOS, PROMPTS)
    assert seen == [([10, 30, 50, 70, 11, 31, 51, 71], ["a dog"] * 4 + ["a black cat"] * 4)]


def test_each_frame_comes_with_its_videos_row(own):
    def aimed(images, prompts, rows):
        return [image[0, 0, 0].item() * row["aim"] for image, row in zip(images, rows, strict=True)]

    prompts = [Prompt("a", row={"aim": 1.0}), Prompt("b", row={"aim": -2.0})]
    assert Rewards({"aimed": own(aimed, frames=2)}).score(VIDEOS, prompts).tolist() == [[40, -82]]


def test_a_scorer_that_takes_videos_gets_them_whole(own):
    rewards = Rewards({"motion": own(motion), "level": own(level, frames="last")})
    assert rewards.with_videos == {"motion"}
    torch.testing.assert_close(rewards.score(VIDEOS, PROMPTS), torch.tensor([[10.0, 10.0], [80.05, 81.11]]))


def test_groups_of_videos_are_scored_as_groups_of_pictures_are(own):
    scores = Rewards({"level": own(level, frames="first")})(VIDEOS.repeat(3, 1, 1, 1, 1), PROMPTS)
    torch.testing.assert_close(scores.all_RPG, torch.tensor([[[0.05, 1.05, 0.05], [1.11, 0.11, 1.11]]]))


def test_a_reward_that_compares_sees_one_frame_of_each_at_a_time(monkeypatch):
    """The first of two videos is the brighter one in one of three frames: it wins a third."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    levels = torch.tensor([[[9, 1, 1]], [[5, 5, 5]]], dtype=torch.uint8).view(2, 3, 1, 1, 1)
    with judging("a-judge") as server:
        server.respond = lambda question, before: completion(
            f"Better: {'A' if question.values[0] > question.values[1] else 'B'}"
        )
        settings = Pairwise(remote=server.url, path="a-judge", template="better_of_two", frames="all")
        scores = Rewards({"pairwise": settings}).score(levels.expand(2, 3, 3, 2, 2), [Prompt("a cat")] * 2)
    torch.testing.assert_close(scores, torch.tensor([[1 / 3, 2 / 3]]))


# --- other samples, and what is refused


def test_any_sample_goes_to_a_scorer_that_takes_it(own):
    def loudness(sounds, prompts):
        return sounds.abs().mean((1, 2))

    loudness.takes_videos = True
    sounds = torch.linspace(-1, 1, 2 * 2 * 50).view(2, 2, 50)
    expected = [[sum(abs(value) for value in sound.flatten().tolist()) / 100 for sound in sounds]]
    torch.testing.assert_close(Rewards({"loudness": own(loudness)}).score(sounds, PROMPTS), torch.tensor(expected))


@pytest.mark.parametrize(
    "samples, shape",
    [
        (torch.zeros(2, 2, 50), "float32 [2, 2, 50]"),
        (VIDEOS[:, :, :1], "uint8 [2, 9, 1, 4, 6]"),
        (VIDEOS.half() / 255, "float16 [2, 9, 3, 4, 6]"),
    ],
)
def test_a_scorer_of_pictures_refuses_other_samples(own, samples, shape):
    with pytest.raises(RewardError) as raised:
        Rewards({"level": own(level)}).score(samples, PROMPTS)
    assert str(raised.value) == (
        "rewards.level scores pictures and frames of videos, uint8 [..., 3, H, W], and the model decodes to "
        f"{shape}: name a scorer of your own that has takes_videos = True"
    )


def test_a_failure_says_what_was_scored(own):
    def fails(images, prompts):
        raise KeyError("palette")

    def short(images, prompts):
        return [1]

    with pytest.raises(RewardError, match=r"failed on 2 videos, the first for 'a dog': KeyError"):
        Rewards({"fails": own(fails)}).score(VIDEOS, PROMPTS)
    with pytest.raises(RewardError, match=r"returned a tensor of shape \[1\] for 6 pictures, the first for 'a dog'"):
        Rewards({"short": own(short, frames=3)}).score(VIDEOS, PROMPTS)
    with pytest.raises(RewardError, match=r"failed on 2 pictures, the first for 'a dog': KeyError"):
        Rewards({"fails": own(fails)}).score(VIDEOS[:, 0], PROMPTS)


def test_frames_are_not_for_a_scorer_that_takes_the_whole(own):
    with pytest.raises(ValueError, match=r"^rewards\.motion\.frames = 'first' is for scorers of pictures"):
        Rewards({"motion": own(motion, frames="first")})


@pytest.mark.parametrize("frames", [0, -1])
def test_a_number_of_frames_is_positive(frames):
    with pytest.raises(ValueError, match=rf'^rewards\.a\.frames = {frames} must be "first", .* or a positive number$'):
        check_ranges(Reward(frames=frames), "rewards.a")


def test_frames_are_not_for_a_model_of_pictures():
    def recipe(frames, num_frames):
        return Recipe(
            prompts=Prompts(source="a.txt"),
            rewards={"clip": Reward(frames=frames)},
            sampling=Sampling(num_frames=num_frames),
        )

    check(recipe("last", 5))
    check(recipe(4, 1))
    with pytest.raises(
        ValueError, match=r"^rewards\.clip\.frames = 'last' is for videos, and sampling\.num_frames = 1"
    ):
        check(recipe("last", 1))


# --- through a server


def test_frames_and_videos_travel_as_the_servers_scorers_take_them(own):
    with serving({"level": own(level), "motion": own(motion)}) as url:
        assert requests.get(f"{url}/health", timeout=5).json()["rewards"] == [
            {"name": "level", "rows": False, "videos": False},
            {"name": "motion", "rows": False, "videos": True},
        ]
        served = {"level": Reward(remote=url, frames=3), "motion": Reward(remote=url, batch=1)}
        here = {"level": own(level, frames=3), "motion": own(motion)}
        assert torch.equal(Rewards(served).score(VIDEOS, PROMPTS), Rewards(here).score(VIDEOS, PROMPTS))
        with pytest.raises(ValueError, match=r"^rewards\.motion\.frames = 2 is for scorers of pictures"):
            Rewards({"motion": Reward(remote=url, frames=2)})
        with pytest.raises(RewardError, match=r"float32 \[2, 2, 50\] is no batch of pictures or videos"):
            Rewards({"motion": Reward(remote=url)}).score(torch.zeros(2, 2, 50), PROMPTS)


def test_a_server_that_knows_no_videos_gets_the_chosen_frames_alone():
    """Such as one of 0.1.0."""
    health = answer(200, b'{"status": "ok", "rewards": [{"name": "mine"}], "max_body_bytes": 1000000}')
    with scripted(health, answer(200, b'{"scores": {"mine": [1, 2, 3, 6]}}')) as server:
        scores = Rewards({"mine": Reward(remote=server.url, frames=2)}).score(VIDEOS, PROMPTS)
    assert scores.tolist() == [[1.5, 4.5]]
    sent = VIDEOS[:, [2, 6]].flatten(0, 1)
    assert server.received[1].body == wire.encode_pictures(sent, [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2)


def test_a_video_too_large_for_a_request(own, monkeypatch):
    with serving({"motion": own(motion)}, body_limit=1100) as url:
        scorer = find_scorer("motion", Reward(remote=url), torch.device("cpu"))
        with pytest.raises(ValueError, match=r"a video of 9 frames of 6x4 exceeds .* 1100 bytes: .* --max-body-mb"):
            scorer(VIDEOS, ["a", "b"])
    with serving({"motion": own(motion)}) as url:
        scorer = find_scorer("motion", Reward(remote=url), torch.device("cpu"))
        monkeypatch.setattr(wire, "MAX_PIXELS", 9 * 6 * 4 - 1)
        with pytest.raises(ValueError, match=r"a video of 9 frames of 6x4 exceeds .* 215 pixels: score it here"):
            scorer(VIDEOS, ["a", "b"])


def test_videos_there_and_back():
    body = wire.encode_pictures(VIDEOS, PROMPTS)
    videos, prompts = wire.decode_pictures(wire.SAFETENSORS, body)
    assert torch.equal(videos, VIDEOS)
    assert prompts == PROMPTS
    assert wire.most_pictures(VIDEOS, PROMPTS, len(body) + 10_000) >= 2


@pytest.mark.parametrize("shape", [(2, 0, 3, 4, 6), (2, 3, 1, 4, 6), (1, 2, 3, 3, 4, 6)])
def test_other_shapes_do_not_travel(shape):
    body = wire.encode_pictures(torch.zeros(shape, dtype=torch.uint8), PROMPTS)
    with pytest.raises(ValueError, match=r"^images must have the shape \[N, 3, height, width\], or \[N, frames, 3, "):
        wire.decode_pictures(wire.SAFETENSORS, body)


def test_all_frames_count_for_a_request(monkeypatch):
    monkeypatch.setattr(wire, "MAX_PIXELS", VIDEOS[:, :, 0].numel() - 1)
    with pytest.raises(ValueError, match=r"^18 pictures of 6x4 are more than 431 pixels"):
        wire.decode_pictures(wire.SAFETENSORS, wire.encode_pictures(VIDEOS, PROMPTS))
    assert wire.most_pictures(VIDEOS, PROMPTS, 10**6) == 1
