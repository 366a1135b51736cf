"""Scorers: callables from pictures and prompts to numbers, and the set of them that a recipe names.

A scorer is a callable as the module `scorer` describes it. Its images are bytes on the run's device. So a picture has
the same score in training, behind a server and from a file. Most scorers score pictures; a video's score by them is the
mean over some of its frames.
"""

# R rewards, P prompts (of all ranks where the text says so), G candidates, N pictures or videos, f frames of each.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ngrpo_train.parallel import processes
from ngrpo_train.parallel.sending import sent
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.named import import_named
from ngrpo_train.recipe.parsing import suggestion
from ngrpo_train.recipe.sections import Frames, Reward
from ngrpo_train.rewards import shipped, threads
from ngrpo_train.rewards.frames import are_pictures, chosen_frames, dtype_and_shape
from ngrpo_train.rewards.scorer import RewardError, Scorer, takes_rows, takes_videos

__all__ = [
    "RewardError",
    "Rewards",
    "Scorer",
    "Scores",
    "find_scorer",
    "refuse_non_finite",
]


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of all ranks' groups, on the CPU, and the names of the rewards that the policy is trained on."""

    names: tuple[str, ...]
    trained: tuple[str, ...]
    """Those of `names` that the policy is trained on, in the same order."""
    weights: tuple[float, ...]
    """Weights of the trained rewards, one for each."""
    all_RPG: Tensor
    """Float32, ranks in order along P."""

    @staticmethod
    def joined(parts: Sequence[Scores]) -> Scores:
        """The scores of all prompts from those of parts of them, in which every rank has an equal share."""
        return replace(parts[0], all_RPG=processes.joined_by_rank([part.all_RPG for part in parts], dim=1))

    @property
    def local_RPG(self) -> Tensor:
        """The groups of this rank."""
        return self.all_RPG.chunk(processes.world_size(), dim=1)[processes.rank()]

    @property
    def trained_RPG(self) -> Tensor:
        """The trained rewards alone."""
        return self.all_RPG[[self.names.index(name) for name in self.trained]]

    def combined(self, how: Literal["standardized", "raw_sum"]) -> tuple[Tensor, tuple[float, ...]]:
        """The rewards [R, P, G] that advantages are made of, and their weights; each reward is standardised on its own.

        With `how` = "standardized", each trained reward counts by its weight, whatever its spread. With "raw_sum", the
        rewards are summed into one, [1, P, G], and a reward of wide spread outweighs the others.
        """
        if how == "standardized":
            return self.trained_RPG, self.weights
        return torch.einsum("rpg,r->pg", self.trained_RPG, torch.tensor(self.weights))[None], (1.0,)


