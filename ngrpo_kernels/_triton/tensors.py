"""Preparation of tensors for kernels, which take any strides of prompts and rows, but elements of D side by side."""

from typing import TypeVar

import torch
import triton.language as tl
from torch import Tensor

Given = TypeVar("Given", Tensor, Tensor | None)


def rows(tensor: Given) -> Given:
    """The tensor [P, rows, D] as kernels read it: copied if the elements of a row are not side by side."""
    return tensor if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def strides(tensor: Tensor | None) -> tuple[int, int]:
    """Strides of the first two dimensions."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def accumulator(dtype: torch.dtype) -> tuple[tl.dtype, float]:
    """The dtype in which kernels add, and its rounding."""
    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype], torch.finfo(dtype).eps
