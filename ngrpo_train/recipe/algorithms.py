"""Settings of each algorithm as it was published: its fields, its rules, and the work and memory that it takes.

A seventh algorithm of ours is a class here, in `ALGORITHMS`, and the file in `algorithms/` that its `implementation`
names. A user's own algorithm needs no change of this package. Its recipe says `algorithm.name = "package.module:Name"`:
`Name` is the class that trains (`ngrpo_train.algorithms.GRPO`), and `Name.Settings` is a subclass of `Algorithm`.
"""

# N solver steps, G candidates, B of them trained, K trained steps; an edge is a branch's way through one step.

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from ngrpo_train.recipe.explore import Explore
from ngrpo_train.recipe.named import import_named
from ngrpo_train.recipe.ranges import Fraction, NotNegative, Positive, Range, require

TRANSITION_STATES = 6
"""float32 latents that the loss of a Gaussian policy holds for each transition.
State, noise, the velocities of rollout, old and new policy, and the gradient."""

_EDGES_PER_UPDATE = 6  # of a tree: BranchGRPO's script accumulates 12 transitions of a process's two trees

_TWO_OR_MORE = Range("must be 2 or more", lambda value: value >= 2)
_ORDER = Range("must be in (0, 2]", lambda value: 0 < value <= 2)
_RISING = Range("must be two rising fractions within 0 and 1", lambda value: 0 <= value[0] < value[1] <= 1)
_TEMPERATURE = Range("must be positive", lambda value: isinstance(value, str) or 0 < value < math.inf)


def _is_clip(value: float | tuple[float, float]) -> bool:
    low, high = value if isinstance(value, tuple) else (value, value)
    return 0 < low < 1 and 0 < high < math.inf


_CLIP = Range("must be positive, and below 1 on the lower side", _is_clip)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The work and memory that one prompt takes in one iteration. A latent is float32, T * C numbers."""

    generations: int
    """G: candidates."""
    calls: tuple[int, ...]
    """Pictures in each solver step of the rollout: G, or the branches of a tree."""
    num_train_steps: int
    """K: trained solver steps."""
    states: int
    """Forward-backwards: trained states, over all optimizer steps. B * K; in a tree, its trained edges."""
    updates: int
    """Optimizer steps."""
    old_policy: int
    """Forwards for the old policy, before the first optimizer step, of the states that are trained after that step."""
    explored_latents: int
    """Latents that are kept from the rollout to the update."""
    states_per_row: int = 1
    """b: states of one row of an update."""
    row_latents: int = TRANSITION_STATES
    """Latents that the loss holds for one row of an update."""
    rollout_latents: int = 7
    """Latents held for each picture while it is explored."""
    copied_latents: int = 0
    """Latents that an update copies beside the explored ones."""
    coarse_calls: tuple[int, ...] = ()
    """Pictures in each solver step of coarse exploration, which comes before the rollout."""
    coarse_scale: float = 1.0
    """Height and width of a coarse picture, as a part of the picture's."""

    @property
    def rollout(self) -> int:
        """Forwards of the rollout."""
        return sum(self.calls)

    @property
    def num_anchors(self) -> float:
        """B: candidates trained per step; for a tree, their average over steps."""
        return self.states / self.num_train_steps

    @property
    def nfe_old(self) -> float:
        """Evaluations of the old policy per picture, as in the paper's Table 3."""
        return self.rollout / self.generations

    @property
    def nfe_theta(self) -> float:
        """Evaluations of the trained policy per picture, B / G * K, as in the paper's Table 3."""
        return self.states / self.generations