class Rewards:
    """The scorers of a recipe, in its order."""

    def __init__(self, settings: Mapping[str, Reward], device: torch.device | None = None) -> None:
        """Load the scorers onto `device`. Raises ValueError, naming the reward, for a missing scorer or weights."""
        device = device or torch.device("cpu")
        self.names = tuple(settings)
        self.in_training = tuple(name for name, reward in settings.items() if not reward.watch_only)
        self.trained = tuple(name for name, reward in settings.items() if reward.is_trained)
        self.weights = tuple(settings[name].weight for name in self.trained)
        self.scorers = {name: find_scorer(name, reward, device) for name, reward in settings.items()}
        self.with_rows = frozenset(name for name, scorer in self.scorers.items() if takes_rows(scorer))
        self.with_videos = frozenset(name for name, scorer in self.scorers.items() if takes_videos(scorer))
        self._frames = {name: _frames_of(name, reward, name in self.with_videos) for name, reward in settings.items()}
        relative = {name for name, reward in settings.items() if (ours := _shipped(name, reward)) and ours.relative}
        self.relative = tuple(name for name in self.names if name in relative)
        self.evaluated = tuple(name for name in self.names if name not in relative)
        self._checks = {name: _check_of(name, reward, self.scorers[name]) for name, reward in settings.items()}
        # Answers from other machines are awaited together, while this machine computes its own scores.
        self._elsewhere = [name for name, reward in settings.items() if reward.remote]
        self.running: set[str] = set()  # names of the scorers that compute now; a scorer that hangs stays here

    def check(self, prompts: Sequence[Prompt], field: str, names: Sequence[str] | None = None) -> None:
        """Raise ValueError where a reward cannot score a prompt, as its check says; without `names`, in an evaluation.

        The message names the reward, the prompt, the recipe's `field` that it comes from, and the reason.
        """
        names = self.evaluated if names is None else names
        if prompts and not names:
            raise ValueError(
                f"rewards.{self.relative[0]} compares the pictures of a prompt with each other, so its mean is 1/2 for "
                f"every model: name another reward for {field}"
            )
        for name in names:
            refused = [(prompt, why) for prompt in prompts if (why := _refusal(self._checks[name], prompt))]
            if refused:
                first, why = refused[0]
                others = f" and {len(refused) - 1} more of {len(prompts)}" if len(refused) > 1 else ""
                raise ValueError(f"rewards.{name} cannot score {first}{others} of {field}: {why}")

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt], names: Sequence[str] | None = None) -> Tensor:
        """Scores of N samples for their N prompts, by all rewards or by those of `names`: float32 [R, N].

        `images` are what the model decodes to: uint8 pictures [N, 3, H, W], videos [N, F, 3, H, W], or anything that
        the scorers take. Scores are on their device. Raises RewardError, naming the reward, where a scorer fails or
        does not take such samples.
        """
        return self._started(images, prompts, self.names if names is None else names)()

    def _started(self, images: Tensor, prompts: Sequence[Prompt], names: Sequence[str]) -> Callable[[], Tensor]:
        """Begin to score; the result waits for what other machines compute, and gives scores as `score` does."""
        images = images.contiguous()  # a channels_last picture would be summed in another order, and rounded otherwise
        elsewhere = [name for name in names if name in self._elsewhere]
        asked = [partial(self._score_with, name, self._shown(name, images).cpu(), prompts) for name in elsewhere]
        pending = threads.start(asked, at_once=len(asked))
        computed = {
            name: self._score_with(name, self._shown(name, images), prompts) for name in names if name not in elsewhere
        }
        device = images.device  # alone: pictures may be gone when the answers come

        def scores() -> Tensor:
            answers = (sent(answer, device) for answer in threads.results(pending))
            answered = dict(zip(elsewhere, answers, strict=True))
            return torch.stack([(computed | answered)[name] for name in names])

        return scores

    def _shown(self, name: str, images: Tensor) -> Tensor:
        """What a scorer sees of N samples: for a scorer of pictures, frames [N, f, 3, H, W]; for others, all."""
        if name in self.with_videos:
            return images
        if not are_pictures(images):
            raise RewardError(
                f"rewards.{name} scores pictures and frames of videos, uint8 [..., 3, H, W], and the model decodes to "
                f"{dtype_and_shape(images)}: name a scorer of your own that has takes_videos = True"
            )
        return chosen_frames(images, self._frames[name])

    def _score_with(self, name: str, shown: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Float32 [N] on the device of `shown`, for what `_shown` gives. Raises RewardError, naming the reward."""
        self.running.add(name)
        try:
            return self._scores(name, shown, prompts)
        except RewardError:  # names what is wrong already
            raise
        except Exception as error:
            samples = _described(shown, prompts)
            if name in self.with_rows and name not in self._elsewhere:
                samples = self._culprit(name, shown, prompts) or samples
            raise RewardError(f"rewards.{name} failed on {samples}: {type(error).__name__}: {error}") from error
        finally:
            self.running.discard(name)

    def _scores(self, name: str, shown: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if name in self.with_videos:
            return self._asked(name, shown, prompts)
        if name in self.relative:  # the pictures of one call are compared: a frame with the others' frames of its place
            of_frames = [self._asked(name, images, prompts) for images in shown.transpose(0, 1).contiguous()]
            return torch.stack(of_frames).mean(0)
        frames = shown.shape[1]
        each = [prompt for prompt in prompts for _ in range(frames)]
        return self._asked(name, shown.flatten(0, 1), each).view(-1, frames).mean(1)

    def _asked(self, name: str, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        texts, scorer = [prompt.text for prompt in prompts], self.scorers[name]
        rows = ([prompt.row for prompt in prompts],) if name in self.with_rows else ()
        scores = torch.as_tensor(scorer(images, texts, *rows), device=images.device, dtype=torch.float32)
        if scores.shape != (len(prompts),):
            samples = _described(images, prompts)
            raise RewardError(f"rewards.{name} returned a tensor of shape {list(scores.shape)} for {samples}")
        return scores

    def _culprit(self, name: str, shown: Tensor, prompts: Sequence[Prompt]) -> str:
        """The first prompt on which a scorer that takes rows fails alone, with the fields of its row; else ""."""
        for one, prompt in zip(shown.split(1), prompts, strict=True):
            try:
                self._scores(name, one, [prompt])
            except Exception:
                fields = ", ".join(prompt.row)
                return f"{prompt}, {f'whose row has {fields}' if fields else 'with no fields'}"
        return ""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score P groups, prompt-major [P * G, ...], and share the scores with all ranks: one copy to the host."""
        return self.start(images, prompts)()

    def of_coarse(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score P groups of coarse pictures as `__call__` does, by the rewards alone that are trained on."""
        return self.start(images, prompts, self.trained)()

    @torch.no_grad()
    def start(
        self, images: Tensor, prompts: Sequence[Prompt], names: Sequence[str] | None = None
    ) -> Callable[[], Scores]:
        """Begin to score P groups, by the rewards of training or by those of `names`, in the recipe's order.

        The result waits for the scores, and is then a collective.
        """
        names = self.in_training if names is None else tuple(names)
        each = [prompt for prompt in prompts for _ in range(len(images) // len(prompts))]
        started = self._started(images, each, names)

        def shared() -> Scores:
            scores_RPG = started().view(len(names), len(prompts), -1)
            all_RPG = torch.cat(list(processes.all_gather(scores_RPG)), dim=1).cpu()
            scores = Scores(names, self.trained, self.weights, all_RPG)
            refuse_non_finite(names, scores.local_RPG.flatten(1), each)
            if not scores.all_RPG.isfinite().all():
                raise RewardError("a reward was not finite on another rank, which names it")
            return scores

        return shared

    @property
    def waits_for_others(self) -> bool:
        """True where training waits for rewards that other machines compute."""
        return not set(self._elsewhere).isdisjoint(self.in_training)


def refuse_non_finite(names: Sequence[str], scores_RN: Tensor, prompts: Sequence[Prompt]) -> None:
    """Raise RewardError, naming reward and prompt, if a score (on the CPU) is NaN or infinite."""
    for reward, picture in (~scores_RN.isfinite()).nonzero().tolist():
        value = scores_RN[reward, picture].item()
        raise RewardError(f"rewards.{names[reward]} = {value} for the prompt {prompts[picture]}")


def _described(shown: Tensor, prompts: Sequence[Prompt]) -> str:
    kinds = {4: "pictures", 5: "videos" if shown.shape[1] > 1 else "pictures"}
    return f"{len(prompts)} {kinds.get(shown.dim(), 'samples')}, the first for {prompts[0]}"


def _frames_of(name: str, reward: Reward, whole: bool) -> Frames:
    """The frames that a scorer is shown. Raises ValueError where they are set for one that takes videos `whole`."""
    if whole and reward.frames != Reward().frames:
        raise ValueError(
            f"rewards.{name}.frames = {reward.frames!r} is for scorers of pictures, and this one takes whole videos: "
            "leave it out"
        )
    return reward.frames


def _shipped(name: str, reward: Reward) -> shipped.Shipped | None:
    """The shipped reward that a recipe's [rewards.NAME] is; None for a scorer of a user's own."""
    return None if reward.is_callable else shipped.of(name, reward)


def _check_of(name: str, reward: Reward, scorer: Scorer) -> Callable[[str, Mapping[str, Any]], object] | None:
    """What raises ValueError for a text and its row that a reward cannot score; None where all can be scored."""
    ours = _shipped(name, reward)
    return (ours and ours.check) or getattr(scorer, "check", None)


def _refusal(check: Callable[[str, Mapping[str, Any]], object] | None, prompt: Prompt) -> str:
    """The reason why a check refuses a prompt; empty if it does not."""
    try:
        if check is not None:
            check(prompt.text, prompt.row)
    except ValueError as error:
        return str(error)
    return ""


def find_scorer(name: str, reward: Reward, device: torch.device) -> Scorer:
    """The scorer that a recipe's [rewards.NAME] means. Raises ValueError, naming the reward, if it does not exist."""
    if reward.is_callable and not reward.remote:
        if reward.kind:
            raise ValueError(f"rewards.{name}.kind = {reward.kind!r} does not go with path = {reward.path!r}, your own")
        scorer: Scorer = import_named(f"rewards.{name}.path", reward.path)
        return scorer
    try:
        return _loader(name, reward)(name, reward, device)
    except ValueError as error:
        raise ValueError(f"rewards.{name}: {error}") from error


def _loader(name: str, reward: Reward) -> Callable[[str, Reward, torch.device], Scorer]:
    ours = shipped.of(name, reward)
    if reward.kind and ours is None:
        raise ValueError(f"kind = {reward.kind!r} is no reward that ships{_shipped_near(reward.kind)}")
    asks_a_server = ours is not None and ours.asks_a_server
    if reward.template and not asks_a_server:
        from ngrpo_train.rewards import vision_judge

        return vision_judge.load
    if reward.remote and not asks_a_server:
        from ngrpo_train.rewards import remote

        return remote.load
    if ours is None:
        raise ValueError(
            f"no reward of that name{_shipped_near(name)}, or set rewards.{name}.path = 'package.module:callable'"
        )
    return ours.load


def _shipped_near(name: str) -> str:
    return f"{suggestion(name, shipped.NAMES)}; there are {', '.join(shipped.NAMES)}"
