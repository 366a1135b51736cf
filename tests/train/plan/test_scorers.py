"""What a plan says of scorers, against their real classes on "meta", published figures, and sums worked out by hand."""

import tomllib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Mask2FormerConfig

from benchmarks import train_scorers
from ngrpo_train.commands.train import TrainCommand
from ngrpo_train.models.sizes import KNOWN
from ngrpo_train.parallel.layout import Layout
from ngrpo_train.plan import explain_out_of_memory, iteration_flops, make_plan, plan_command, remedies, speedups
from ngrpo_train.plan.activations import decode_pass
from ngrpo_train.plan.instruments import measuring
from ngrpo_train.plan.machines import GIB, MACHINES
from ngrpo_train.plan.memory import Memory, iteration_memory
from ngrpo_train.plan.rates import FLOAT32_SLOWDOWN
from ngrpo_train.plan.remedies import with_settings
from ngrpo_train.plan.scorers import Scoring, of_unknown_cost, scorer_size, scorer_sizes
from ngrpo_train.plan.traffic import iteration_traffic
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.parsing import as_toml, find_recipe, parse, read_recipe, resolve
from ngrpo_train.recipe.rewards import ClipIqa, Geneval
from ngrpo_train.recipe.sections import Recipe, Reward, Sampling
from ngrpo_train.rewards import shipped
from ngrpo_train.rewards.mask2former import Mask2Former

DEV, META = KNOWN["flux-dev"], torch.device("meta")
H200 = MACHINES["h200-141"]
VIT_H, BLIP, VIT_L_VISION = 986_109_441, 446_206_689, 303_966_208  # parameters
VIT_H_PICTURE, VIT_H_PROMPT = 334.59e9, 47.09e9  # operations, as open_clip publishes them
MODELS = [
    ("hpsv2_1", Reward(dtype="bfloat16")),
    ("pickscore", Reward()),
    ("image_reward", Reward()),
    ("image_reward", Reward(dtype="bfloat16")),
    ("aesthetic", Reward()),
    ("clip", Reward()),
    ("clip", Reward(path="openai/clip-vit-large-patch14")),
    ("clip_iqa", ClipIqa()),
    ("hpsv3", Reward(dtype="bfloat16")),
]


def three(**settings: Any) -> dict[str, Reward]:
    return {name: Reward(**settings) for name in ("hpsv2_1", "pickscore", "image_reward")}


def recipe(rewards: dict[str, Reward], **settings: Any) -> Recipe:
    """The paper's 8 steps for one prompt per process, at what needs the least memory."""
    named = {field.replace("__", "."): value for field, value in settings.items()}
    least = {"train.gradient_accumulation_steps": 1, "parallel.keep_gathered": "never"}
    least |= {"parallel.reduce_gradients": "batch"}
    packaged = resolve(read_recipe(find_recipe("flux_dpmpp8")), name="flux_dpmpp8")
    return replace(with_settings(packaged, least | named), rewards=rewards)


def memory(asked: Recipe, world_size: int = 1) -> Memory:
    return iteration_memory(asked, DEV, Layout.of(asked.model, asked.parallel, world_size, 8))


# -- One scorer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, vision, text, picture, prompt",
    [
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 632.08, 354.03, 334.59, 47.09),
        ("openai/clip-vit-large-patch14", 303.97, 123.65, 162.03, 13.30),
        ("openai/clip-vit-large-patch14-336", 304.29, 123.65, 381.92, 13.30),
    ],
)
def test_towers_are_as_open_clip_publishes_them(
    path: str, vision: float, text: float, picture: float, prompt: float
) -> None:
    """Parameters in millions and GFLOP, from its docs/model_profile.csv."""
    size = scorer_size("clip", Reward(path=path))
    assert size is not None
    assert (size.vision.parameters / 1e6, size.text.parameters / 1e6) == pytest.approx((vision, text), abs=0.006)
    assert (size.vision.flops / 1e9, size.text.flops / 1e9) == pytest.approx((picture, prompt), rel=2e-3)


