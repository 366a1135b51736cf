"""What the random walks explore, against walks written out step by step on a tiny FLUX."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from ngrpo_train.algorithms import make_algorithm
from ngrpo_train.draws import draw_train_steps, stream
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.algorithms import Algorithm
from ngrpo_train.recipe.sections import Prompts, Recipe, Reward, Sampling

P, G, N, SHIFT = 2, 4, 8, 3.0
PROMPTS = [Prompt("a large red circle on a blue background", 0), Prompt("a dog", 1)]

# name -> (algorithm, its settings, iteration, its random steps, how many of them are trained)
CASES = {
    "flow": ("flow_grpo", {}, 0, range(7), 7),
    "flow, some steps": ("flow_grpo", {"num_train_steps": 2, "step_range": (0.0, 0.5)}, 3, range(7), 2),
    "dance": ("dance_grpo", {}, 0, range(7), 4),
    "mix": ("mix_grpo", {"window_size": 3}, 0, range(3), 3),
    "mix, moved": ("mix_grpo", {"window_size": 3}, 60, range(2, 5), 3),
    "flash": ("mix_grpo_flash", {"window_size": 2, "compression": 0.6}, 0, range(2), 2),
    "flash, moved": ("mix_grpo_flash", {"window_size": 2, "compression": 0.7}, 25, range(1, 3), 2),
}
each_case = pytest.mark.parametrize("case", CASES)


def algorithm_of(name, per_rank=P, **settings):
    recipe = Recipe(
        prompts=Prompts(per_rank=per_rank),
        sampling=Sampling(num_inference_steps=N, shift=SHIFT),
        algorithm=replace(Algorithm.of(name), num_generations=G, **{"step_range": (0.0, 1.0)} | settings),
        rewards={"shapes_verifier": Reward()},
    )
    return make_algorithm(recipe)


@pytest.fixture(scope="module")
def flux(tiny_dev, load_flux):
    return load_flux(tiny_dev)


def shifted(t):
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def schedule(case):
    """Sigmas, and the first step of DPM-Solver++ if any, by hand."""
    name, settings, _, random, _ = CASES[case]
    times = [1 - i / N for i in range(N + 1)]
    if name != "mix_grpo_flash":
        return [shifted(t) for t in times], None
    after = 3  # 0.6 of 7 points, and 0.7 of 6, are 4
    assert after == math.floor(settings["compression"] * (N + 1 - random.stop)) - 1
    start = times[random.stop]
    times = times[: random.stop] + [start - i * start / after for i in range(after + 1)]
    return [shifted(t) for t in times], random.stop


def std_of(case, sigma, following):
    name = CASES[case][0]
    if name == "dance_grpo":
        return 0.3 * math.sqrt(sigma - following)
    eta = 0.9 if name == "flow_grpo" else 0.7
    return eta * math.sqrt(sigma / (1 - (following if sigma == 1 else sigma))) * math.sqrt(sigma - following)


def noise_of(prompt, iteration, count, purpose, flux):
    return torch.randn(count, *flux.latent_shape, generator=stream(0, iteration, prompt.slot, purpose))


@torch.no_grad()
def walked(flux, case, prompt):
    """All states [steps + 1], velocities [steps] and noises {step} of a prompt's G candidates."""
    name, _, iteration, random, _ = CASES[case]
    sigmas, dpm_from = schedule(case)
    conditioning = flux.encode([prompt.text]).rows(torch.zeros(G, dtype=torch.int64))
    starts = noise_of(prompt, iteration, G if name == "flow_grpo" else 1, "noise", flux).expand(G, -1, -1)
    states, velocities, noises, data = [starts], [], {}, []
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x = states[-1]
        v = flux.velocity(x, torch.full((G,), s), conditioning)
        velocities.append(v)
        data.append(x - s * v)
        if i in random:
            std = std_of(case, s, t)
            noises[i] = noise_of(prompt, iteration, G, f"noise/{i}", flux)
            x = x - (s - t) * v - std**2 / (2 * s) * (x + (1 - s) * v) + std * noises[i]  # Eq. 5
        elif dpm_from is not None and dpm_from < i < len(sigmas) - 2:
            here, there, before = (math.log((1 - each) / each) for each in (s, t, sigmas[i - 1]))
            h, r = there - here, (here - before) / (there - here)
            ahead = data[i] + (data[i] - data[i - 1]) / (2 * r)  # arXiv 2211.01095, Algorithm 2
            x = t / s * x - (1 - t) * math.expm1(-h) * ahead
        else:
            x = x - (s - t) * v
        states.append(x)
    return states, velocities, noises


def assert_close(ours, theirs):
    """Up to float32 noise, which the steps of a random model amplify; other states are a hundred times further."""
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()


