"""Where prompts come from: a source read into a list, and a cursor that deals it out to ranks and can resume."""

from ngrpo_train.prompts.cursor import Prompt, PromptCursor, prompts_per_iteration
from ngrpo_train.prompts.files import TaggedPrompt
from ngrpo_train.prompts.sources import load_prompts, load_tagged

__all__ = ["Prompt", "PromptCursor", "TaggedPrompt", "load_prompts", "load_tagged", "prompts_per_iteration"]