@pytest.mark.parametrize("name, reward", MODELS, ids=lambda x: x if isinstance(x, str) else f"{x.path}-{x.dtype}")
def test_scorers_are_as_large_as_their_classes(name: str, reward: Reward, monkeypatch: pytest.MonkeyPatch) -> None:
    # It looks into masks, which on "meta" hold nothing; that none can be left out is true of padded prompts.
    monkeypatch.setattr("transformers.masking_utils._ignore_bidirectional_mask_sdpa", lambda *_, **__: False)
    scorer, size = train_scorers.random_scorer(name, reward, META), scorer_size(name, reward)
    assert size is not None
    assert sum(parameter.numel() for parameter in scorer.parameters()) == size.parameters
    images, prompts = torch.empty(4, 3, 720, 720, dtype=torch.uint8, device=META), ["a", "a", "b", "b"]
    with FlopCounterMode(display=False) as flops:
        scorer(images, prompts)
    assert size.flops(4, 2) == pytest.approx(flops.get_total_flops(), rel=1e-3)
    with measuring() as live:
        scorer(images, prompts)
    four_at_once = recipe({name: replace(reward, batch=4)})
    assert Scoring.of(four_at_once).activations == pytest.approx(live.peak(), rel=0.02)


def test_a_detector_is_as_large_as_its_class() -> None:
    size, clip = scorer_size("geneval", Geneval()), scorer_size("clip", Reward(path="openai/clip-vit-large-patch14"))
    assert size is not None
    assert clip is not None
    with META:
        network = Mask2Former(Mask2FormerConfig(num_labels=80)).eval().to(META)  # its defaults are the official sizes
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert size.parameters == parameters + clip.parameters
    with torch.no_grad(), measuring() as live, FlopCounterMode(display=False) as flops:
        network(torch.empty(4, 3, 800, 800, device=META))
    assert size.flops(4, 4) == pytest.approx(flops.get_total_flops() + 4 * clip.vision.flops, rel=1e-6)
    assert 4 * size.values == pytest.approx(live.peak() / 4, rel=0.02)  # float32


def test_every_scorer_that_ships_has_a_place() -> None:
    with_weights = {"aesthetic", "clip", "clip_iqa", "geneval", "hpsv2_1", "hpsv3", "image_reward", "pickscore"}
    assert of_unknown_cost({name: Reward() for name in shipped.NAMES}) == ["ocr"]  # which computes on the CPU
    assert scorer_sizes({name: Reward() for name in shipped.NAMES}).keys() == with_weights


def test_what_is_computed_elsewhere_costs_nothing_here() -> None:
    elsewhere = {
        "hpsv2_1": Reward(remote="http://host:80"),
        "unified": Reward(remote="http://host:80"),
        "qwen": Reward(remote="http://host:80", template="unified"),
    }
    assert memory(recipe(elsewhere)) == memory(recipe({}))
    assert iteration_flops(recipe(elsewhere), DEV) == iteration_flops(recipe({}), DEV)
    assert of_unknown_cost(elsewhere) == []


def test_what_nobody_can_know_is_named() -> None:
    rewards = {
        "mine": Reward(path="package.module:score"),
        "hpsv2_1": Reward(path="package.module:score"),
        "clip": Reward(path="somebody/another-clip"),
        "aesthetic": Reward(processor="somebody/another-clip"),
        "pickscore": Reward(path="/weights/pickscore"),
        "hps": Reward(),
        "geneval": Geneval(path="facebook/mask2former-swin-large-coco-instance"),
        "colours": Geneval(kind="geneval", processor="somebody/another-clip"),
    }
    assert of_unknown_cost(rewards) == ["mine", "hpsv2_1", "clip", "aesthetic", "hps", "geneval", "colours"]
    assert scorer_sizes(rewards).keys() == {"pickscore"}


def test_a_reward_under_another_name_costs_what_its_kind_costs() -> None:
    assert scorer_size("mine", Reward(kind="hpsv2_1")) == scorer_size("hpsv2_1", Reward())
    assert scorer_size("hpsv2_1", Reward(kind="shapes_judge")) == scorer_size("shapes_judge", Reward())
    assert of_unknown_cost({"mine": Reward(kind="no_such")}) == ["mine"]


def test_a_clip_is_known_by_its_directory() -> None:
    named = scorer_size("clip", Reward(path="/weights/clip-vit-large-patch14/"))
    assert named is not None
    assert named == scorer_size("clip", Reward(path="openai/clip-vit-large-patch14"))
    aesthetic = scorer_size("aesthetic", Reward(path="anybody/head"))
    assert aesthetic is not None
    assert aesthetic.vision == named.vision
    assert aesthetic.text.parameters == 0


# -- A recipe's --------------------------------------------------------------------------------------------------------


