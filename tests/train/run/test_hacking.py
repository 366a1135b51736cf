"""The watch for reward hacking: hand-worked symptoms, figures of a real run, and what a resumed run remembers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.algorithms import Neighbor
from ngrpo_train.recipe.sections import Evaluation as EvaluationSettings
from ngrpo_train.recipe.sections import Recipe, Reward
from ngrpo_train.rewards import Rewards
from ngrpo_train.rewards.scorer import ModelScorer
from ngrpo_train.run import artifacts
from ngrpo_train.run.curves import chart, draw
from ngrpo_train.run.hacking import Change, Sight, Watch
from ngrpo_train.sampling.evaluate import Evaluation, evaluate
from ngrpo_train.sampling.pictures import pictures

PROMPTS = tuple(map(Prompt, "abcd"))
REWARDS = {
    "trained": Reward(path="math:sqrt", weight=2.0),
    "watched": Reward(path="math:sqrt", log_only=True),
    "rare": Reward(path="math:sqrt", watch_only=True),
}
STEADY = torch.tensor([[0.1, 0.3, 0.2, 0.4, 0.0, 0.2, 0.5, 0.5]])  # two pictures of each prompt


def sight(
    trained: float = 0.0, watched: float = 0.0, grid: float = 1.0, diversity: float = 1.0, a: float = 0.0
) -> Sight:
    """The base model's, with this much added to or in place of what it shows."""
    scores = torch.cat([STEADY + trained, STEADY + watched, STEADY])
    colour = torch.tensor([[50.0, a, 0.0, 10.0]]).expand(8, 4)
    evaluation = Evaluation(tuple(REWARDS), PROMPTS, scores)
    return Sight(evaluation, torch.full((4,), grid), colour, torch.full((4,), diversity))


def watch(**algorithm: object) -> Watch:
    recipe = Recipe(rewards=REWARDS, algorithm=Neighbor(**algorithm))
    return Watch(recipe, Rewards(REWARDS), sight())


def symptoms(now: Sight) -> dict[str, str]:
    return dict(watch().warnings(now))


# --- symptoms


def test_the_base_model_has_none():
    assert symptoms(sight()) == {}


def test_hacking_is_a_rise_here_and_a_fall_there():
    assert symptoms(sight(trained=0.1)) == {}
    assert symptoms(sight(watched=-0.1)) == {}
    assert symptoms(sight(trained=0.1, watched=0.1)) == {}
    found = symptoms(sight(trained=0.1, watched=-0.02))
    assert found["hacking"].startswith("reward hacking: trained rose by 0.1 while watched fell by 0.02: ")


