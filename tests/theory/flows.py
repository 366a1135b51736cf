"""Flows with a velocity in closed form, a policy with parameters on top of one, and what the tests measure of them."""
# N solver steps, G candidates of a prompt, D latent elements, M modes of the data.

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ngrpo_train.sampling.solvers import Sigmas, euler_step, flow_sigmas

DTYPE = torch.float64


class MixtureFlow:
    """The exact flow of data drawn evenly from M normals `N(mean_m, diag(variance))`; one mode is Gaussian data."""

    def __init__(self, means_MD: Tensor, variance_D: Tensor) -> None:
        self.means_MD, self.variance_D = means_MD, variance_D

    def marginal_variance(self, sigma: float) -> Tensor:
        """Variance [D] of a mode at noise level sigma, of `(1 - sigma) * data + sigma * noise`."""
        return (1 - sigma) ** 2 * self.variance_D + sigma**2

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """`E[noise - data | x]` [..., D], for sigma > 0."""
        marginal_D = self.marginal_variance(sigma)
        offset_MD = x[..., None, :] - (1 - sigma) * self.means_MD
        modes_M = (-offset_MD.square() / marginal_D).sum(-1).div(2).softmax(-1)
        data_MD = self.means_MD + (1 - sigma) * self.variance_D / marginal_D * offset_MD
        return (x - (modes_M[..., None] * data_MD).sum(-2)) / sigma


class Policy(nn.Module):
    """A mixture's velocity, and added to it a small network: its parameters are theta."""

    def __init__(self, D: int, seed: int, hidden: int = 24) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        means_MD = torch.randn(4, D, generator=draw, dtype=DTYPE)
        self.flow = MixtureFlow(means_MD, 0.1 + 0.2 * torch.rand(D, generator=draw, dtype=DTYPE))
        self.inner = nn.Parameter(torch.randn(D + 1, hidden, generator=draw, dtype=DTYPE) / D**0.5)
        self.outer = nn.Parameter(torch.randn(hidden, D, generator=draw, dtype=DTYPE) * 0.2 / hidden**0.5)

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        return self.flow.velocity(x, sigma) + (with_sigma(x, sigma) @ self.inner).tanh() @ self.outer

    def gradient_by_group(self, x: Tensor, sigma: float, weight: Tensor) -> Tensor:
        """Gradient of `<v_theta(x), weight>` for each group of [S, members, D]: [S, parameters]."""
        with torch.no_grad():
            inputs = with_sigma(x, sigma)
            hidden = (inputs @ self.inner).tanh()
            inner = inputs.mT @ (weight @ self.outer.mT * (1 - hidden.square()))
            return torch.cat([inner.flatten(1), (hidden.mT @ weight).flatten(1)], 1)


def with_sigma(x: Tensor, sigma: float) -> Tensor:
    return torch.cat([x, torch.full_like(x[..., :1], sigma)], -1)


def schedule(num_inference_steps: int, shift: float = 3.0) -> list[float]:
    """The N + 1 sigmas of FLUX trainers, shift 3."""
    return flow_sigmas(num_inference_steps, shift).tolist()


def solve(model: MixtureFlow | Policy, noise: Tensor, sigmas: Sigmas) -> list[Tensor]:
    """The N + 1 states of an Euler solve, the noise first."""
    velocity = model.velocity if isinstance(model, MixtureFlow) else model
    states = [noise]
    for step in range(len(sigmas) - 1):
        states.append(euler_step(states[-1], velocity(states[-1], float(sigmas[step])), sigmas, step)[0])
    return states


def standardised(rewards_G: Tensor) -> Tensor:
    """Advantages of groups [..., G] (Eq. 3)."""
    return centred(rewards_G) / rewards_G.std(-1, keepdim=True)


def centred(rewards_G: Tensor) -> Tensor:
    """Rewards less their group's mean, and not divided by its standard deviation."""
    return rewards_G - rewards_G.mean(-1, keepdim=True)


def gradient(value: Tensor, policy: Policy) -> Tensor:
    """d value / d theta, as one vector."""
    return flat(torch.autograd.grad(value, list(policy.parameters())))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosine of the last dimension."""
    return (left * right).sum(-1) / (left.norm(dim=-1) * right.norm(dim=-1))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line through log y against log x."""
    log_x, log_y = (torch.tensor(values, dtype=DTYPE).log() for values in (x, y))
    centred = log_x - log_x.mean()
    return float((centred * log_y).sum() / centred.square().sum())
