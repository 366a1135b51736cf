"""What every family of flow models must do, over tiny random models in the family's own classes and layout.

The letters are those of the table in docs/models.md, which `python -m benchmarks.models_page` writes from these tests.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel.blocks import graphs_compiled

from ...stock import draw
from .family_case import SIGMAS, Cases, families, make_cases, solve


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return make_cases(tmp_path_factory.mktemp("families"))


# --- a: pictures are the stock pipeline's


@families
def test_velocities_are_the_pipelines_own_to_the_bit(cases: Cases, family: str) -> None:
    case = cases(family)
    for seed, prompt in enumerate(case.prompts):
        noise, text = case.noise(1, seed), case.model.encode([prompt])
        theirs = draw(case.stock, prompt.text, noise, SIGMAS, case.call(prompt))
        for sigma, (state, velocity) in zip(SIGMAS, case.stock.scheduler.seen, strict=False):
            assert torch.equal(case.model.sampling_velocity(state.float(), torch.tensor([sigma]), text), velocity)
        ours = case.model.decode(solve(case.model, noise, prompt))[0]
        assert (ours.int() - theirs.int()).abs().max() <= 1  # our Euler step is rounded once, diffusers' twice
        assert ours.float().std() > 1, "a picture"


@families
def test_dpm_solver_draws_what_diffusers_draws(cases: Cases, family: str) -> None:
    case = cases(family)
    prompt, noise = case.prompts[0], case.noise(1)
    ours = case.model.decode(solve(case.model, noise, prompt, "dpmpp_2m"))[0]
    theirs = draw(case.stock, prompt.text, noise, SIGMAS, case.call(prompt), "dpmpp_2m")
    assert (ours.int() - theirs.int()).abs().max() <= 2  # its coefficients are rounded in another order


@families
def test_without_guidance_too(cases: Cases, family: str) -> None:
    case = cases(family)
    prompt, noise = case.prompts[0], case.noise(1)
    sampling = replace(case.sampling, guidance_scale=0.0, negative_prompt="")
    unguided = case.load(sampling)
    call = {name: value for name, value in case.call(prompt).items() if name != "negative_prompt"}
    theirs = draw(case.stock, prompt.text, noise, SIGMAS, call | {case.family.guidance: 0.0})
    ours = unguided.decode(solve(unguided, noise, prompt))[0]
    assert (ours.int() - theirs.int()).abs().max() <= 1
    if family != "flux2_klein_distilled":  # for which guidance is nothing
        assert not torch.equal(ours, case.model.decode(solve(case.model, noise, prompt))[0]), "guidance matters"


# --- b: the same velocity in any batch, in rollouts and in updates


@families
def test_a_batch_is_its_rows_and_an_update_is_the_rollout(cases: Cases, family: str) -> None:
    case = cases(family)
    model, of_row = case.model, [0, 1, 1, 0]
    x, sigma = case.noise(4), torch.tensor([0.9, 0.9, 0.5, 0.2])
    text = model.encode(case.prompts)
    together = model.sampling_velocity(x, sigma, text.rows(torch.tensor(of_row)))
    assert torch.equal(model.velocity(x, sigma, text.rows(torch.tensor(of_row))), together), "the ratio is 1"
    for number, row in enumerate(of_row):
        alone = model.sampling_velocity(x[number, None], sigma[number, None], model.encode([case.prompts[row]]))
        torch.testing.assert_close(alone[0], together[number], rtol=1e-4, atol=1e-4 * float(together.abs().max()))
    other = model.sampling_velocity(x, sigma, text.rows(torch.tensor([1, 0, 0, 1])))
    assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(other, together, strict=True)), "text matters"


# --- c: gradients


@families
def test_gradients_are_the_velocitys_derivatives(cases: Cases, family: str) -> None:
    """Against central differences in float64, along one random direction of all weights, and one of the states."""
    case = cases(family)
    model = case.load()
    in_float64(model)
    text, x = model.encode(case.prompts), case.noise(2).double()
    sigma, draws = torch.tensor([0.75, 0.75]), torch.Generator().manual_seed(1)
    weights = list(model.trainable.values())
    along = [torch.randn(w.shape, generator=draws, dtype=w.dtype) * w.detach().abs().mean() for w in weights]
    along_x = torch.randn(x.shape, generator=draws, dtype=x.dtype)
    probe = torch.randn(x.shape, generator=draws, dtype=x.dtype)

    def value(x: Tensor) -> Tensor:
        return (model.velocity(x, sigma, text).double() * probe).mean()

    x.requires_grad_()
    value(x).backward()
    assert x.grad is not None
    step = 1e-3  # some of a family's code computes in float32 whatever it is given
    expected = sum(float((w.grad * d).sum()) for w, d in zip(weights, along, strict=True) if w.grad is not None)
    with torch.no_grad():
        ends = []
        for sign in (1, -2, 1):  # forth, back through the middle, and home
            for w, d in zip(weights, along, strict=True):
                w.add_(d, alpha=sign * step)
            ends.append(float(value(x)))
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=5e-3)
        moved = (float(value(x + step * along_x)) - float(value(x - step * along_x))) / (2 * step)
        assert moved == pytest.approx(float((x.grad * along_x).sum()), rel=5e-3)


def in_float64(model: FlowModel) -> None:
    """Compute in float64, as far as the family's own code does."""
    model.transformer.double()
    adapter: Any = model.adapter
    adapter._compute_dtype = torch.float64
    for frozen in (part for part in vars(adapter).values() if isinstance(part, DiffusionPipeline)):
        for part in frozen.components.values():
            if isinstance(part, torch.nn.Module):
                part.double()
    if hasattr(adapter, "driven"):
        adapter.driven.dtype = torch.float64
        for seen in adapter.driven._seen.values():
            seen.dtype = torch.float64
    elif hasattr(adapter.text, "dtype"):
        adapter.text.dtype = torch.float64


