"""The adapter of any flow pipeline of diffusers: the pipeline itself says how its model is encoded, called and decoded.

`driven` has the idea. Here are the model's parts: what is loaded, what a recipe's [sampling] means as arguments of the
pipeline's call, and what is written.
"""

# N pictures, P prompts, S the dimensions of a latent.

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ngrpo_train.models import saving
from ngrpo_train.models.blocks_of import repeated_blocks
from ngrpo_train.models.driven import Driven
from ngrpo_train.models.encoders import frozen_dtype
from ngrpo_train.models.index import Index
from ngrpo_train.models.loading import absent_of, fill, find_directory, find_transformer, meta_transformer, quiet_diffusers
from ngrpo_train.models.placement import Placed
from ngrpo_train.models.recorded import Recorded
from ngrpo_train.parallel import processes
from ngrpo_train.parallel.blocks import compile_whole
from ngrpo_train.parallel.layout import compiles
from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.picture_files import IMAGE, MASK, prepared_picture
from ngrpo_train.recipe.sections import Model, Parallel, Sampling

logger = logging.getLogger(__name__)

_PICTURES = {IMAGE: "image", MASK: "mask_image"}  # fields of a prompt's row, and arguments of a pipeline's call
