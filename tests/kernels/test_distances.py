"""Squared distances and their gradients."""

import pytest
import torch

from ngrpo_kernels import pairwise_sqdist

pytestmark = pytest.mark.usefixtures("auto_backend")

SHAPES = [(1, 1, 2, 16), (2, 1, 12, 1000), (1, 4, 12, 4099), (3, 5, 3, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    P, B, G, D = shape
    random = torch.Generator().manual_seed(0)
    anchors = torch.randn(P, B, D, generator=random).to(dtype).requires_grad_()
    candidates = torch.randn(P, G, D, generator=random).to(dtype).requires_grad_()
    weights = torch.randn(P, B, G, generator=random, dtype=torch.float64)
    sqdist = pairwise_sqdist(anchors, candidates)
    assert sqdist.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    grads = torch.autograd.grad((sqdist * weights).sum(), (anchors, candidates))

    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (anchors, candidates)]
    exact = (exact_inputs[0][:, :, None] - exact_inputs[1][:, None]).square().sum(-1)
    exact_grads = torch.autograd.grad((exact * weights).sum(), exact_inputs)
    torch.testing.assert_close(sqdist.double(), exact, rtol=1e-6, atol=0)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        assert (grad.double() - exact_grad).abs().max() <= 2 * eps * exact_grad.abs().max()


def test_gradcheck() -> None:
    random = torch.Generator().manual_seed(0)
    anchors = torch.randn(2, 2, 3, generator=random, dtype=torch.float64, requires_grad=True)
    candidates = torch.randn(2, 3, 3, generator=random, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pairwise_sqdist, (anchors, candidates))


def test_near_latents_keep_their_digits() -> None:
    """Where expanding the square, as `torch.cdist` does, keeps none."""
    base = 100 * torch.randn(1, 30, 1000, generator=torch.Generator().manual_seed(0))
    near = base + 2.0**-10
    exact = (base.double() - near.double()).square().sum(-1)
    torch.testing.assert_close(pairwise_sqdist(base, near).diagonal(dim1=1, dim2=2).double(), exact, rtol=1e-6, atol=0)
    assert ((torch.cdist(base, near).square().diagonal(dim1=1, dim2=2) - exact).abs() > exact).any()


def test_without_prompts_and_with_latent_dimensions() -> None:
    random = torch.Generator().manual_seed(0)
    anchors, candidates = torch.randn(2, 24, generator=random), torch.randn(5, 24, generator=random)
    flat = pairwise_sqdist(anchors, candidates)
    assert flat.shape == (2, 5)
    shaped = pairwise_sqdist(anchors.view(1, 2, 4, 6), candidates.view(1, 5, 4, 6).mT.contiguous().mT)
    torch.testing.assert_close(shaped[0], flat)


def test_nan() -> None:
    anchors, candidates = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    anchors[0, 0, 0] = float("nan")
    assert pairwise_sqdist(anchors, candidates).isnan().tolist() == [[[True, True], [False, False]]]


@pytest.mark.parametrize(
    "anchors, candidates, message",
    [
        (torch.zeros(2, 3, 4), torch.zeros(1, 5, 4), r"\[2, 3, 4\] and candidates \[1, 5, 4\]"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 5, 6), r"\[2, 3, 4\] and candidates \[2, 5, 6\]"),
        (torch.zeros(3, 4), torch.zeros(2, 5, 4), r"\[B, D\] and \[G, D\]"),
        (torch.zeros(4), torch.zeros(4), r"\[B, D\] and \[G, D\]"),
        (torch.zeros(2, 3, 4).long(), torch.zeros(2, 5, 4), "anchors must be .* got int64"),
    ],
)
def test_errors(anchors: torch.Tensor, candidates: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairwise_sqdist(anchors, candidates)
