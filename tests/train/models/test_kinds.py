"""Blocks by kind: one of each is computed, and nothing else of a model is changed by it."""

import diffusers
import pytest
import torch
from torch import Tensor, nn

from ngrpo_train.models.kinds import each_kind_once


class Text(nn.Module):
    """Blocks of two widths, over as many tokens as a mask says."""

    _repeated_blocks = ("Sequential",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4)) for width in (8, 8, 2, 8))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        longest = max(mask.sum(dim=1).tolist())
        x = x[:, :longest]
        for block in self.blocks:
            x = block(x)
        return x


def test_one_of_each_kind_is_computed() -> None:
    with torch.device("meta"):
        text, x, mask = Text(), torch.ones(2, 7, 4), torch.ones(2, 5, dtype=torch.bool)
    computed: list[int] = []
    for number, block in enumerate(text.blocks):
        block[0].register_forward_hook(lambda *_, number=number: computed.append(number))
    with each_kind_once(text):
        y = text(x, mask)
    assert computed == [0, 2]
    assert (y.shape, y.requires_grad) == ((2, 5, 4), True), "masks are full where they have no values"
    assert "forward" not in vars(text.blocks[0])
    with pytest.raises(NotImplementedError):
        text(x, mask)


def test_a_mask_with_values_keeps_them() -> None:
    text, mask = Text(), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    with each_kind_once(text):
        assert text(torch.ones(2, 4, 4), mask).shape == (2, 3, 4)


def test_results_are_of_the_sizes_of_the_model_itself() -> None:
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(
            num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 6, 6)
        )
        given = {
            "hidden_states": torch.ones(3, 16, 64),
            "encoder_hidden_states": torch.ones(3, 5, 4096),
            "pooled_projections": torch.ones(3, 768),
            "timestep": torch.ones(3),
            "img_ids": torch.ones(16, 3),
            "txt_ids": torch.ones(5, 3),
        }
    with torch.no_grad():
        whole = model(**given).sample
        with each_kind_once(model):
            once = model(**given).sample
    assert (once.shape, once.dtype, once.requires_grad) == (whole.shape, whole.dtype, False)
