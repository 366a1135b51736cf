"""Prompts: a source is read into a list, and a cursor deals the list out to ranks and can resume."""

from ngrpo_train.prompts.cursor import PromptCursor, prompts_per_iteration
from ngrpo_train.prompts.prompt import Prompt
from ngrpo_train.prompts.sources import load_prompts

__all__ = ["Prompt", "PromptCursor", "load_prompts", "prompts_per_iteration"]