def test_every_process_holds_scorers_whole() -> None:
    for world_size in (1, 8):
        phases = memory(recipe(three()), world_size).phases
        assert {parts["scorers"] for parts in phases.values()} == {4 * (2 * VIT_H + BLIP)}
    short = three(dtype="bfloat16") | {"aesthetic": Reward(watch_only=True)}
    assert memory(recipe(short)).phases["update"]["scorers"] == 2 * (2 * VIT_H + BLIP) + 4 * VIT_L_VISION


def test_offloaded_scorers_visit_one_at_a_time() -> None:
    rewards = three(offload=True) | {
        "aesthetic": Reward(),
        "clip": Reward(offload=True, watch_only=True, path="openai/clip-vit-large-patch14"),
    }
    held, without = memory(recipe(rewards), 8), memory(recipe({}), 8)
    assert held.phases["update"]["scorers"] == held.phases["rollout"]["scorers"] == 4 * VIT_L_VISION
    assert held.phases["decode"]["scorers"] == 4 * (VIT_L_VISION + VIT_H)
    assert held.host - without.host == 8 * 4 * (2 * VIT_H + BLIP + 427_616_513)
    layout = Layout.of(recipe({}).model, recipe({}).parallel, 1, 8)
    moved = [iteration_traffic(recipe(each), DEV, layout).host_bytes for each in (rewards, {})]
    assert moved[0] - moved[1] == 2 * 4 * (2 * VIT_H + BLIP)  # there and back; the watch rests in an iteration


def test_pictures_are_decoded_then_scored() -> None:
    bytes_of_pictures = 12 * 3 * 720 * 720
    decoding = decode_pass(DEV, Sampling(height=720, width=720)).peak + 2 * bytes_of_pictures
    large = {"clip": Reward(path="apple/DFN5B-CLIP-ViT-H-14-384")}  # 68 MB a picture, of which 12 at once
    for rewards, together in ((large, 12), ({"clip": replace(large["clip"], batch=1)}, 1)):
        asked = recipe(rewards, parallel__decode_batch=1)
        scoring = bytes_of_pictures + together * 67.74e6
        assert memory(asked).phases["decode"]["activations"] == pytest.approx(max(decoding, scoring), rel=0.01)
    assert decoding > 12 * 67.74e6  # a picture decoded takes more yet
    many = recipe(large, parallel__decode_batch=1, train__gradient_accumulation_steps=4)
    assert memory(many).phases["decode"]["activations"] == pytest.approx(decoding, rel=0.01)  # prompt by prompt
    many = recipe(  # 48 pictures, 32 at once
        large, parallel__decode_batch=1, train__gradient_accumulation_steps=4, parallel__stream="off"
    )
    scoring = 4 * bytes_of_pictures + 32 * 67.74e6
    assert memory(many).phases["decode"]["activations"] == pytest.approx(scoring, rel=0.01)


def test_operations_of_an_iteration() -> None:
    """A picture each, a prompt's text once for its 12 pictures; what only watches computes nothing."""
    one = iteration_flops(recipe({"hpsv2_1": Reward()}), DEV)
    assert one.model_stages["reward"] == pytest.approx(12 * VIT_H_PICTURE + VIT_H_PROMPT, rel=1e-3)
    watched = {"hpsv2_1": Reward(log_only=True), "pickscore": Reward(watch_only=True)}
    assert iteration_flops(recipe(watched), DEV) == one
    paper = iteration_flops(recipe(three(), train__gradient_accumulation_steps=32), DEV)
    per_prompt = paper.model_stages["reward"] / 32
    assert per_prompt / 1e12 == pytest.approx(9.8, abs=0.05)  # of which ImageReward's 1.7
    assert paper.model_stages["reward"] == paper.hardware_stages["reward"] == paper.float32
    without = iteration_flops(recipe({}, train__gradient_accumulation_steps=32), DEV)
    assert paper.model - without.model == paper.hardware - without.hardware == 32 * per_prompt
    assert "reward" not in without.model_stages
    filled = iteration_flops(recipe(three(), parallel__decode_batch=5), DEV)  # scorers are not compiled
    assert filled.hardware_stages["reward"] == per_prompt
    mixed = three() | {"hpsv2_1": Reward(dtype="bfloat16")}
    assert paper.float32 / 32 - iteration_flops(recipe(mixed), DEV).float32 == one.model_stages["reward"]


