"""The import of what is not ours: a recipe names a scorer, an algorithm or a model as "package.module:Name"."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def import_named(field: str, value: str, form: str = "package.module:Name") -> Callable[..., Any]:
    """Import the class or function that `value`, a "package.module:Name", stands for.

    A module in the current directory is found too, behind all that is installed: `python -m ngrpo_train` looks there by
    itself, and the `ngrpo` command does not.

    Raises ValueError, naming the recipe's `field` and the value, where the value has not that form (`form` is what the
    field may be, in words), where the module is missing or raises while it is imported, where it has no such attribute,
    and where the attribute is not callable.
    """
    module, _, attribute = value.partition(":")
    if not (module and attribute):
        raise ValueError(f"{field} = {value!r} must be {form}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # the module is a user's: it may raise anything
        raise ValueError(f"{field} = {value!r}: {_reason(module, error)}") from error
    if found is None:
        raise ValueError(f"{field} = {value!r}: module {module!r} has no attribute {attribute!r}")
    if not callable(found):
        raise ValueError(f"{field} = {value!r} is not callable")
    return found


def _reason(module: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return f"{error}: install it, or add its directory to PYTHONPATH"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if "importlib" not in frame.filename]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""  # a SyntaxError says its own
    return f"importing {module} raised {type(error).__name__}: {error}{place}"
