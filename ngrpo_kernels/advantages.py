"""Group-standardised, quasi-norm advantages (Eqs. 3, 11)."""
# P prompts, G candidates, R rewards.

from collections.abc import Sequence

from torch import Tensor

from ngrpo_kernels._inputs import check_p, check_rewards
from ngrpo_kernels._registry import backend_ops, pick


def quasi_norm_advantages(
    rewards: Tensor,
    p: float = 0.8,
    weights: Sequence[float] | Tensor | None = None,
    min_reward_std: float | Sequence[float] | Tensor = 0.0,
    *,
    candidate_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Standardise each reward in its group, sum them weighted, and divide by the group's L_p quasi-norm (Eqs. 3, 11).

    Sign and order within a group are kept, and no constant is added to a denominator, so the result does not change
    when a reward is shifted or scaled. Eq. 11 makes the advantages of a group small if they are evenly spread, but not
    because its rewards are close to each other: `min_reward_std` does that. p = 2 gives Eq. 3 divided by sqrt(G - 1).
    The standard deviation in Eq. 3 is the sample's (`torch.std`); paper and peers do not say which one they take, and
    the quasi-norm cancels the difference.

    Args:
        rewards: [P, G], [R, P, G] for several rewards, or [G]; bfloat16, float16, float32 or float64.
        p: exponent of the quasi-norm, in (0, 2].
        weights: one per reward; equal by default. Their common scale cancels.
        min_reward_std: a reward whose standard deviation in a group is below this, in the reward's own units, adds
            nothing there. One number, or one per reward.
        candidate_mask: [P, G] bool. A candidate with False takes no part in mean, standard deviation and quasi-norm,
            its reward is ignored and its advantage is 0. Fewer than two valid candidates give zeros.
        backend: "auto", or a name from `available_backends()`.

    Returns:
        [P, G] (or [G]) in float32; in float64 for float64 rewards. No gradient.
        Exactly zero where a reward is flat: its maximum equals its minimum, or its standard deviation is at most
        8 eps max|r|, the rounding of the computation; also where weighted rewards cancel to rounding.
        A NaN or infinite reward makes its group NaN.

    Raises:
        ValueError: p out of range, G < 2, shapes, dtypes or devices that do not go together.
    """
    check_p(p)
    rewards_RPG, weights_R11, min_std_R11, mask_PG = check_rewards(rewards, weights, min_reward_std, candidate_mask)
    ops = backend_ops(pick(backend, rewards.device.type))
    advantages = ops.quasi_norm_advantages(rewards_RPG, p, weights_R11, min_std_R11, mask_PG)
    return advantages.squeeze(0) if rewards.ndim == 1 else advantages