@pytest.mark.parametrize("frames, scored", [("last", 1), (3, 3), (4, 4), ("all", 9), (40, 9)])
def test_chosen_frames_of_a_video_are_scored(frames: str | int, scored: int) -> None:
    videos = recipe({"hpsv2_1": Reward(frames=frames)}, sampling__num_frames=9)  # type: ignore[arg-type]
    assert Scoring.of(videos).flops == pytest.approx(scored * 12 * VIT_H_PICTURE + VIT_H_PROMPT, rel=1e-3)


def test_float32_takes_longer() -> None:
    without, short, long = (make_plan(recipe(each), H200).seconds for each in ({}, three(dtype="bfloat16"), three()))
    assert without
    assert short
    assert long
    seconds = 9.83e12 / 790e12
    assert short.compute - without.compute == pytest.approx(seconds, rel=0.01)
    assert long.compute - without.compute == pytest.approx(FLOAT32_SLOWDOWN * seconds, rel=0.01)
    assert long.estimate > short.estimate > without.estimate


# -- What follows from it ----------------------------------------------------------------------------------------------


def test_remedies_know_scorers() -> None:
    rewards = three() | {"mine": Reward(path="a.b:c"), "clip": Reward(remote="http://host:80")}
    asked = recipe(rewards, model__tuning="lora", optimizer__learning_rate=3e-4, prompts__source="prompts.txt")
    plan = make_plan(asked, int(41 * GIB))
    assert not plan.fits
    singles = [each for each in remedies(plan) if all(name.startswith("rewards.") for name in each.settings)]
    found = {next(iter(remedy.settings.values())): remedy for remedy in singles}
    assert found.keys() == {True, "bfloat16"}
    assert found[True].flags == (
        "--rewards.hpsv2-1.offload True --rewards.pickscore.offload True --rewards.image-reward.offload True"
    )
    for remedy in found.values():
        changed = parse(TrainCommand, tomllib.loads(as_toml(asked)), remedy.flags.split(), prog="ngrpo train").recipe
        assert changed == with_settings(asked, remedy.settings) != asked
        check(changed)
        assert make_plan(changed, plan.gpu_bytes).memory.peak == remedy.plan.memory.peak < plan.memory.peak
    saved = plan.memory.total("update") - found["bfloat16"].plan.memory.total("update")
    assert saved == 2 * (2 * VIT_H + BLIP)
    official = {"hpsv2_1": Reward(backend="hpsv2")}  # refuses both settings
    for remedy in remedies(make_plan(replace(asked, rewards=official), 30 * GIB)):
        assert "rewards" not in remedy.flags


def test_scorers_in_16_bits_are_faster() -> None:
    plain = {"optimizer.name": "adamw_8bit", "parallel.master_dtype": "bfloat16"}
    plan = make_plan(with_settings(recipe(three()), plain), H200)
    (faster,) = (each for each in speedups(plan) if "rewards" in each.flags)
    assert set(faster.settings) == {f"rewards.{name}.dtype" for name in three()}
    assert 0.97 < faster.time < 0.99


def test_the_command_says_what_scorers_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    rewards = {"hpsv2_1": Reward(dtype="bfloat16"), "aesthetic": Reward(offload=True), "mine": Reward(path="a.b:c")}
    assert plan_command(recipe(rewards), "h100-80", 16) == 0
    shown = capsys.readouterr().out
    assert "scorers: hpsv2_1 986.11 M in bfloat16, aesthetic 303.97 M in float32 and host memory\n" in shown
    assert "Not counted, because their cost is not known: rewards.mine." in shown
    assert "products in float32 15 times as slow" in shown
    assert " scorers " in shown
    assert plan_command(recipe({}), "h100-80", 16) == 0
    shown = capsys.readouterr().out
    assert "names no rewards yet" in shown
    assert "their cost is not known" not in shown
    assert "15 times" not in shown


def test_out_of_memory_names_scorers() -> None:
    asked = recipe(three() | {"mine": Reward(path="a.b:c")})
    said = explain_out_of_memory(asked, DEV, 80 * GIB)
    assert f"{4 * (2 * VIT_H + BLIP) / GIB:.1f} GiB  scorers" in said
    assert "Not counted: rewards.mine, other programs on the GPU.\n" in said
    assert "Not counted: other programs on the GPU.\n" in explain_out_of_memory(recipe(three()), DEV, 80 * GIB)
