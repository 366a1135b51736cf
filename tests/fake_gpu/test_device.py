"""The fake device itself."""

import subprocess
import sys

from .cases import NEEDS_A_PLACE, ROOT

pytestmark = NEEDS_A_PLACE


def test_it_notices_waits_other_devices_and_memory() -> None:
    """In a process of its own: it stands in for CUDA from torch's import on."""
    subprocess.run([sys.executable, "-m", "tests.fake_gpu.guard"], check=True, cwd=ROOT)
    subprocess.run([sys.executable, "-m", "tests.fake_gpu", "selftest"], check=True, cwd=ROOT)
