"""Training with rewards from a server in another process: the same rewards and the same parameters, to the last bit."""

from pathlib import Path

import torch

from ngrpo_train.recipe.parsing import read_recipe

from ..runs import HERE, Run, assert_same_run, observed
from .servers import process, ready

STEPS = {"train.steps": "2", "checkpoint.every": "2"}


def test_a_run_is_the_same_wherever_its_rewards_are_computed(tmp_path: Path) -> None:
    assert Run(tmp_path / "here", STEPS).make() == 0
    with process(str(HERE), "--rewards=runs:redness,shapes_verifier", "--port=0", "--device=cpu") as server:
        url = ready(server)
        elsewhere = {"rewards.redness.path": "", "rewards.redness.remote": url, "rewards.redness.batch": "3"}
        elsewhere |= {"rewards.shapes-verifier.remote": url}
        assert Run(tmp_path / "elsewhere", STEPS | elsewhere).make() == 0
    rewards = read_recipe(tmp_path / "elsewhere" / "recipe.toml")["rewards"]
    assert [name for name, reward in rewards.items() if reward["remote"]] == ["shapes_verifier", "redness"]
    here, there = observed(tmp_path / "here"), observed(tmp_path / "elsewhere")
    assert here["rewards"][:, -1].std(-1).min() > 0, "candidates differ in redness, which is trained on"
    assert torch.equal(here["rewards"], there["rewards"])
    assert torch.equal(here["advantages"], there["advantages"])
    assert_same_run(tmp_path / "elsewhere", tmp_path / "here", steps=2)
