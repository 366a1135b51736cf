"""The solvers against diffusers' schedulers, and against flows whose solution is known."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ngrpo_train.sampling.solvers import SOLVERS, Previous, dpmpp_2m_step, euler_step, flow_sigmas

SHIFT = 3.0


def solve(name: str, x: Tensor, velocity, sigmas) -> list[Tensor]:
    states, previous = [x], None
    for index in range(len(sigmas) - 1):
        x, previous = SOLVERS[name](x, velocity(x, float(sigmas[index])), sigmas, index, previous)
        states.append(x)
    return states


def curved_velocity(x: Tensor, sigma: float) -> Tensor:
    return torch.sin(2 * x) * (1 + sigma) + x.roll(1, -1) * sigma**2 - 0.3


def schedule(num_steps: int, from_noise: bool) -> Tensor:
    """`num_steps` steps to sigma = 0, from sigma = 1 or from below it."""
    return flow_sigmas(num_steps, SHIFT) if from_noise else flow_sigmas(num_steps + 2, SHIFT)[2:]


# --- the schedule


def test_schedule_is_the_one_of_design():
    expected = torch.tensor([1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0])
    sigmas = flow_sigmas(8, SHIFT)
    torch.testing.assert_close(sigmas, expected, rtol=0, atol=5e-5)
    assert sigmas.dtype == torch.float32
    assert sigmas.device.type == "cpu"


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 3.1, 7.3])
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_schedule_ends_are_exact_and_it_descends(num_steps, shift):
    sigmas = flow_sigmas(num_steps, shift)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert len(sigmas) == num_steps + 1
    assert (sigmas.diff() < 0).all()


def test_schedule_equals_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 9)[:-1].tolist())
    torch.testing.assert_close(flow_sigmas(8, SHIFT), scheduler.sigmas, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "num_steps, shift, field",
    [(0, 3.0, "num_inference_steps"), (8, 0.0, "shift"), (8, -1.0, "shift"), (8, math.nan, "shift")],
)
def test_schedule_refuses(num_steps, shift, field):
    with pytest.raises(ValueError, match=rf"sampling\.{field} .*{shift if field == 'shift' else num_steps}"):
        flow_sigmas(num_steps, shift)


# --- step by step against diffusers


def diffusers_scheduler(name: str, sigmas: Tensor):
    num_steps = len(sigmas) - 1
    if name == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    else:
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", algorithm_type="dpmsolver++", solver_order=2
        )
        scheduler.set_timesteps(num_steps)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)  # its timesteps are truncated to integers: never look a step up by them
    return scheduler


@pytest.mark.parametrize("from_noise", [True, False], ids=["sigma=1", "sigma<1"])
@pytest.mark.parametrize("num_steps", range(4, 26))  # diffusers changes its last steps below 15 for some settings
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_every_step_equals_diffusers(name, num_steps, from_noise):
    sigmas = schedule(num_steps, from_noise)
    scheduler = diffusers_scheduler(name, sigmas)
    x, previous = torch.randn(2, 64, generator=torch.Generator().manual_seed(num_steps)), None
    for index in range(num_steps):
        velocity = curved_velocity(x, float(sigmas[index]))
        ours, previous = SOLVERS[name](x, velocity, sigmas, index, previous)
        theirs = scheduler.step(velocity, scheduler.timesteps[index], x, return_dict=False)[0]
        # Both start each step from the same state, so only the roundings of one step separate them.
        scale = max(x.abs().max().item(), velocity.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * torch.finfo(torch.float32).eps * scale)
        x = theirs


def test_second_order_steps_really_differ_from_euler():
    """Guards the comparison above: were both sides of first order, it would pass and show nothing."""
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    for sigmas, second_order in ((schedule(8, True), range(2, 7)), (schedule(8, False), range(1, 7))):
        for index, (state, state_next) in enumerate(pairwise(solve("dpmpp_2m", x, curved_velocity, sigmas))):
            first_order, _ = euler_step(state, curved_velocity(state, float(sigmas[index])), sigmas, index)
            difference = (state_next - first_order).abs().max().item()
            assert difference > 1e-3 if index in second_order else difference == 0


# --- flows whose solution is known


MEAN, STD = 0.7, 1.5


def gaussian_velocity(x: Tensor, sigma: float) -> Tensor:
    """The marginal flow of data ~ N(MEAN, STD^2): E[noise - data | x], linear in x."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * STD**2) / variance * (x - (1 - sigma) * MEAN)


def gaussian_solution(noise: Tensor, sigma: float) -> Tensor:
    return (1 - sigma) * MEAN + math.sqrt((1 - sigma) ** 2 * STD**2 + sigma**2) * noise


