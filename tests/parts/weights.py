"""Weights of models that are as sensitive as trained ones."""

from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def lively(model: Module) -> Module:
    """`model` with large random matrices, from torch's global generator, ready for use.

    A fresh model is nearly blind to time, guidance and text, whose projections begin small; and diffusers leaves some
    tokens of padding uninitialised, which are matrices too.
    """
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    return model.eval()