def test_the_transformer_of_a_noise_level_at_the_boundary_is_the_pipelines(cases: Cases) -> None:
    """0.9 in float32 is below 0.9, and its timestep is 900, at the boundary of 0.9: two processes must agree on it."""
    case = cases("wan22_i2v_a14b")
    boundary, asked = case.stock.config.boundary_ratio, []
    sigma = float(torch.tensor(boundary))
    for place in case.model.transformer.values():
        place.register_forward_pre_hook(lambda module, _: asked.append(module))
    case.model.sampling_velocity(case.noise(1), torch.tensor([sigma]), case.model.encode(case.prompts[:1]))
    first = asked[0] is case.model.transformer["transformer"]
    assert case.model.adapter.driven.is_early(sigma) == first  # type: ignore[attr-defined]


@families
def test_candidates_of_a_prompt_go_together(cases: Cases, family: str) -> None:
    """Several states of one prompt at one noise level, as in every rollout, and their pictures."""
    model, prompt = cases(family).model, cases(family).prompts[0]
    x, text = cases(family).noise(3), cases(family).model.encode([prompt]).rows(torch.zeros(3, dtype=torch.int64))
    together = model.sampling_velocity(x, torch.full((3,), 0.75), text)
    for number in range(3):
        alone = model.sampling_velocity(x[number, None], torch.tensor([0.75]), model.encode([prompt]))
        torch.testing.assert_close(alone[0], together[number], rtol=1e-4, atol=1e-4 * float(together.abs().max()))
    pictures = model.decode(x)
    assert all((model.decode(x[n, None])[0].int() - pictures[n].int()).abs().max() <= 1 for n in range(3))


# --- blocks compile


@families
def test_blocks_compile_whole(cases: Cases, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is one graph, recomputed in backward; the backend runs it as it is."""
    torch._dynamo.reset()  # families share blocks, and what is compiled
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    case = cases(family)
    compiled = case.load(compile="on", gradient_checkpointing="full")
    x, sigma, one = case.noise(2), torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64)
    text = compiled.encode(case.prompts[:1]).rows(one)
    before = graphs_compiled()
    velocity = compiled.velocity(x, sigma, text)
    velocity.square().mean().backward()
    assert graphs_compiled() > before
    torch.testing.assert_close(velocity, case.model.velocity(x, sigma, text))
