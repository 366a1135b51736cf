"""The arithmetic on docs/theory.md about the paper's own tables. Values are those of arXiv 2511.16955, Tables 2, 3."""

import pytest
import torch

from ngrpo_kernels import quasi_norm_advantages

from .flows import DTYPE
from .page import check_table

# Table 3: NFE_old, G, B, K, seconds per iteration
DANCE, FLASH = (25, 12, 12, 14, 237.86), (8, 12, 12, 4, 129.36)
OURS_25, OURS_16, OURS_8 = (25, 12, 12, 4, 141.93), (16, 12, 4, 9, 105.85), (8, 12, 4, 4, 45.08)


def nfe(row: tuple[int, int, int, int, float]) -> float:
    """Trained evaluations per sample, B / G * K (Sec. 4.1)."""
    _, G, B, K, _ = row
    return B / G * K


def seconds_per_nfe(more: tuple[int, int, int, int, float], less: tuple[int, int, int, int, float]) -> float:
    """Seconds of a trained evaluation, from two rows with the same NFE_old, if the rest costs the same."""
    assert more[0] == less[0]
    return (more[-1] - less[-1]) / (nfe(more) - nfe(less))


def test_speed() -> None:
    per_nfe = seconds_per_nfe(DANCE, OURS_25)
    check_table(
        "speed",
        {
            "237.86 / 45.08: DanceGRPO to 8 steps of DPM++": [DANCE[-1] / OURS_8[-1]],
            "237.86 / 105.85: to 16 steps of DPM++": [DANCE[-1] / OURS_16[-1]],
            "237.86 / 141.93: to the same 25 steps of DDIM": [DANCE[-1] / OURS_25[-1]],
            "hours of 300 iterations of 45.08 s": [300 * OURS_8[-1] / 3600],
            "seconds per NFE_theta between the 25-step rows": [per_nfe],
            "seconds per NFE_theta between the 8-step rows": [seconds_per_nfe(FLASH, OURS_8)],
            "by the former, share of the update in DanceGRPO's 237.86 s": [nfe(DANCE) * per_nfe / DANCE[-1]],
            "by the former, share of the update in the 141.93 s": [nfe(OURS_25) * per_nfe / OURS_25[-1]],
        },
    )
    assert nfe(OURS_8) == pytest.approx(1.33, abs=0.005)


def test_a_flat_group_is_not_damped_to_near_zero() -> None:
    """Largest advantage after Eq. 11: groups half up and half down, with one outlier, and with close rewards."""
    halves = torch.tensor([1.0, -1.0], dtype=DTYPE).repeat(6)
    outlier = torch.eye(12, dtype=DTYPE)[0]
    groups = {
        "half at +1, half at -1": halves,
        "one stands out": outlier,
        "one stands out, by 1e-6": 5 + 1e-6 * outlier,
    }
    rows = {}
    for label, rewards in groups.items():
        rows[label] = [
            float(quasi_norm_advantages(rewards[None], p=p, backend="reference").abs().max()) for p in (2.0, 0.8)
        ]
    assert rows["half at +1, half at -1"] == pytest.approx([12**-0.5, 12**-1.25])
    assert rows["one stands out, by 1e-6"] == pytest.approx(rows["one stands out"], rel=1e-6)
    check_table("flat", rows)
