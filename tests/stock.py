"""Stock diffusers pipelines that draw from given noise by given sigmas: the truth for what ours draw."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor


class _Euler(FlowMatchEulerDiscreteScheduler):
    """diffusers' own Euler steps, along sigmas that are set on the class below it."""

    given: Sequence[float]
    seen: list[tuple[Tensor, Tensor]]
    """The state and the velocity of each step."""

    def set_timesteps(self, *_: Any, sigmas: Any = None, mu: Any = None, timesteps: Any = None, **__: Any) -> None:
        self.sigmas = torch.tensor(self.given)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self.num_inference_steps = len(self.timesteps)
        self._step_index = self._begin_index = None
        self.seen = []

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *arguments: Any, **named: Any) -> Any:
        self.seen.append((sample, model_output))
        return super().step(model_output, timestep, sample, *arguments, **named)


class _DPM(DPMSolverMultistepScheduler):
    """diffusers' own DPM-Solver++(2M) steps for flows, along given sigmas."""

    given: Sequence[float]

    def set_timesteps(self, *_: Any, sigmas: Any = None, mu: Any = None, timesteps: Any = None, **__: Any) -> None:
        self.sigmas = torch.tensor(self.given)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self.num_inference_steps = len(self.timesteps)
        self.model_outputs = [None] * self.config.solver_order
        self.lower_order_nums = 0
        self._step_index = self._begin_index = None

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        return noise


def stepping(solver: str, sigmas: Sequence[float]) -> Any:
    """A scheduler of diffusers that makes the steps of our `solver` down these sigmas."""
    if solver == "euler":
        euler: Any = type("Euler", (_Euler,), {"given": sigmas})
        return euler()
    dpm: Any = type("DPM", (_DPM,), {"given": sigmas})
    return dpm(
        prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero", lower_order_final=False
    )


@contextmanager
def from_noise(pipeline: Any, noise: Tensor) -> Iterator[None]:
    """Let a pipeline begin with this noise, in its own layout of latents."""
    prepare: Callable[..., Any] = pipeline.prepare_latents

    def prepared(*arguments: Any, **named: Any) -> Any:
        made = prepare(*arguments, **named)
        first = made[0] if isinstance(made, tuple) else made
        assert first.shape == noise.shape
        start = noise.clone().to(first.dtype)
        return (start, *made[1:]) if isinstance(made, tuple) else start

    pipeline.prepare_latents = prepared
    try:
        yield
    finally:
        del pipeline.prepare_latents


def draw(
    pipeline: Any, text: str, noise: Tensor, sigmas: Sequence[float], call: Mapping[str, Any], solver: str = "euler"
) -> Tensor:
    """What the stock pipeline draws for a text from `noise` [1, ...]: uint8, a picture [3, H, W] or a video."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = stepping(solver, sigmas)
    steps = len(sigmas) - 1
    with from_noise(pipeline, noise):
        drawn = pipeline(
            prompt=text, num_inference_steps=steps, output_type="pt", return_dict=False, generator=_generator(), **call
        )[0]
    picture: Tensor = drawn[0]
    return (picture.float().clamp(0, 1) * 255).round().to(torch.uint8)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)  # as ours, for VAEs that draw what they encode