# No slots from here on: they would break `super()` in the classes that `dataclass` makes anew.
@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Settings for exploring groups and updating the policy. Letters and equations are those of arXiv 2511.16955.

    All algorithms have these fields. A subclass adds its own, with published values as defaults and ranges in their
    types (`ngrpo_train.recipe.ranges`). It overrides `check` for rules that join several fields. It also overrides the
    methods after `check` that do not hold for it: the trainer reports what they return, and `ngrpo plan` computes with
    it. As they stand here, G candidates walk through all N solver steps, and each is trained at every step of
    `step_range`.
    """

    implementation: ClassVar[str] = ""
    """"package.module:Name" of the class that trains, for an algorithm of ours; `name` names a user's own."""
    explores_by: ClassVar[str] = "num_generations"
    """Name of the field to raise where the candidates of a group are too much alike."""
    rows_are: ClassVar[str] = "one state"
    """Content of one row of an update, in the words of `ngrpo plan`."""

    name: str = ""
    """neighbor, flow_grpo, dance_grpo, mix_grpo, mix_grpo_flash, branch_grpo, or "package.module:Name" for your own.
    Each has settings of its own; give --algorithm.name before --help to see them."""
    num_generations: Annotated[int, _TWO_OR_MORE] = 12
    """G: candidates per prompt."""
    step_range: Annotated[tuple[float, float], _RISING] = (0.0, 1.0)
    """Part of the solver's steps that may be trained, as fractions: (0, 0.5) is the noisy half."""
    old_policy: Literal["exact", "cached", "literal"] = "exact"
    """Point of the old policy, from which the ratio is computed.
    "exact": one step by a forward of the old weights, computed as in training.
    "cached": one step by the velocity that the rollout computed.
    "literal", for neighbor alone: the state that the rollout reached, as Algorithm 1 is printed.
    With a multistep solver the ratio of "literal" is biased."""
    updates_per_iteration: Positive[int] = 1
    """Optimizer steps per iteration, each on a share of the trained candidates.
    Clip and KL act from the second step on."""
    combine: Literal["standardized", "raw_sum"] = "standardized"
    """Combination of several rewards. "standardized": each is standardised in its group, then weighted.
    "raw_sum": the scores are weighted as they are, and one of wide spread outweighs the others."""
    p: Annotated[float, _ORDER] = 2.0
    """Order of the quasi-norm that advantages are divided by (Eq. 11), in (0, 2].
    2 is plain GRPO up to a constant."""
    min_reward_std: NotNegative[float] = 0.0
    """Standard deviation, in a reward's own units, below which a reward adds nothing in a group."""
    clip_range: Annotated[float | tuple[float, float], _CLIP] = 1e-4
    """Clip of the ratio: eps for 1 - eps to 1 + eps, or two numbers, low and high."""
    kl_coef: NotNegative[float] = 0.0
    """Weight of KL(pi_old || pi_theta) in the loss."""
    shuffle_rewards: bool = False
    """Deal each group's rewards to its candidates at random.
    This is a control experiment: the reward must not rise."""
    reference_coef: NotNegative[float] = 0.0
    """Weight of a tether to the untrained model; it needs tuning = "lora", where it costs no memory.
    The tether is |v_theta - v_base|^2 for neighbor, and for the others KL(pi_theta || pi_base) as in Flow-GRPO's paper.
    Its code has that KL times the step's dt: divide a weight from there by about N."""

    @staticmethod
    def of(name: str) -> Algorithm:
        """The settings of an algorithm as published, for FLUX where its authors have settings for FLUX.

        Raises ValueError for an algorithm that does not exist.
        """
        return settings_class(name)(name=name)

    def check(self, N: int) -> None:
        """Raise ValueError, naming the field, for settings that cannot train with N solver steps.

        The range of each field by itself has been checked before.
        """
        self._check_steps(N)
        require(
            self.num_generations % self.updates_per_iteration == 0,
            "algorithm.updates_per_iteration",
            self.updates_per_iteration,
            f"must divide algorithm.num_generations = {self.num_generations}",
        )

    def trainable_steps(self, N: int) -> range:
        """The solver steps, of N, that may be trained: `step_range`."""
        first, last = (round(end * N) for end in self.step_range)
        return range(first, last)

    def num_trained_steps(self, N: int) -> int:
        """K: the solver steps, of N, that are trained for one prompt."""
        return len(self.trainable_steps(N))

    def optimizer_steps(self, states: int) -> int:
        """The optimizer steps of an iteration that trains so many states of each prompt."""
        return self.updates_per_iteration

    def workload(self, N: int, iteration: int = 0) -> Workload:
        """The work and memory that one prompt takes in that iteration, with N solver steps."""
        G, K = self.num_generations, self.num_trained_steps(N)
        return self._of_transitions(calls=(G,) * N, K=K, states=G * K)

    def needs_all_groups(self, N: int) -> str:
        """Why an update needs the groups of all prompts together; empty if it can take them part by part."""
        if type(self) is not ALGORITHMS.get(self.name):
            return f"algorithm.name = {self.name!r} is your own"
        if (updates := self.workload(N).updates) > 1:
            return f"each of the {updates} updates of an iteration is on all its prompts"
        return "algorithm.shuffle_rewards draws for all prompts" if self.shuffle_rewards else ""

    def cannot_retain(self, N: int) -> str:
        """Why an update cannot train through the forwards that explored; empty if it can."""
        return f"algorithm.name = {self.name!r} does not keep them; neighbor does"

    @property
    def chooses(self) -> bool:
        """True where groups are chosen by the scores of coarse pictures (`ngrpo_train.algorithms.Choosing`)."""
        return False

    @property
    def exploration(self) -> str:
        """The setting that spreads the candidates of a group, and its value."""
        return f"algorithm.{self.explores_by} = {getattr(self, self.explores_by):g}"

    @property
    def loss_backend(self) -> str:
        """The backend of ngrpo_kernels that the loss asks for by name, or "auto"."""
        return "auto"

    def _of_transitions(self, calls: tuple[int, ...], K: int, states: int, explored: int = 0) -> Workload:
        """The workload of steps that are trained one by one; `explored` ones if more are kept than trained."""
        return Workload(
            generations=self.num_generations,
            calls=calls,
            num_train_steps=K,
            states=states,
            updates=self.optimizer_steps(states),
            old_policy=self._trained_later(states),
            explored_latents=3 * (explored or states) + self.num_generations,  # state, noise, velocity; final ones
            copied_latents=3 * states if explored else 0,
        )

    def _trained_later(self, states: int) -> int:
        """The states that are trained after the first optimizer step, if "exact" needs a forward for them.

        The first step has the most states.
        """
        return states - -(-states // self.optimizer_steps(states)) if self.old_policy == "exact" else 0

    def _check_steps(self, N: int) -> None:
        require(
            bool(self.trainable_steps(N)),
            "algorithm.step_range",
            self.step_range,
            f"leaves no step to train of sampling.num_inference_steps = {N}",
        )
        require(
            self.old_policy != "literal",
            "algorithm.old_policy",
            self.old_policy,
            'is Algorithm 1 of Neighbor GRPO as printed; others have "exact" and "cached"',
        )

    def _check_num_train_steps(self, count: int, N: int) -> None:
        steps = len(self.trainable_steps(N))
        require(
            count <= steps,
            "algorithm.num_train_steps",
            count,
            f"must not exceed the {steps} steps {self._within(N)}",
        )

    def _within(self, N: int) -> str:
        return f"inside algorithm.step_range = {self.step_range} of sampling.num_inference_steps = {N}"


@dataclass(frozen=True, kw_only=True)
class Neighbor(Algorithm):
    """Neighbor GRPO (arXiv 2511.16955)."""

    implementation: ClassVar[str] = "ngrpo_train.algorithms.neighbor:NeighborGRPO"
    explores_by: ClassVar[str] = "sigma"
    rows_are: ClassVar[str] = "the anchors of one step"

    name: str = "neighbor"
    num_anchors: Positive[int] = 4
    """B: candidates per prompt that are trained; the other algorithms train all G."""
    num_train_steps: Positive[int] = 4
    """K: solver steps per prompt that are trained."""
    # All but the last of 8 steps, as in 0.1.0, whose recipes may leave it open. Packaged recipes train the noisy half.
    step_range: Annotated[tuple[float, float], _RISING] = (0.0, 0.875)
    sigma: Fraction[float] = 0.3
    """Strength of the perturbation of the initial noise (Eq. 7), in (0, 1]."""
    p: Annotated[float, _ORDER] = 0.8
    temperature: Annotated[float | Literal["dim", "neighborhood"], _TEMPERATURE] = 1.0
    """Divisor of the squared distances in the leaping policy (Eq. 8).
    A number, "dim" for the latent's dimension, or "neighborhood" for the group's mean squared distance."""
    backend: Literal["auto", "triton", "cpp", "reference"] = "auto"
    """Backend of the loss: Triton on a GPU, C++ on a CPU, or plain PyTorch ("reference") anywhere."""
    explore: Explore = dataclasses.field(default_factory=Explore)

    def check(self, N: int) -> None:
        self.explore.check(self.num_generations)
        self._check_num_train_steps(self.num_train_steps, N)
        require(
            self.num_anchors <= self.num_generations,
            "algorithm.num_anchors",
            self.num_anchors,
            f"must not exceed algorithm.num_generations = {self.num_generations}",
        )
        require(
            self.num_anchors % self.updates_per_iteration == 0,
            "algorithm.updates_per_iteration",
            self.updates_per_iteration,
            f"must divide algorithm.num_anchors = {self.num_anchors}",
        )

    def num_trained_steps(self, N: int) -> int:
        return self.num_train_steps

    def workload(self, N: int, iteration: int = 0) -> Workload:
        G, B, K = self.num_generations, self.num_anchors, self.num_train_steps
        b = B // self.updates_per_iteration
        return Workload(
            generations=G,
            calls=(G,) * N,
            num_train_steps=K,
            states=B * K,
            updates=self.updates_per_iteration,
            old_policy=self._trained_later(B * K),
            explored_latents=K * (2 * B + G) + G,  # anchors' states and velocities, all candidates' next; final ones
            states_per_row=b,
            row_latents=4 * b + G,  # each anchor's state, old and new velocity, gradient; all candidates
            rollout_latents=6,  # noise, states before and after, velocity, what a multistep solver remembers
            coarse_calls=(self.explore.candidates,) * self.explore.num_inference_steps if self.chooses else (),
            coarse_scale=self.explore.scale,
        )

    def cannot_retain(self, N: int) -> str:
        if self.updates_per_iteration > 1:
            return f"algorithm.updates_per_iteration = {self.updates_per_iteration} changes the weights in between"
        return ""

    @property
    def chooses(self) -> bool:
        return bool(self.explore.candidates)

    @property
    def loss_backend(self) -> str:
        return self.backend


@dataclass(frozen=True, kw_only=True)
class Stochastic(Algorithm):
    """Settings that the algorithms with an SDE share.

    Published values are those of the authors' scripts for FLUX.1-dev. Optimizer steps are counted there as samples per
    process divided by gradient accumulation.
    """

    explores_by: ClassVar[str] = "eta"

    eta: Positive[float] = 0.7
    """Strength of the SDE's noise.
    The noise level is eta for dance_grpo and branch_grpo, and eta sqrt(sigma / (1 - sigma)) for the others."""
    advantage_clip: Positive[float] = 5.0
    """Advantages, which are in standard deviations, are clipped to +- this."""

    def trainable_steps(self, N: int) -> range:
        """The steps of `step_range` without the last one, an ODE step: its noise would stay in the picture."""
        steps = super().trainable_steps(N)
        return range(steps.start, min(steps.stop, N - 1))

    def _check_steps(self, N: int) -> None:
        require(
            bool(self.trainable_steps(N)),
            "algorithm.step_range",
            self.step_range,
            f"leaves no step to train of sampling.num_inference_steps = {N}: the last one is the ODE's",
        )
        super()._check_steps(N)


@dataclass(frozen=True, kw_only=True)
class FlowGRPO(Stochastic):
    """Flow-GRPO (arXiv 2505.05470)."""

    implementation: ClassVar[str] = "ngrpo_train.algorithms.flow_grpo:FlowGRPO"

    name: str = "flow_grpo"
    num_generations: Annotated[int, _TWO_OR_MORE] = 24
    num_train_steps: NotNegative[int] = 0
    """K: solver steps per prompt that are trained; 0 takes all random steps."""
    eta: Positive[float] = 0.9
    updates_per_iteration: Positive[int] = 2
    advantage_std: Literal["batch", "group"] = "batch"
    """Standard deviation that a reward is divided by, after its group's mean is subtracted.
    "batch": that over all pictures of the iteration. "group": that over the group, as the other algorithms have it."""

    def check(self, N: int) -> None:
        super().check(N)
        self._check_num_train_steps(self.num_trained_steps(N), N)

    def needs_all_groups(self, N: int) -> str:
        if self.advantage_std == "batch":
            return 'algorithm.advantage_std = "batch" is over the pictures of all prompts'
        return super().needs_all_groups(N)

    def num_trained_steps(self, N: int) -> int:
        return self.num_train_steps or len(self.trainable_steps(N))


@dataclass(frozen=True, kw_only=True)
class DanceGRPO(Stochastic):
    """DanceGRPO (arXiv 2505.07818)."""

    implementation: ClassVar[str] = "ngrpo_train.algorithms.dance_grpo:DanceGRPO"

    name: str = "dance_grpo"
    num_train_steps: NotNegative[int] = 0
    """K: solver steps per prompt that are trained; 0 takes int(0.6 (N - 1)) of N steps."""
    eta: Positive[float] = 0.3
    updates_per_iteration: Positive[int] = 3

    def check(self, N: int) -> None:
        super().check(N)
        self._check_num_train_steps(self.num_trained_steps(N), N)

    def num_trained_steps(self, N: int) -> int:
        return self.num_train_steps or min(len(self.trainable_steps(N)), max(1, int(0.6 * (N - 1))))


@dataclass(frozen=True, kw_only=True)
class MixGRPO(Stochastic):
    """MixGRPO (arXiv 2507.21802)."""

    implementation: ClassVar[str] = "ngrpo_train.algorithms.mix_grpo:MixGRPO"

    name: str = "mix_grpo"
    window_size: Positive[int] = 4
    """Solver steps in the window. These are random and trained; all others are ODE steps."""
    window_every: Positive[int] = 25
    """Iterations between two moves of the window, each by one step, within step_range."""
    window_restarts: bool = True
    """At the end of step_range, start the window anew, as the authors' scripts do; or leave it there."""
    updates_per_iteration: Positive[int] = 4

    def check(self, N: int) -> None:
        super().check(N)
        require(
            self.window_size <= len(self.trainable_steps(N)),
            "algorithm.window_size",
            self.window_size,
            f"must not exceed the {len(self.trainable_steps(N))} random steps {self._within(N)}",
        )

    def num_trained_steps(self, N: int) -> int:
        return self.window_size

    def window(self, N: int, iteration: int) -> range:
        """The random steps: the window starts at the noisy end and moves on, up to the other end."""
        steps, moves = self.trainable_steps(N), iteration // self.window_every
        places = len(steps) - self.window_size + 1
        start = steps.start + (moves % places if self.window_restarts else min(moves, places - 1))
        return range(start, start + self.window_size)


@dataclass(frozen=True, kw_only=True)
class MixGRPOFlash(MixGRPO):
    """MixGRPO-Flash (arXiv 2507.21802): DPM-Solver++ takes fewer steps after the window."""

    implementation: ClassVar[str] = "ngrpo_train.algorithms.mix_grpo:MixGRPOFlash"

    name: str = "mix_grpo_flash"
    window_every: Positive[int] = 20
    window_frozen: bool = False
    """Leave the window where it begins. MixGRPO-Flash* does so, with a compression of 0.2."""
    compression: Fraction[float] = 0.4
    """Points of the schedule from the window's end to the picture, as a share of those without DPM-Solver++.
    Both ends count: of 25 steps, a window of 4 leaves 22 points; 0.4 of them are 8, which is 7 steps."""

    def window(self, N: int, iteration: int) -> range:
        return super().window(N, 0 if self.window_frozen else iteration)

    def steps_after_window(self, N: int, iteration: int) -> int:
        """Solver steps after the window, between `compression` of the points that are left; at least one."""
        points = N - self.window(N, iteration).stop + 1
        return max(1, math.floor(self.compression * points + 1e-9) - 1)  # 0.2 of 20 is 4

    def workload(self, N: int, iteration: int = 0) -> Workload:
        steps = self.window(N, iteration).stop + self.steps_after_window(N, iteration)
        return dataclasses.replace(super().workload(N, iteration), calls=(self.num_generations,) * steps)


@dataclass(frozen=True, kw_only=True)
class BranchGRPO(Stochastic):
    """BranchGRPO (arXiv 2509.06040)."""

    implementation: ClassVar[str] = "ngrpo_train.algorithms.branch_grpo:BranchGRPO"

    name: str = "branch_grpo"
    num_generations: Annotated[int, _TWO_OR_MORE] = 16
    eta: Positive[float] = 0.3
    clip_range: Annotated[float | tuple[float, float], _CLIP] = 1e-3
    updates_per_iteration: NotNegative[int] = 0
    """Optimizer steps per iteration, each on a share of the tree's trained edges.
    0 makes one for every 6 edges of a tree, as the authors' script does: 34 with 20 solver steps."""
    branch_steps: tuple[int, ...] = ()
    """Solver steps at which every branch splits in two: log2(G) steps.
    Empty takes steps that are 0.15 N apart."""
    branch_spread: Positive[float] = 4.0
    """Distance of siblings: their noises correlate by 1 / (1 + branch_spread^2)."""
    width_pruning: Literal["none", "parent_top1", "extremes"] = "none"
    """Leaves that are trained after the last split.
    "none": all. "parent_top1": the better of each pair. "extremes": the best quarter and the worst quarter."""
    depth_pruning: NotNegative[int] = 0
    """Solver steps that are left out of training, at first the last ones.
    Every `depth_pruning_every` iterations they move one step up, as far as the last split."""
    depth_pruning_every: Positive[int] = 30
    """Iterations between two moves of the steps that depth pruning leaves out."""

    def check(self, N: int) -> None:
        self._check_steps(N)
        splits, steps, last = self.splits(N), self.trainable_steps(N), N - 1
        require(
            self.num_generations == 2 ** len(splits),
            "algorithm.num_generations",
            self.num_generations,
            f"must be 2 to the power of the number of algorithm.branch_steps = {splits}",
        )
        require(
            all(a < b for a, b in pairwise(splits)) and splits[0] >= 0 and splits[-1] < last,
            "algorithm.branch_steps",
            splits,
            f"must rise within 0 to {last - 1}: the last of sampling.num_inference_steps = {N} is the ODE's",
        )
        require(
            self.width_pruning != "extremes" or self.num_generations >= 4,
            "algorithm.width_pruning",
            self.width_pruning,
            "needs 4 candidates or more, of which it keeps the best and the worst quarter",
        )
        require(
            splits[0] < steps.stop,
            "algorithm.step_range",
            self.step_range,
            f"must hold a step after the first of algorithm.branch_steps = {splits}: before it there is one branch",
        )
        prunable = len([step for step in steps if step > splits[-1]])
        require(
            self.depth_pruning <= prunable and self.depth_pruning < len(steps),
            "algorithm.depth_pruning",
            self.depth_pruning,
            f"must leave a step to train, and not exceed the {prunable} steps after the last of algorithm.branch_steps",
        )
        edges = self.workload(N).states
        require(
            self.updates_per_iteration <= edges,
            "algorithm.updates_per_iteration",
            self.updates_per_iteration,
            f"must not exceed the {edges} edges of the tree that are trained",
        )

    def splits(self, N: int) -> tuple[int, ...]:
        """Solver steps at which the tree splits; by default as its authors have them, 0, 3, 6, 9 of 20."""
        if self.branch_steps:
            return self.branch_steps
        count = int(math.log2(self.num_generations))
        return tuple(max(i, 3 * i * N // 20) for i in range(count))  # one after the other where N is small

    def branches(self, N: int, step: int) -> int:
        """The tree's edges through a solver step."""
        return int(2 ** sum(split <= step for split in self.splits(N)))

    def tree_steps(self, N: int, iteration: int) -> tuple[int, ...]:
        """The solver steps that are trained in that iteration.

        These are the trainable steps from the first split on, because branches differ there, without those that depth
        pruning leaves out.
        """
        splits, steps = self.splits(N), self.trainable_steps(N)
        steps = range(max(steps.start, splits[0]), steps.stop)
        start = steps.stop - self.depth_pruning - iteration // self.depth_pruning_every
        start = max(start, min(splits[-1] + 1, steps.stop - self.depth_pruning))
        return tuple(step for step in steps if not start <= step < start + self.depth_pruning)

    def num_trained_steps(self, N: int) -> int:
        return len(self.tree_steps(N, 0))

    def optimizer_steps(self, states: int) -> int:
        return self.updates_per_iteration or -(-states // _EDGES_PER_UPDATE)

    def workload(self, N: int, iteration: int = 0) -> Workload:
        trained, last = self.tree_steps(N, iteration), self.splits(N)[-1]
        pruned = self.width_pruning != "none"
        edges = {step: self.branches(N, step) for step in trained}
        return self._of_transitions(
            calls=(1, *(self.branches(N, step) for step in range(N - 1))),  # a branch splits behind its step's forward
            K=len(trained),
            states=sum(count // 2 if pruned and step > last else count for step, count in edges.items()),
            explored=sum(edges.values()) if pruned else 0,  # width pruning asks for the rewards of all
        )


ALGORITHMS: dict[str, type[Algorithm]] = {
    kind().name: kind for kind in (Neighbor, FlowGRPO, DanceGRPO, MixGRPO, MixGRPOFlash, BranchGRPO)
}
"""The algorithms of ngrpo, by name."""


def settings_class(name: str) -> type[Algorithm]:
    """The class of an algorithm's settings, by its name. Raises ValueError for an algorithm that does not exist."""
    if ":" in name:
        kind = getattr(import_named("algorithm.name", name), "Settings", None)
        if not (isinstance(kind, type) and issubclass(kind, Algorithm)):
            raise ValueError(
                f"algorithm.name = {name!r} must name a class whose Settings is a dataclass, a subclass of "
                "ngrpo_train.recipe.algorithms.Algorithm"
            )
        return kind
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, n=1)
        close = f"; did you mean {near[0]}?" if near else ""
        known = ", ".join(ALGORITHMS)
        raise ValueError(f"algorithm.name = {name!r} must be one of {known}, or package.module:Name{close}")
    return ALGORITHMS[name]


def implementation(settings: Algorithm) -> Any:
    """The class that trains by these settings. Raises ValueError where it cannot be imported."""
    return import_named("algorithm.name", settings.name if ":" in settings.name else settings.implementation)


def field_names(kind: type[Algorithm]) -> set[str]:
    """The fields that an algorithm has."""
    return {field.name for field in dataclasses.fields(kind)}


def refuse_foreign(name: str, given: Iterable[str]) -> None:
    """Raise ValueError for a field that is a setting of other algorithms, but not of the algorithm `name`.

    The parser refuses a field that no algorithm has, and says which one is near it.
    """
    own = field_names(settings_class(name))
    for field_name in given:
        owners = [other for other, kind in ALGORITHMS.items() if field_name in field_names(kind)]
        if owners and field_name not in own:
            text = "every other one" if len(owners) == len(ALGORITHMS) - 1 else ", ".join(owners)
            raise ValueError(f"algorithm.{field_name} is a setting of {text}, not of algorithm.name = {name!r}")


def carried_over(algorithm: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Settings of an [algorithm] section that still hold where another algorithm takes its place.

    Left out are fields that the other algorithm lacks, and fields for which each algorithm has its own published value.
    `step_range` stays: the model decides which steps can be trained.
    """
    kind = settings_class(name)
    shared = field_names(kind) - _published(kind) | {"step_range"}
    return {key: value for key, value in algorithm.items() if key in shared}


def _published(kind: type[Algorithm]) -> set[str]:
    """The fields whose defaults differ between the algorithms that have them."""
    defaults: dict[str, set[Any]] = {}
    for each in {*ALGORITHMS.values(), kind}:
        for field in dataclasses.fields(each):
            defaults.setdefault(field.name, set()).add(field.default)
    return {name for name, values in defaults.items() if len(values) > 1}
