"""Our scorers against the official packages, on the same random weights: see docs/rewards-official.md."""

from importlib.metadata import PackageNotFoundError, version

import torch


def _declare_torchvision_operators() -> None:
    """Let a CUDA build of torchvision be imported beside a CPU build of torch: nothing here calls these two."""
    try:
        built_for = version("torchvision").partition("+")[2]
    except PackageNotFoundError:
        return
    if torch.version.cuda is None and built_for != "cpu":
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declare_torchvision_operators()
