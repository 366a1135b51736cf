"""What tests of training compare with: gradients as an optimizer gets them, and pictures of stock diffusers."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ngrpo_train.models.model import FlowModel
from ngrpo_train.rewards import Scores


def advantages_of(algorithm: Any, prompts: int, generations: int, flat: Iterable[int] = ()) -> Tensor:
    """An algorithm's advantages of random rewards of a fixed seed; prompts in `flat` have equal rewards."""
    rewards = torch.rand(1, prompts, generations, generator=torch.Generator().manual_seed(5))
    rewards[:, list(flat)] = 0.5
    advantages: Tensor = algorithm.advantages(Scores(("reward",), ("reward",), (1.0,), rewards), step=0)
    return advantages


class Spy(torch.optim.SGD):
    """An optimizer that keeps the gradients of every step, by parameter name, and moves the weights by `lr`."""

    def __init__(self, model: FlowModel, lr: float = 0.0) -> None:
        super().__init__(model.trainable.values(), lr=lr, fused=True)
        self.names, self.seen = list(model.trainable), list[dict[str, Tensor]]()

    def step(self, closure: Any = None) -> Any:
        [group] = self.param_groups
        self.seen.append(dict(zip(self.names, (p.grad.clone() for p in group["params"]), strict=True)))
        return super().step(closure)

    def vectors(self) -> list[Tensor]:
        """The gradient of every step as one float64 vector."""
        return [as_vector(gradient) for gradient in self.seen]


def as_vector(gradient: dict[str, Tensor]) -> Tensor:
    """A gradient by parameter name as one float64 vector."""
    return torch.cat([each.double().flatten() for each in gradient.values()])


def assert_same_gradient(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative error of the whole gradient, as one vector."""
    assert ours.keys() == expected.keys()
    assert_same_vector(as_vector({name: ours[name] for name in expected}), as_vector(expected), tolerance)


def assert_same_vector(ours: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Relative error in the Euclidean norm."""
    assert expected.norm() > 0
    assert (ours - expected).norm() < tolerance * expected.norm()


def stock_pictures(pipeline: Any, prompts: Sequence[str], latents: Tensor, size: int) -> Tensor:
    """Pictures of diffusers' own pipeline, float [N, 3, H, W] in [0, 1], from packed `latents`; 4 steps, 16 tokens."""
    pipeline.set_progress_bar_config(disable=True)
    pictures: Tensor = pipeline(
        list(prompts),
        height=size,
        width=size,
        max_sequence_length=16,
        num_inference_steps=4,
        guidance_scale=3.5,
        latents=latents,
        output_type="pt",
    ).images
    return pictures
