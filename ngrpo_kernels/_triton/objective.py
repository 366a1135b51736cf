"""The loss and its gradient's weights from one pass over the latents (Eqs. 3, 8 to 11).

The programs of a first launch share out D and write partial sums; those of a second add them in a fixed order and do
the algebra on [B, G]. Nothing is atomic, so results are the same to the bit every time.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).

from torch import Tensor

from ngrpo_kernels import _tiles
from ngrpo_kernels._library import alloc_objective
from ngrpo_kernels._triton.finish import finish_kernel
from ngrpo_kernels._triton.sums import sums_kernel
from ngrpo_kernels._triton.tensors import accumulator, rows, strides
from ngrpo_kernels.reference import Points, Settings


def launch_objective(points: Points, settings: Settings) -> tuple[Tensor, ...]:
    outputs = alloc_objective(points, settings)
    prompts, anchors, dim = points.moving.shape
    group, shifts = points.candidates.shape[1], points.candidates.shape[1] // 2
    moving, old, latents, candidates = (
        rows(points.moving),
        rows(points.old),
        rows(points.latents),
        rows(points.candidates),
    )
    slope, anchor_index = points.slope.contiguous(), points.anchor_index.contiguous()
    values = points.advantages, points.rewards, points.mask
    acc, eps = accumulator(slope.dtype)
    shared = {"LITERAL": points.literal, "B": anchors, "G": group, "ACC": acc}

    tile = _tiles.sums_tile(prompts, anchors, group, dim, shifts)
    sums = slope.new_empty(prompts, tile.chunks, 2 * anchors + shifts, group)
    sums_kernel[tile.parts, tile.chunks, prompts](
        moving,
        old,
        latents,
        slope,
        candidates,
        anchor_index,
        sums,
        *strides(moving),
        *strides(old),
        *strides(latents),
        *strides(candidates),
        dim,
        tile.chunk,
        BLOCK_B=tile.block_b,
        ROWS=tile.rows,
        BLOCK_S=tile.block_s,
        BLOCK_D=tile.block_d,
        WHOLE=dim % tile.block_d == 0,
        WARPS=_tiles.WARPS,
        **shared,
        num_warps=_tiles.WARPS,
    )
    finish = _tiles.finish_tile(anchors, group, sums.element_size())
    finish_kernel[_tiles.ceil_div(anchors, finish.block_b), prompts](
        sums,
        slope,
        anchor_index,
        *values,
        *outputs,
        *(stride for value in values for stride in strides(value)),
        prompts,
        tile.chunks,
        settings.p,
        settings.ratio_low,
        settings.ratio_high,
        0.0 if settings.temperature is None else settings.temperature,
        settings.kl_coef,
        HAS_OLD=old is not None,
        HAS_LATENTS=latents is not None,
        NEIGHBORHOOD=settings.temperature is None,
        BLOCK_B=finish.block_b,
        BLOCK_G=finish.block_g,
        BLOCK_C=finish.block_c,
        BLOCK_N=finish.block_n,
        BLOCK_M=finish.block_m,
        STAGES=finish.stages,
        EPS=eps,
        **shared,
        num_warps=_tiles.FINISH_WARPS,
    )
    return outputs
