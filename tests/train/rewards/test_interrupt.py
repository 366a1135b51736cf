"""Ctrl-C in a trainer whose rewards are computed elsewhere."""

import json
import signal
import sys
from pathlib import Path

import pytest

from ..runs import Run, environment, finish, script, start
from .servers import answer, hang, scripted, wait_for

HEALTH = answer(200, json.dumps({"rewards": [{"name": "redness"}], "max_body_bytes": 10**8}).encode())
MODELS = answer(200, json.dumps({"data": [{"id": "a judge"}]}).encode())
BUSY = answer(503, Retry_After=60)


@pytest.mark.parametrize("says", [hang, BUSY], ids=["waits for an answer", "pauses between attempts"])
def test_ctrl_c_ends_a_trainer_that_waits_for_servers(says: object, tmp_path: Path) -> None:
    """The servers never score, so that the trainer can end by giving up alone, which it does after 10 minutes."""
    with scripted(HEALTH, says) as rewards, scripted(MODELS, says) as judge:
        elsewhere = {"rewards.redness.path": "", "rewards.redness.remote": rewards.url, "rewards.redness.batch": "1"}
        elsewhere |= {"rewards.taste.template": "rate_1_to_10", "rewards.taste.path": "a judge"}
        elsewhere |= {"rewards.taste.remote": judge.url}
        with script(Run(tmp_path / "run", elsewhere)) as arguments:
            trainer = start([sys.executable, *arguments], environment())
            try:
                wait_for(lambda: len(rewards.received) > 1 and len(judge.received) > 1, 120)
                trainer.send_signal(signal.SIGINT)
                trainer.wait(120)
            finally:
                trainer.kill()
                output = finish(trainer)
    assert trainer.returncode == -signal.SIGINT, output
    assert "KeyboardInterrupt" in output
