"""Work that libraries do again and again, and that tests have them do once. What it gives is the same."""

import functools
from typing import Any


def interpreter() -> None:
    """Let Triton's interpreter prepare itself once for each module of functions that kernels call.

    Whenever one kernel's function calls another, it looks through all of triton.language for what it must replace, and
    finds it replaced: 40 % of the time of a loss.
    """
    from triton.runtime import interpreter

    call, prepared = interpreter.InterpretedFunction.__call__, set[int]()

    def prepared_once(self: Any, *arguments: Any, **named: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in prepared:
            prepared.add(module)
            return call(self, *arguments, **named)
        try:
            return self.rewrite()(*arguments, **named)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = prepared_once


def parser() -> None:
    """Let the parser of flags read the source of each class once: for each command, that is 40 % of its time."""
    from tyro import _docstrings

    read = _docstrings._ClassTokenization
    read.make = staticmethod(functools.cache(read.make))  # type: ignore[method-assign]
