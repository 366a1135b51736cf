"""Settings of coarse exploration: many candidates are drawn cheaply, and a group of them is drawn again exactly."""

# C candidates, G of them kept.

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ngrpo_train.recipe.ranges import NotNegative, Positive, Range, require

_SCALE = Range("must be 1, 0.5 or 0.25", lambda value: value in (1, 0.5, 0.25))


# No slots: as the settings of algorithms, of which this is a part.
@dataclass(frozen=True, kw_only=True)
class Explore:
    """Many candidates are drawn coarsely and scored; a group of them is drawn again exactly, and trained on."""

    candidates: NotNegative[int] = 0
    """C: candidates per prompt that are drawn coarsely; the num_generations best, worst and middle ones are kept.
    0 is off: all candidates are drawn exactly."""
    num_inference_steps: Positive[int] = 4
    """Solver steps of a coarse picture."""
    scale: Annotated[float, _SCALE] = 1.0
    """Height and width of a coarse picture, as a part of the picture's: 1, 0.5 or 0.25.
    Its noise is the whole picture's, averaged over blocks. Latents must have a height and a width, as FLUX.1's do."""
    middle: NotNegative[int] = 0
    """Candidates of the group that are kept from the ranks between the best and the worst, evenly spread.
    The rest are one half the best, the other half the worst; the best have one more of an odd number."""

    def check(self, G: int) -> None:
        """Raise ValueError, naming the field, for settings that cannot choose a group of G candidates."""
        if not self.candidates:
            return
        require(
            self.candidates > G,
            "algorithm.explore.candidates",
            self.candidates,
            f"must be more than algorithm.num_generations = {G}, which are kept of them, or 0",
        )
        require(
            self.middle <= G - 2,
            "algorithm.explore.middle",
            self.middle,
            f"must leave the best and the worst of algorithm.num_generations = {G}: at most {G - 2}",
        )