@each_case
def test_explores_the_walk_that_is_written_out(flux, case):
    name, settings, iteration, random, K = CASES[case]
    groups = algorithm_of(name, **settings).explore(flux, PROMPTS, iteration)
    sigmas, _ = schedule(case)
    assert groups.step_PM.shape == (P, G * K)
    for p, prompt in enumerate(PROMPTS):
        states, velocities, noises = walked(flux, case, prompt)
        assert_close(groups.final_PGS[p], states[-1])
        seen = set()
        for m, (step, g) in enumerate(zip(groups.step_PM[p].tolist(), groups.advantage_PM[p].tolist(), strict=True)):
            seen.add((step, g))
            assert_close(groups.latents_PMS[p, m], states[step][g])
            assert_close(groups.velocity_PMS[p, m], velocities[step][g])
            assert torch.equal(groups.noise_PMS[p, m], noises[step][g])
            s, t = sigmas[step], sigmas[step + 1]
            std = std_of(case, s, t)
            slope = -(s - t) - std**2 * (1 - s) / (2 * s)
            ours = [groups.sigma_before_PM[p, m], groups.slope_PM[p, m], groups.std_PM[p, m]]
            assert [each.item() for each in ours] == pytest.approx([s, slope, std], rel=1e-5)
        trained = sorted({step for step, _ in seen})
        assert seen == {(step, g) for step in trained for g in range(G)}, "every candidate at every trained step, once"
        assert len(trained) == K
        assert set(trained) <= set(random)
    assert not groups.final_PGS.requires_grad


def test_flashs_solver_is_of_second_order_where_it_may_be(flux):
    """The written-out walk with Euler's steps instead ends elsewhere."""
    walk = algorithm_of("mix_grpo_flash", window_size=2, compression=0.6).walk(0)
    assert walk.second_order_from == 2
    assert walk.sigmas.tolist() == pytest.approx([shifted(t) for t in (1, 7 / 8, 6 / 8, 4 / 8, 2 / 8, 0)], abs=1e-6)
    assert walk.std[2:] == (0.0, 0.0, 0.0)
    final = algorithm_of("mix_grpo_flash", window_size=2, compression=0.6).explore(flux, PROMPTS, 0).final_PGS
    states, _, _ = walked(flux, "flash", PROMPTS[0])
    sigmas, _ = schedule("flash")
    conditioning = flux.encode([PROMPTS[0].text]).rows(torch.zeros(G, dtype=torch.int64))
    x = states[2]
    with torch.no_grad():
        for s, t in pairwise(sigmas[2:]):
            x = x - (s - t) * flux.velocity(x, torch.full((G,), s), conditioning)
    assert (final[0] - x).abs().max() > 0.02 * x.abs().max()


def test_candidates_differ_from_the_window_on(flux):
    groups = algorithm_of("mix_grpo", window_size=3).explore(flux, PROMPTS[:1], 60)
    first, second = (groups.latents_PMS[0, groups.step_PM[0] == step] for step in (2, 3))
    assert_close(first, first[:1].expand_as(first))
    assert torch.pdist(second.flatten(1)).min() > 0.1


@each_case
def test_any_number_of_processes_draws_the_same(flux, case):
    """A prompt alone, or in turn, explores what it explores beside others."""
    name, settings, iteration, _, _ = CASES[case]
    together = algorithm_of(name, **settings).explore(flux, PROMPTS, iteration)
    in_turn = algorithm_of(name, per_rank=1, **settings).explore(flux, PROMPTS, iteration)
    alone = algorithm_of(name, **settings).explore(flux, PROMPTS[1:], iteration)
    for name in ("step_PM", "advantage_PM", "noise_PMS", "std_PM"):
        assert torch.equal(getattr(in_turn, name), getattr(together, name))
        assert torch.equal(getattr(alone, name)[0], getattr(together, name)[1])
    for name in ("latents_PMS", "velocity_PMS", "final_PGS"):
        assert_close(getattr(in_turn, name), getattr(together, name))
        assert_close(getattr(alone, name)[0], getattr(together, name)[1])
    assert_close(in_turn.conditioning.prompt_embeds, together.conditioning.prompt_embeds)
    assert not torch.equal(together.noise_PMS[0], together.noise_PMS[1])


def test_steps_and_order_are_drawn_for_each_prompt(flux):
    algorithm = algorithm_of("dance_grpo", num_train_steps=2)
    prompts = [Prompt("a dog", slot) for slot in range(6)]
    algorithm.prompts_together = 6
    drawn = [algorithm.explore(flux, prompts, iteration) for iteration in (0, 1)]
    for iteration, groups in enumerate(drawn):
        for slot in range(6):
            steps = draw_train_steps((0, 7), 2, seed=0, step=iteration, slot=slot).tolist()
            assert groups.step_PM[slot].tolist() == steps * G
    steps = torch.cat([groups.step_PM[:, :2] for groups in drawn])
    assert len({tuple(each) for each in steps.tolist()}) > 4
    assert steps.max() <= 6
    orders = torch.cat([groups.advantage_PM[:, ::2] for groups in drawn])
    assert torch.equal(orders.sort(1).values, torch.arange(G).expand(12, -1))
    assert len({tuple(each) for each in orders.tolist()}) > 4


def test_an_optimizer_step_trains_whole_candidates(flux):
    groups = algorithm_of("mix_grpo", window_size=3).explore(flux, PROMPTS, 0)
    blocks = groups.blocks(2)
    for p in range(P):
        parts = [set(zip(b.step_PM[p].tolist(), b.advantage_PM[p].tolist(), strict=True)) for b in blocks]
        candidates = [{g for _, g in part} for part in parts]
        assert [len(each) for each in candidates] == [2, 2]
        assert candidates[0] | candidates[1] == set(range(G))
        assert all(
            part == {(step, g) for step in range(3) for g in own} for part, own in zip(parts, candidates, strict=True)
        )
    for name in ("latents_PMS", "noise_PMS", "velocity_PMS", "std_PM"):
        assert torch.equal(torch.cat([getattr(block, name) for block in blocks], 1), getattr(groups, name))
    assert all(block.final_PGS is groups.final_PGS for block in blocks)
