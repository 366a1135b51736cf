"""The examples: the toy learns, and every adapter gives the loss that the paper's equations ask for."""
# P prompts, G candidates, B anchors, K trained steps, N steps, T image tokens, C channels, D = T * C; L text tokens.

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from ngrpo_kernels import LossOutput, reference

from .parts.flow_transformers import flux

EXAMPLES = Path(__file__).parents[1] / "examples"
C, L = 64, 3


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).stem}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- The toy -----------------------------------------------------------------------------------------------------------


def test_the_toy_learns_what_is_rewarded_and_only_that() -> None:
    """Seeds 0 to 2 rise from 0.24 to 1.00, 0.92 and 0.97; with shuffled advantages they end at 0.00, 0.19 and 0.22."""
    torch.set_num_threads(1)  # more only get in each other's way at this size
    toy = example("toy_flow")
    for seed in range(3):
        before, after = toy.main(seed)
        before_control, control = toy.main(seed, shuffle=True)
        assert before == before_control
        assert after - before > 0.5
        assert control - before < 0.1


def test_the_toy_is_short_and_needs_only_torch() -> None:
    source = (EXAMPLES / "toy_flow.py").read_text("utf-8")
    assert len([line for line in source.splitlines() if line]) <= 62
    imported = [line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imported == ["itertools", "torch", "torch", "ngrpo_kernels"]


# -- The page ----------------------------------------------------------------------------------------------------------


def test_the_minimal_call_of_the_docs_runs() -> None:
    code = (EXAMPLES.parent / "docs" / "drop-in.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    P, G, B, T, N = 2, 5, 3, 4, 6
    weight = torch.ones(C, requires_grad=True)
    names = {
        "torch": torch,
        "P": P,
        "G": G,
        "B": B,
        "rewards": torch.randn(P, G),
        "states": list(torch.randn(N + 1, P, G, T, C)),
        "sigmas": torch.linspace(1, 0, N + 1),
        "trained_steps": range(N // 2),
        "model": lambda x, sigma: weight * x,
        "optimizer": torch.optim.SGD([weight], lr=1.0),
    }
    exec(code, names)
    assert names["out"].log_ratio.shape == (P, B, G)
    assert (weight != 1).all()


# -- Gradient parity ---------------------------------------------------------------------------------------------------

NAMES = ["dance_grpo", "mix_grpo", "flow_grpo", "flow_factory", "diffusers_training"]


class Velocity(nn.Module):
    """Stands in for FluxTransformer2DModel: linear in its parameters, float32 inside, bfloat16 out.

    Called as FLUX is. It depends on every row of its inputs, so that a wrong row or timestep is a wrong result.
    """

    def __init__(self, seed: int, guidance_embeds: bool = True) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        scale = torch.tensor([0.8, 0.5, 0.3, 0.3])[:, None]
        self.weight = nn.Parameter(scale * (1 + 0.2 * torch.randn(4, C, generator=random)))
        self.config = SimpleNamespace(guidance_embeds=guidance_embeds)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        pooled_projections: Tensor,
        encoder_hidden_states: Tensor,
        txt_ids: Tensor,
        img_ids: Tensor,
        return_dict: bool,
    ) -> tuple[Tensor]:
        rows, tokens, _ = hidden_states.shape
        assert timestep.shape == (rows,)
        assert pooled_projections.shape[0] == encoder_hidden_states.shape[0] == rows
        assert txt_ids.shape == (encoder_hidden_states.shape[1], 3)
        assert img_ids.shape == (tokens, 3)
        assert guidance is None or guidance.shape in ((1,), (rows,))
        assert not return_dict
        features = self.features(hidden_states.float(), timestep, pooled_projections, encoder_hidden_states)
        return (sum(w * f for w, f in zip(self.weight, features, strict=True)).bfloat16(),)

    @staticmethod
    def features(x: Tensor, timestep: Tensor, pooled: Tensor, text: Tensor) -> list[Tensor]:
        """What the four rows of `weight` multiply, each broadcast to [rows, T, C]."""
        columns = timestep[:, None, None], pooled[:, :1, None], text.mean((1, 2))[:, None, None]
        return [x, *(column.to(x.dtype).expand_as(x) for column in columns)]


@dataclass
class Rollout:
    """One neighborhood (Eq. 7) per prompt, solved by Euler steps as the trainers write them: x + dsigma * v."""

    P: int
    G: int
    N: int
    T: int
    B: int
    model: Velocity = field(default_factory=lambda: Velocity(0))
    moved: Velocity = field(default_factory=lambda: Velocity(1))  # the policy after an optimizer step
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.T)
        S = self.P * self.G
        t = torch.linspace(1, 0, self.N + 1)
        self.sigmas = 3 * t / (1 + 2 * t)
        self.pooled = self.normal(self.P, 2).repeat_interleave(self.G, 0)  # a prompt's candidates share its text
        self.text = self.normal(self.P, L, 4).repeat_interleave(self.G, 0)
        self.image_ids = torch.zeros(self.T, 3)
        self.prompt = torch.arange(self.P).repeat_interleave(self.G)
        self.advantages = self.normal(self.P, self.G).flatten()
        base = self.normal(self.P, 1, self.T, C)
        noise = 0.91**0.5 * base + 0.3 * self.normal(self.P, self.G, self.T, C)
        states = [noise.view(S, self.T, C).to(self.dtype)]
        with torch.no_grad():
            for i in range(self.N):
                after = states[-1].float() + (self.sigmas[i + 1] - self.sigmas[i]) * self.velocity(
                    self.model, i, states[-1]
                )
                states.append(after.to(self.dtype))
        self.all_latents = torch.stack(states, 1)  # [S, N+1, T, C]
        self.anchors = torch.stack([torch.randperm(self.G, generator=self.random)[: self.B] for _ in range(self.P)])

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def timestep(self, i: int) -> Tensor:
        """As the model sees it. In float32 this is not quite sigma, and bfloat16 velocities then differ in places."""
        return 1000 * self.sigmas[i] / 1000

    def velocity(self, model: Velocity, i: int, x: Tensor, rows: Tensor | None = None) -> Tensor:
        rows = torch.arange(self.P * self.G) if rows is None else rows
        features = model.features(x.float(), self.timestep(i).expand(len(rows)), self.pooled[rows], self.text[rows])
        return sum(w * f for w, f in zip(model.weight, features, strict=True)).bfloat16().float()

    @property
    def rows(self) -> Tensor:
        """The anchors' rows among all samples, [P * B]."""
        return (self.anchors + self.G * torch.arange(self.P)[:, None]).flatten()


class TruncatedTimesteps(Rollout):
    """DanceGRPO and MixGRPO show the model int(1000 * sigma) / 1000."""

    def timestep(self, i: int) -> Tensor:
        return torch.tensor(int(self.sigmas[i] * 1000)) / 1000


def rollout_for(name: str) -> Rollout:
    """Shapes of each trainer: DanceGRPO's at full size, the others with fewer tokens."""
    if name == "dance_grpo":
        return TruncatedTimesteps(P=1, G=12, N=8, T=2025, B=2)
    if name == "mix_grpo":
        return TruncatedTimesteps(P=1, G=12, N=6, T=81, B=4)
    if name == "diffusers_training":
        return Rollout(P=1, G=5, N=6, T=100, B=3)
    return Rollout(P=3, G=4, N=6, T=100, B=2, dtype=torch.bfloat16)


def test_every_adapter_is_held_to_the_equations_and_shadows_no_trainer() -> None:
    """A script finds the files beside it first: one named as its trainer's package would be imported in its place."""
    assert {path.stem for path in (EXAMPLES / "adapters").glob("*.py")} == {f"for_{name}" for name in NAMES}


def run(name: str, case: Rollout, step: int, old: Tensor | None, **settings: Any) -> LossOutput:
    """The adapter, in its trainer's terms, with the tensors of `case` laid out as that trainer does."""
    return ADAPTERS[name](example(f"adapters/for_{name}"), case, step, old, settings)


def dance_grpo(
    adapter: ModuleType, case: Rollout, step: int, old: Tensor | None, settings: dict[str, Any]
) -> LossOutput:
    assert case.all_latents.shape == (12, 9, 2025, 64)
    return adapter.neighbor_one_step(*fastvideo(case), step, case.sigmas, *group(case), old, **settings)


def mix_grpo(adapter: ModuleType, case: Rollout, step: int, old: Tensor | None, settings: dict[str, Any]) -> LossOutput:
    old = None if old is None else old[None]
    out = adapter.neighbor_window(*fastvideo(case), [step], case.sigmas, *group(case), old, **settings)
    return out._replace(log_ratio=out.log_ratio[0], entropy=out.entropy[0])


def fastvideo(case: Rollout) -> tuple[Any, ...]:
    S = len(case.all_latents)
    timesteps = torch.tensor([int(sigma * 1000) for sigma in case.sigmas[:-1]]).repeat(S, 1)
    image_ids, text_ids = case.image_ids.repeat(S, 1, 1), torch.zeros(S, 3)
    return case.all_latents, case.text, case.pooled, text_ids, image_ids, case.moved, timesteps


def group(case: Rollout) -> tuple[Tensor, Tensor]:
    return case.anchors[0], case.advantages


def flow_grpo(
    adapter: ModuleType, case: Rollout, step: int, old: Tensor | None, settings: dict[str, Any]
) -> LossOutput:
    sample, config, pipeline = flow_grpo_batch(case)
    old = None if old is None else old.unflatten(0, case.anchors.shape)
    transformer = SimpleCall(case.moved)
    return adapter.neighbor_loss(transformer, pipeline, sample, step, config, case.anchors, old, **settings)


class SimpleCall:
    """A module wrapped as DistributedDataParallel wraps it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def flow_grpo_batch(case: Rollout) -> tuple[dict[str, Tensor], SimpleNamespace, SimpleNamespace]:
    """Whole groups, samples interleaved: members keep their order, prompts do not."""
    S = len(case.all_latents)
    order = torch.arange(S).view(case.P, case.G).T.flatten()
    sample = {
        "prompt_ids": case.prompt[:, None].repeat(1, 256),
        "prompt_embeds": case.text,
        "pooled_prompt_embeds": case.pooled,
        "image_ids": case.image_ids.repeat(S, 1, 1),
        "timesteps": (1000 * case.sigmas[:-1]).repeat(S, 1),
        "latents": case.all_latents[:, :-1],
        "next_latents": case.all_latents[:, 1:],
        "advantages": case.advantages[:, None].repeat(1, case.N // 2),
    }
    config = SimpleNamespace(sample=SimpleNamespace(num_image_per_prompt=case.G, guidance_scale=3.5))
    pipeline = SimpleNamespace(scheduler=SimpleNamespace(sigmas=case.sigmas))
    return {name: tensor[order] for name, tensor in sample.items()}, config, pipeline


class Sample(SimpleNamespace):
    """As much of Flow-Factory's BaseSample as its trainer's loop reads."""

    @classmethod
    def stack(cls, samples: list["Sample"]) -> dict[str, Any]:
        shared = {"latent_index_map", "img_ids"}
        first = vars(samples[0])
        return {
            name: value
            if name in shared or not isinstance(value, Tensor)
            else torch.stack([getattr(sample, name) for sample in samples])
            for name, value in first.items()
        }


def flow_factory_samples(case: Rollout, step: int) -> list[Sample]:
    """Only the states around one step are stored, as `compute_trajectory_indices` arranges it."""
    index_map = torch.full((case.N + 1,), -1)
    index_map[step : step + 2] = torch.arange(2)
    samples = [
        Sample(
            unique_id=int(case.prompt[row]),
            timesteps=1000 * case.sigmas[:-1],
            all_latents=case.all_latents[row, step : step + 2],
            latent_index_map=index_map,
            log_probs=None,
            prompt_embeds=case.text[row],
            pooled_prompt_embeds=case.pooled[row],
            img_ids=case.image_ids,
            advantage=case.advantages[row],
        )
        for row in range(len(case.all_latents))
    ]
    return [samples[row] for row in torch.arange(len(samples)).view(case.P, case.G).T.flatten()]


def flow_factory(
    adapter: ModuleType, case: Rollout, step: int, old: Tensor | None, settings: dict[str, Any]
) -> LossOutput:
    def forward(
        t: Tensor,
        t_next: Tensor,
        latents: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        img_ids: Tensor,
        compute_log_prob: bool,
        noise_level: float,
        return_kwargs: list[str],
        **unused: Any,
    ) -> SimpleNamespace:
        assert not compute_log_prob
        assert noise_level == 0.0
        assert return_kwargs == ["noise_pred"]
        assert (t_next < t).all()
        text_ids = torch.zeros(prompt_embeds.shape[1], 3)
        velocity = case.moved(latents, t / 1000, None, pooled_prompt_embeds, prompt_embeds, text_ids, img_ids, False)[0]
        return SimpleNamespace(noise_pred=velocity.float())  # the scheduler's step works in float32

    old = None if old is None else old.unflatten(0, case.anchors.shape)
    samples = flow_factory_samples(case, step)
    return adapter.neighbor_loss(samples, step, case.G, case.anchors, forward, old, **settings)


def diffusers_training(
    adapter: ModuleType, case: Rollout, step: int, old: Tensor | None, settings: dict[str, Any]
) -> LossOutput:
    scheduler = SimpleNamespace(sigmas=case.sigmas, timesteps=1000 * case.sigmas[:-1])
    conditioning = {
        "guidance": torch.tensor([3.5]),
        "pooled_projections": case.pooled[:1],
        "encoder_hidden_states": case.text[:1],
        "txt_ids": torch.zeros(L, 3),
        "img_ids": case.image_ids,
    }
    states = adapter.rollout(case.model, scheduler, case.all_latents[:, 0], **conditioning)
    assert torch.equal(torch.stack(states, 1), case.all_latents)
    return adapter.neighbor_loss(case.moved, scheduler, states, step, *group(case), old, settings, **conditioning)


ADAPTERS: dict[str, Callable[..., LossOutput]] = {
    "dance_grpo": dance_grpo,
    "mix_grpo": mix_grpo,
    "flow_grpo": flow_grpo,
    "flow_factory": flow_factory,
    "diffusers_training": diffusers_training,
}


@dataclass
class Truth:
    log_ratio: Tensor  # [P, B, G]
    entropy: Tensor  # [P, B]
    grad: Tensor  # of the loss at Velocity.weight, [4, C]
    grad_of_magnitudes: Tensor  # the same sum with every term's absolute value


def truth(case: Rollout, step: int, old: Tensor | None, clip_range: float, temperature: float | str) -> Truth:
    """Eqs. 8 to 10 as printed, in float64 by autograd, from the same stored states and emitted velocities."""
    P, B = case.anchors.shape
    dsigma = case.sigmas[step + 1].double() - case.sigmas[step].double()
    x = case.all_latents[case.rows, step].double()
    candidates = case.all_latents[:, step + 1].double().view(P, case.G, -1)
    velocity = case.velocity(case.moved, step, case.all_latents[case.rows, step], case.rows).double().requires_grad_()

    def after(velocity: Tensor) -> Tensor:
        return (x + dsigma * velocity).view(P, B, -1)  # the trainers' own Euler step

    tau: Any = temperature
    if temperature == "neighborhood":
        tau = torch.stack([torch.pdist(candidate).square().mean() for candidate in candidates])[:, None, None]
    anchors, old_anchors = after(velocity), after(velocity.detach() if old is None else old.double())
    advantages = case.advantages.double().view(P, case.G)
    loss = reference.direct_loss(anchors, old_anchors, candidates, advantages, (clip_range, clip_range), tau)
    (grad,) = torch.autograd.grad(loss, velocity)
    sqdist = (candidates[:, None] - anchors.detach()[:, :, None]).square().sum(-1)
    policy = (-sqdist / tau).softmax(-1)

    timestep = case.timestep(step).double().expand(len(case.rows))
    features = case.moved.features(x, timestep, case.pooled[case.rows].double(), case.text[case.rows].double())
    return Truth(
        log_ratio=reference.direct_log_ratio(anchors.detach(), old_anchors, candidates, tau),
        entropy=torch.special.entr(policy).sum(-1),
        grad=torch.stack([(grad * feature).sum((0, 1)) for feature in features]),
        grad_of_magnitudes=torch.stack([(grad * feature).abs().sum((0, 1)) for feature in features]),
    )


def assert_parity(name: str, case: Rollout, step: int, old: Tensor | None, **settings: Any) -> LossOutput:
    out = run(name, case, step, old, **settings)
    want = truth(case, step, old, **settings)
    (grad,) = torch.autograd.grad(out.loss, case.moved.weight)

    # The bound that tests/kernels/test_reference.py holds the float32 log-ratio to.
    error = (out.log_ratio.double().view_as(want.log_ratio) - want.log_ratio).abs().max()
    assert error <= 1e-6 + 1e-5 * want.log_ratio.abs().max()

    # The gradient reaches the model in bfloat16, which rounds each of its elements by at most 2^-9 of itself; a
    # parameter's gradient is a sum of them. The rest, float32 sums and weights, is far under a further 2^-12.
    assert want.grad.abs().max() > 0
    assert ((grad.double() - want.grad).abs() <= (2**-9 + 2**-12) * want.grad_of_magnitudes).all()

    # Where x_theta stands: the entropy depends on its distances, and on nothing else of this.
    torch.testing.assert_close(out.entropy.double().view_as(want.entropy), want.entropy, rtol=1e-4, atol=1e-5)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_gradient_parity_with_one_optimizer_step(name: str) -> None:
    case = rollout_for(name)
    case.moved = case.model
    for step in (0, case.N // 2 - 1):
        out = assert_parity(name, case, step, None, clip_range=1e-4, temperature="neighborhood")
        assert (out.log_ratio == 0).all()
        assert (out.entropy > 1e-2).all()  # so that it shows where the anchors stand


@pytest.mark.parametrize("name", NAMES)
def test_gradient_parity_with_several_optimizer_steps(name: str) -> None:
    """The model has moved since the rollout, and about half of the ratios are outside the clip range."""
    case = rollout_for(name)
    step = case.N // 2 - 1
    old = case.velocity(case.model, step, case.all_latents[case.rows, step], case.rows).detach()
    change = truth(case, step, old, 1.0, "neighborhood").log_ratio.expm1().abs().flatten().sort().values
    middle = change[len(change) // 4 : -len(change) // 4]
    widest = middle.diff().argmax()
    assert middle.diff()[widest] > 2e-5  # far from the log-ratio's rounding, which then decides nothing
    clip_range = float(middle[widest] + middle[widest + 1]) / 2
    out = assert_parity(name, case, step, old, clip_range=clip_range, temperature="neighborhood")
    assert 0.2 < out.clip_fraction.mean() < 0.8


@pytest.mark.parametrize("name", NAMES)
def test_the_anchors_land_on_their_own_candidates(name: str) -> None:
    """At theta_old the step forward in the trainer's own sigmas gives the state that its rollout stored."""
    case = rollout_for(name)
    case.moved = case.model
    out = run(name, case, 1, None, temperature="neighborhood")
    candidates = case.all_latents[:, 2].double().view(case.P, case.G, -1)
    tau = torch.stack([torch.pdist(candidate).square().mean() for candidate in candidates])[:, None, None]
    own = candidates.take_along_dim(case.anchors[:, :, None], 1)
    policy = (-(candidates[:, None] - own[:, :, None]).square().sum(-1) / tau).softmax(-1)
    # A state stored in bfloat16 is off by up to 2^-9 of each element, which moves distances over tau by some 1e-4.
    tolerance = 1e-5 if case.dtype == torch.float32 else 1e-3
    want = torch.special.entr(policy).sum(-1)
    torch.testing.assert_close(out.entropy.double().view_as(want), want, rtol=0, atol=tolerance)


def test_window_is_the_mean_of_its_steps() -> None:
    case = rollout_for("mix_grpo")
    adapter = example("adapters/for_mix_grpo")
    window = [0, 2, 3]
    together = adapter.neighbor_window(*fastvideo(case), window, case.sigmas, *group(case))
    assert together.log_ratio.shape == (3, case.B, case.G)
    (grad,) = torch.autograd.grad(together.loss, case.moved.weight)
    single = [adapter.neighbor_window(*fastvideo(case), [i], case.sigmas, *group(case)).loss / 3 for i in window]
    (want,) = torch.autograd.grad(sum(single), case.moved.weight)
    torch.testing.assert_close(grad, want, rtol=1e-2, atol=1e-2 * float(want.abs().max()))  # bfloat16 gradients


def test_anchors_one_at_a_time_accumulate_to_the_same_gradient() -> None:
    case = TruncatedTimesteps(P=1, G=12, N=8, T=81, B=3)
    adapter = example("adapters/for_dance_grpo")

    def grad(anchors: Tensor) -> Tensor:
        out = adapter.neighbor_one_step(*fastvideo(case), 2, case.sigmas, anchors, case.advantages)
        return torch.autograd.grad(out.loss, case.moved.weight)[0]

    anchors = case.anchors[0]
    single = torch.stack([grad(anchors[b : b + 1]) for b in range(3)]).mean(0)
    torch.testing.assert_close(single, grad(anchors), rtol=1e-2, atol=1e-2 * float(single.abs().max()))


@pytest.mark.parametrize("name", ["flow_grpo", "flow_factory"])
def test_an_incomplete_group_is_refused(name: str) -> None:
    case = rollout_for(name)
    adapter = example(f"adapters/for_{name}")
    if name == "flow_grpo":
        sample, config, pipeline = flow_grpo_batch(case)
        sample = {name: tensor[:-1] for name, tensor in sample.items()}
        with pytest.raises(ValueError, match=r"expected 4 samples of each prompt, got \[4, 4, 3\]"):
            adapter.neighbor_loss(SimpleCall(case.moved), pipeline, sample, 0, config, case.anchors)
    else:
        samples = flow_factory_samples(case, 0)[:-1]
        with pytest.raises(ValueError, match=r"expected 4 samples of each, got \[4, 4, 3\]"):
            adapter.neighbor_loss(samples, 0, case.G, case.anchors, None)
        with pytest.raises(ValueError, match=r"expected 4 samples of each, got \[4, 4, 3\]"):
            adapter.neighbor_advantages(SimpleNamespace(group_size=4), samples, {"a": torch.rand(11)}, True)


def test_flow_factory_gets_the_advantages_of_the_equations() -> None:
    """Two rewards of unequal weight and scale; the samples of three prompts are interleaved."""
    case = rollout_for("flow_factory")
    rewards = {"narrow": 0.02 * case.normal(12), "wide": 3 + case.normal(12)}
    weights = {"wide": 0.5, "narrow": 2.0}
    samples = flow_factory_samples(case, 0)
    for sample in samples:
        sample.extra_kwargs = {}
    processor = SimpleNamespace(
        group_size=case.G, reward_weights=weights, accelerator=SimpleNamespace(device=torch.device("cpu"))
    )
    got = example("adapters/for_flow_factory").neighbor_advantages(processor, samples, rewards, True)

    want = torch.zeros(12, dtype=torch.float64)
    for prompt in range(case.P):
        rows = torch.tensor([sample.unique_id == prompt for sample in samples])
        for name, reward in rewards.items():
            group = reward[rows].double()
            want[rows] += weights[name] * (group - group.mean()) / group.std()  # Eq. 3
        want[rows] /= want[rows].abs().pow(0.8).sum() ** (1 / 0.8)  # Eq. 11
    # A float32 reward near 4 is good to 5e-7, which is divided by a group's spread; weights over the norm are below 1.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    assert [sample.extra_kwargs["advantage"] for sample in samples] == list(got)


def test_a_group_cut_short_is_refused() -> None:
    case = TruncatedTimesteps(P=1, G=12, N=8, T=9, B=3)
    adapter = example("adapters/for_dance_grpo")
    tensors = [tensor[:11] if isinstance(tensor, Tensor) else tensor for tensor in fastvideo(case)]
    anchors = torch.tensor([0, 3])
    with pytest.raises(ValueError, match="advantages"):
        adapter.neighbor_one_step(*tensors, 2, case.sigmas, anchors, case.advantages)


# -- With diffusers' own classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dance_grpo", "mix_grpo", "flow_grpo", "diffusers_training"])
def test_adapters_call_the_transformer_of_diffusers_as_it_wants(name: str) -> None:
    """Not Flow-Factory's: it calls the model through that trainer's own adapter."""
    case = Rollout(P=1, G=3, N=4, T=16, B=2)
    torch.manual_seed(0)
    case.moved = flux(4, 2)  # type: ignore[assignment]
    if name == "diffusers_training":
        adapter, scheduler = example("adapters/for_diffusers_training"), FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
        inputs = {"guidance": torch.tensor([3.5]), "txt_ids": torch.zeros(L, 3), "img_ids": case.image_ids}
        inputs |= {"pooled_projections": case.pooled[:1], "encoder_hidden_states": case.text[:1]}
        states = adapter.rollout(case.moved, scheduler, case.all_latents[:, 0], **inputs)
        with torch.no_grad():
            velocity = adapter.predict(case.moved, scheduler, states[0], 0, inputs)
            step = scheduler.step(velocity, scheduler.timesteps[0], states[0]).prev_sample
        torch.testing.assert_close(states[1], step)
        out = adapter.neighbor_loss(case.moved, scheduler, states, 1, *group(case), **inputs)
    elif name == "dance_grpo":
        adapter = example("adapters/for_dance_grpo")
        out = adapter.neighbor_one_step(*fastvideo(case), 1, case.sigmas, *group(case))
    else:
        out = run(name, case, 1, None)
    assert (out.log_ratio == 0).all()
    out.loss.backward()
    gradients = [p.grad for p in case.moved.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in gradients)
    assert sum(int(grad.any()) for grad in gradients) > len(list(case.moved.parameters())) // 2