def test_a_change_that_may_be_chance_is_no_hacking():
    """Differences of prompts -0.4, 0.1, 0.1, 0.1: mean -0.025, standard error 0.125."""
    now = sight(trained=0.1)
    noise = torch.tensor([-0.4, -0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    scores = now.evaluation.scores_RN.clone()
    scores[1] += noise
    assert symptoms(replace(now, evaluation=replace(now.evaluation, scores_RN=scores))) == {}
    change = Change.of(noise.view(4, 2).mean(1))
    assert (change.mean, change.error) == pytest.approx((-0.025, 0.125))


def test_sameness_grids_and_casts():
    assert symptoms(sight(diversity=0.75, grid=1.4, a=7.0)) == {}
    alike = symptoms(sight(diversity=0.6))["diversity"]
    assert "diversity 60% of the base model's" in alike
    assert alike.endswith("or raise algorithm.sigma = 0.3")
    assert "1.6 times the base model's spectral peaks" in symptoms(sight(grid=1.6))["grid"]
    assert "moved 9 CIELAB units" in symptoms(sight(a=-9.0))["cast"]


def test_a_grid_in_one_picture_is_not_growing():
    now = replace(sight(), grid_P=torch.tensor([1.0, 1.0, 1.0, 9.0]))
    assert symptoms(now) == {}


# --- figures


def test_figures_are_those_of_the_pictures():
    figures = watch(p=2.0).figures(sight(trained=0.5, grid=1.2, a=3.0))
    assert figures["validation/trained"] == pytest.approx(0.275 + 0.5)
    assert figures["validation/watched"] == figures["validation/rare"] == pytest.approx(0.275)
    assert figures["watch/grid"] == pytest.approx(1.2)
    assert figures["watch/colour_shift"] == figures["watch/colour_cast"] == pytest.approx(3.0)
    assert figures["watch/chroma"] == 0
    assert figures["watch/diversity"] == 1
    assert figures["watch/flat_groups"] == pytest.approx(0.25), "the two pictures of d have equal rewards"
    assert figures["watch/flatness"] == pytest.approx(1.0), "two advantages are always alike in size"


def test_the_score_counts_trained_rewards_in_their_own_spread():
    """One sd of the base model's scores, times the weight 2; what is watched counts for nothing."""
    sd = STEADY.std(correction=0).item()
    assert watch()._score(sight(trained=sd, watched=9.0)) == pytest.approx(2.0)


def test_raw_sums_reach_the_groups():
    """Under "raw_sum" a reward of wide spread decides; here it alone is flat in no group."""
    rewards = {"wide": Reward(path="math:sqrt"), "narrow": Reward(path="math:sqrt")}
    wide = torch.tensor([[0.0, 10.0]]).repeat(1, 4)
    narrow = torch.tensor([[0.01, 0.0]]).repeat(1, 4)
    scores = torch.cat([wide, narrow])
    now = replace(sight(), evaluation=Evaluation(tuple(rewards), PROMPTS, scores))
    for combine, flat in (("standardized", 1.0), ("raw_sum", 0.0)):
        recipe = Recipe(rewards=rewards, algorithm=Neighbor(combine=combine))
        figures = Watch(recipe, Rewards(rewards), now).figures(now)
        assert figures["watch/flat_groups"] == flat, "equal weights of opposite order cancel once standardised"


def test_what_is_not_evaluated_is_neither_trained_nor_watched_here():
    """Such as win rates among a prompt's pictures: only "watched" and "rare" have scores."""
    rewards = Rewards(REWARDS)
    rewards.evaluated = ("watched", "rare")
    fallen = replace(sight(), evaluation=Evaluation(rewards.evaluated, PROMPTS, torch.cat([STEADY - 0.1, STEADY])))
    base = replace(sight(), evaluation=Evaluation(rewards.evaluated, PROMPTS, STEADY.repeat(2, 1)))
    found = Watch(Recipe(rewards=REWARDS), rewards, base)
    assert [*found.warnings(fallen)] == []
    figures = found.figures(fallen)
    assert figures["validation/watched"] == pytest.approx(0.175)
    assert not {"validation/trained", "watch/flatness", "watch/flat_groups"} & figures.keys()
    assert found._score(fallen) == -math.inf, "no validation is the best"


# --- what is seen in pictures


def test_a_sight_is_what_artifacts_measure(tiny_dev, load_flux, scorers, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(scorers)
    rewards = Rewards({"brightness": Reward(path="tiny_scorers:brightness")})
    flux, prompts = load_flux(tiny_dev), [Prompt("a dog"), Prompt("a cat")]
    recipe = Recipe(
        sampling=flux.sampling,
        rewards={"brightness": Reward(path="tiny_scorers:brightness")},
        evaluation=EvaluationSettings(num_images_per_prompt=2, batch=3),
    )
    begun = Watch.begin(tmp_path / "watch.json", flux, recipe, rewards, prompts)
    images = pictures(flux, recipe, ["a dog", "a dog", "a cat", "a cat"], range(4))
    base = begun.base
    torch.testing.assert_close(base.colour_NC, artifacts.colour_balance(images), rtol=0, atol=0.05)
    expected = artifacts.diversity(artifacts.pixel_embedding(images).view(2, 2, -1))
    torch.testing.assert_close(base.diversity_P, expected, rtol=0, atol=0.05)
    assert base.grid_P.isnan().all(), "too small to show a grid"
    assert not math.isnan(expected.sum())

    # Read back, not made again; of other prompts, made again.
    monkeypatch.setattr("ngrpo_train.run.hacking.evaluate", _never)
    again = Watch.begin(tmp_path / "watch.json", flux, recipe, rewards, prompts)
    assert torch.equal(again.base.evaluation.scores_RN, base.evaluation.scores_RN)
    assert torch.equal(again.base.colour_NC, base.colour_NC)
    with pytest.raises(AssertionError, match="evaluated again"):
        Watch.begin(tmp_path / "watch.json", flux, recipe, rewards, [prompts[0], Prompt("a bird")])


def _never(*_: object) -> Evaluation:
    raise AssertionError("evaluated again")


class _Embedder(ModelScorer):
    def encode(self, prompts):
        return (torch.zeros(len(prompts)),)

    def score(self, pixels: Tensor, *encoded: Tensor) -> Tensor:
        return pixels.mean((1, 2, 3))

    def embed_images(self, pixels: Tensor) -> Tensor:
        return torch.stack([pixels.mean((1, 2, 3)), torch.ones(len(pixels))], 1)


def test_a_scorers_embedding_measures_diversity(tiny_dev, load_flux, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "ngrpo_train.rewards.find_scorer", lambda name, reward, device: _Embedder(reward, device).ready()
    )
    recipe = Recipe(rewards={"x": Reward(batch=3)}, evaluation=EvaluationSettings(num_images_per_prompt=2, batch=4))
    flux, rewards = load_flux(tiny_dev), Rewards(recipe.rewards)
    base = Watch.begin(tmp_path / "watch.json", flux, recipe, rewards, [Prompt("a dog"), Prompt("a cat")]).base
    brightness = base.evaluation.scores_RN[0]
    expected = (brightness[::2] - brightness[1::2]).abs()
    torch.testing.assert_close(base.diversity_P, expected, rtol=0, atol=1e-5)
    assert expected.min() > 1e-4


class _OneVideoEach:
    """In place of a model and its rewards: the watch's observer gets these samples."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, samples: Tensor) -> None:
        monkeypatch.setattr("ngrpo_train.run.hacking.evaluate", self.evaluate)
        self.samples = samples

    def evaluate(self, model, recipe, rewards, prompts, observe) -> Evaluation:
        count = len(self.samples)
        return Evaluation(("trained",), tuple(prompts), torch.zeros(1, count), observed_NE=observe(self.samples))

    def sight(self, path: Path) -> Sight:
        recipe = Recipe(rewards={"trained": REWARDS["trained"]})
        return Watch.begin(path, None, recipe, Rewards(recipe.rewards), [Prompt("a"), Prompt("b")]).base


def test_a_video_is_watched_by_four_of_its_frames(monkeypatch, tmp_path):
    """Frames 1, 3, 5 and 7 of eight: grid and colours are means, and a distance is the root of the mean square."""
    videos = torch.randint(0, 256, (4, 8, 3, 64, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    videos = videos // torch.tensor([1, 2, 3, 4])[:, None, None, None, None].byte()
    seen = _OneVideoEach(monkeypatch, videos).sight(tmp_path / "watch.json")
    frames = [videos[:, place] for place in (1, 3, 5, 7)]
    grid = sum(artifacts.grid_strength(frame) for frame in frames) / 4
    torch.testing.assert_close(seen.grid_P, grid.view(2, 2).mean(1))
    torch.testing.assert_close(seen.colour_NC, sum(artifacts.colour_balance(frame) for frame in frames) / 4)
    squares = [artifacts.diversity(artifacts.pixel_embedding(frame).view(2, 2, -1)) ** 2 for frame in frames]
    torch.testing.assert_close(seen.diversity_P, (sum(squares) / 4).sqrt())


def test_a_video_that_stands_still_is_watched_as_its_picture(monkeypatch, tmp_path):
    pictures = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    still = _OneVideoEach(monkeypatch, pictures[:, None].expand(-1, 9, -1, -1, -1)).sight(tmp_path / "still.json")
    alone = _OneVideoEach(monkeypatch, pictures).sight(tmp_path / "alone.json")
    for name in ("grid_P", "colour_NC", "diversity_P"):
        torch.testing.assert_close(getattr(still, name), getattr(alone, name))


def test_samples_that_are_no_pictures_have_no_measures(monkeypatch, tmp_path):
    seen = _OneVideoEach(monkeypatch, torch.zeros(4, 2, 50)).sight(tmp_path / "watch.json")
    assert all(measure.isnan().all() for measure in (seen.grid_P, seen.colour_NC, seen.diversity_P))
    recipe = Recipe(rewards={"trained": REWARDS["trained"]})
    watched = Watch(recipe, Rewards(recipe.rewards), seen)
    assert watched.figures(seen) == {"validation/trained": 0.0}
    assert [*watched.warnings(seen)] == []


def test_observing_changes_no_score(tiny_dev, load_flux, scorers, monkeypatch):
    monkeypatch.syspath_prepend(scorers)
    rewards = Rewards({name: Reward(path=f"tiny_scorers:{name}") for name in ("brightness", "redness")})
    recipe, flux = Recipe(evaluation=EvaluationSettings(batch=2)), load_flux(tiny_dev)
    plain = evaluate(flux, recipe, rewards, PROMPTS)
    seen = evaluate(flux, recipe, rewards, PROMPTS, lambda images: images.float().mean((2, 3)))
    assert torch.equal(plain.scores_RN, seen.scores_RN)
    torch.testing.assert_close(seen.observed_NE.mean(1) / 255, seen.scores_RN[0], rtol=0, atol=1e-5)


# --- in a run


def test_a_run_watches_and_remembers(ngrpo, tiny_recipe):
    flags = ["--evaluation.validation=prompts.txt", "--evaluation.every=1", "--evaluation.num-images-per-prompt=2"]
    flags += ["--rewards.redness.watch-only=true", "--checkpoint.every=1"]
    code, _, err = ngrpo("train", tiny_recipe, *flags)
    assert code == 0, err
    run = Path("runs/tiny")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    watched = [row for row in rows if "watch/diversity" in row]
    assert [row["step"] for row in watched] == [0, 1, 2]
    assert all("validation/redness" in row for row in watched)
    iterations = [row for row in rows if "reward/mean" in row]
    assert len(iterations) == 2
    assert not any("reward/redness" in row for row in iterations), "scored at evaluations only"
    assert watched[0]["watch/colour_shift"] == 0 < watched[1]["watch/colour_shift"]

    base = (run / "watch.json").read_bytes()
    code, _, err = ngrpo("train", tiny_recipe, *flags, "--train.steps=3", "--resume=latest")
    assert code == 0, err
    assert (run / "watch.json").read_bytes() == base, "the resumed run did not take its own weights for the base's"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "watch/diversity" in row] == [0, 1, 2, 3]


def test_a_symptom_is_told_once(monkeypatch):
    watched = watch()
    monkeypatch.setattr("ngrpo_train.run.hacking.evaluate", lambda *_: None)
    monkeypatch.setattr(Sight, "of", lambda _: sight(a=20.0))
    assert len(watched.look(None).warnings) == 1
    assert watched.look(None).warnings == []


def test_curves_have_a_panel_for_each_figure(tmp_path):
    history = [
        {"step": 0, "watch/grid": 1.0, "validation/a": 1.0},
        {"step": 5, "watch/grid": 1.1, "validation/a": 2.0, "watch/late": 3.0},
    ]
    panels = chart(history, ["a"]).axes
    assert [panel.get_title() for panel in panels] == ["validation/a (trained on)", "watch/grid", "watch/late"]
    points = [[list(axis) for axis in panel.lines[0].get_data()] for panel in panels]
    assert points == [[[0, 5], [1.0, 2.0]], [[0, 5], [1.0, 1.1]], [[5], [3.0]]]
    draw(history, ["a"], tmp_path / "watch.png")
    assert [path.name for path in tmp_path.iterdir()] == ["watch.png"]
    assert Image.open(tmp_path / "watch.png").size == (1320, 264)