def order_of_convergence(name: str, sigmas_of, error_scale) -> float:
    """Minus the slope of log(error / error_scale(N)) over log N."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    log_steps, log_errors = [], []
    for num_steps in (128, 256, 512, 1024, 2048):
        sigmas = sigmas_of(num_steps)
        solution = solve(name, gaussian_solution(noise, float(sigmas[0])), gaussian_velocity, sigmas)[-1]
        error = (solution - gaussian_solution(noise, float(sigmas[-1]))).abs().max().item()
        log_steps.append([math.log(num_steps), 1.0])
        log_errors.append([math.log(error / error_scale(num_steps))])
    fit = torch.linalg.lstsq(torch.tensor(log_steps).double(), torch.tensor(log_errors).double())
    return -fit.solution[0].item()


@pytest.mark.parametrize("name, order", [("euler", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence_away_from_the_ends(name, order):
    measured = order_of_convergence(name, lambda n: 0.05 + 0.9 * flow_sigmas(n, SHIFT).double(), lambda n: 1)
    assert measured == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name, order", [("euler", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence_from_noise_to_data(name, order):
    """Over the whole way the second order comes with a logarithm: at both ends lambda is infinite, its steps there do
    not shrink with N, and the k-th step from an end errs by dt^2/k, which sums to dt^2 log N."""
    log_factor = {"euler": lambda n: 1, "dpmpp_2m": math.log}[name]
    measured = order_of_convergence(name, lambda n: flow_sigmas(n, SHIFT), log_factor)
    assert measured == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
@pytest.mark.parametrize("name", SOLVERS)
def test_straight_flow_is_solved_exactly(name, num_steps):
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 3, 40, generator=generator, dtype=torch.float64)
    sigmas = flow_sigmas(num_steps, SHIFT)
    states = solve(name, noise, lambda x, sigma: noise - data, sigmas)
    for state, sigma in zip(states, sigmas.double(), strict=True):
        torch.testing.assert_close(state, (1 - sigma) * data + sigma * noise, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", SOLVERS)
def test_last_step_gives_the_predicted_data(name):
    x, velocity = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    sigmas = [0.8, 0.5, 0.0]
    x_next, _ = SOLVERS[name](x, velocity, sigmas, 1, Previous(torch.randn(5, 7), 0.8))
    assert torch.equal(x_next, torch.add(x, velocity, alpha=-0.5))


# --- the shape of the interface


def test_ddim_is_euler():
    assert SOLVERS["ddim"] is SOLVERS["euler"] is euler_step


@pytest.mark.parametrize("name", SOLVERS)
def test_batch_equals_singles(name):
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    sigmas = schedule(6, True)
    batched = solve(name, x, curved_velocity, sigmas)[-1]
    singles = [solve(name, x[i : i + 1], curved_velocity, sigmas)[-1] for i in range(3)]
    assert torch.equal(batched, torch.cat(singles))


@pytest.mark.parametrize("name", SOLVERS)
def test_inputs_are_left_alone(name):
    x, velocity, denoised = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    sigmas = schedule(6, False)
    inputs = (x, velocity, denoised, sigmas)
    before = [tensor.clone() for tensor in inputs]
    for index in range(6):
        SOLVERS[name](x, velocity, sigmas, index, Previous(denoised, 0.95))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


@pytest.mark.parametrize("name", SOLVERS)
def test_bf16_velocity_is_upcast_before_any_product(name):
    x, velocity, denoised = torch.randn(3, 5, 400, generator=torch.Generator().manual_seed(0))
    velocity, previous, sigmas = velocity.bfloat16(), Previous(denoised, 0.95), schedule(6, False)
    got, carry = SOLVERS[name](x, velocity, sigmas, 2, previous)
    want, want_carry = SOLVERS[name](x, velocity.float(), sigmas, 2, previous)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    if name == "dpmpp_2m":
        assert carry.denoised.dtype == torch.float32
        assert torch.equal(carry.denoised, want_carry.denoised)


@pytest.mark.parametrize("name", SOLVERS)
def test_sigmas_may_be_floats(name):
    x, sigmas = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), schedule(6, True)
    ours, listed = (solve(name, x, curved_velocity, given)[-1] for given in (sigmas, sigmas.tolist()))
    assert torch.equal(ours, listed)


@pytest.mark.parametrize("name", SOLVERS)
def test_gradient_reaches_the_velocity(name):
    x, velocity = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    previous, sigmas = Previous(torch.zeros_like(x), 0.95), schedule(6, False)
    velocity.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: SOLVERS[name](x, v, sigmas, 2, previous)[0], (velocity,))


def test_a_run_may_start_in_the_middle():
    """Without a previous step the two-step solver takes a first-order one, wherever it starts."""
    x, velocity = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    sigmas = schedule(6, True)
    x_next, carry = dpmpp_2m_step(x, velocity, sigmas, 3)
    assert torch.equal(x_next, euler_step(x, velocity, sigmas, 3)[0])
    assert carry.sigma == sigmas[3]
