"""A tiny Mask2Former with random weights, by transformers' own class for segmentation, as its files on the hub are."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Mask2FormerConfig, SwinConfig
from transformers.models.mask2former import modeling_mask2former


def detector_config(classes: int = 80) -> Mask2FormerConfig:
    backbone = SwinConfig(
        embed_dim=16,
        depths=[1, 1, 2, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    widths = ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward")
    return Mask2FormerConfig(
        backbone_config=backbone,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        num_queries=10,
        num_labels=classes,
        **dict.fromkeys(widths, 32),
    )


def save_detector(directory: Path, monkeypatch, classes: int = 80) -> nn.Module:
    """The model whose files are then in `directory`, with what files of 2022 have besides.

    Its classes are certain, so that objects are found, and its masks are spots that depend on the picture.
    """
    # Its losses, which are not used here, ask for scipy.
    monkeypatch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = modeling_mask2former.Mask2FormerForUniversalSegmentation(detector_config(classes)).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.class_predictor.weight.data *= 40
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    state = load_file(file)
    tables = [name for name in state if name.endswith("relative_position_bias_table")]
    state |= {name.replace("bias_table", "index"): torch.zeros(16, 16, dtype=torch.long) for name in tables}
    save_file(state, file, {"format": "pt"})
    return model
