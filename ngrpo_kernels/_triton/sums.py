"""First kernel of the loss: everything that it needs from the latents, summed over D in one pass (Eqs. 8, 10)."""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).
#
# x_i candidate; x_j the anchor's own candidate; y_i = x_i - x_j; a the old policy's point; delta = x_theta - a.
# Sums of a row and chunk of D, [2 B + S, G]: rows 2 b are <y_i, a - x_j>; rows 2 b + 1 are <y_i, delta>, without the
# factor dt where delta is dt times a difference of velocities; rows 2 B + s are |x_i - x_k|^2, k = (i + s + 1) mod G,
# which are all pairs with S = floor(G / 2).

import triton
import triton.language as tl


@triton.jit
def sums_kernel(
    moving_ptr,
    old_ptr,
    latents_ptr,
    slope_ptr,
    candidates_ptr,
    index_ptr,
    sums_ptr,
    moving_stride_p,
    moving_stride_b,
    old_stride_p,
    old_stride_b,
    latents_stride_p,
    latents_stride_b,
    candidates_stride_p,
    candidates_stride_g,
    D,
    CHUNK,
    LITERAL: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,  # D is whole blocks
    ACC: tl.constexpr,
):
    # The parts of a chunk come one after the other, so that the second finds the candidates in the cache.
    part, chunk, p = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    BLOCKS_G: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    SHIFTS: tl.constexpr = G // 2
    g = part % BLOCKS_G * BLOCK_G + tl.arange(0, BLOCK_G)
    first_b, first_s = part // BLOCKS_G * BLOCK_B, part // BLOCKS_G * BLOCK_S

    adds_pairs = True if B <= BLOCK_B else first_s < SHIFTS  # not again for every further block of anchors

    candidates_ptr += p * candidates_stride_p
    own_rows = ()
    slopes = ()
    for k in tl.static_range(BLOCK_B):
        at = p * B + tl.minimum(first_b + k, B - 1)
        j = tl.load(index_ptr + at)
        own_rows += (candidates_ptr + tl.minimum(tl.maximum(j, 0), G - 1) * candidates_stride_g,)
        slopes += (tl.load(slope_ptr + at),)
    x_rows = candidates_ptr + (g % G).to(tl.int64)[:, None] * candidates_stride_g  # [BLOCK_G, 1], no row to mask

    toward = (tl.zeros([BLOCK_G, BLOCK_D], ACC),) * BLOCK_B
    along = (tl.zeros([BLOCK_G, BLOCK_D], ACC),) * BLOCK_B
    apart = (tl.zeros([BLOCK_G, BLOCK_D // 4], ACC),) * BLOCK_S
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, D), BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        inside = None if WHOLE else d < D
        other = None if WHOLE else 0.0
        x = tl.load(x_rows + d, inside, other).to(ACC)  # [BLOCK_G, BLOCK_D]

        sums_toward = ()
        sums_along = ()
        for k in tl.static_range(BLOCK_B):
            b = tl.minimum(first_b + k, B - 1).to(tl.int64)
            own = tl.load(own_rows[k] + d, inside, other).to(ACC)  # [1, BLOCK_D]
            moving = tl.load(moving_ptr + p * moving_stride_p + b * moving_stride_b + d, inside, other).to(ACC)
            y = x - own
            # Two states of one trajectory, latents and x_j, are subtracted first, and delta comes from velocities.
            if latents_ptr is None:
                base = -own
            else:
                latents = tl.load(latents_ptr + p * latents_stride_p + b * latents_stride_b + d, inside, other)
                base = latents.to(ACC) - own
            if LITERAL:
                sums_toward += (toward[k],)
                sums_along += (along[k] + y * (base + slopes[k] * moving),)
            elif old_ptr is None:
                sums_toward += (toward[k] + y * (base + slopes[k] * moving),)
                sums_along += (along[k],)
            else:
                old = tl.load(old_ptr + p * old_stride_p + b * old_stride_b + d, inside, other).to(ACC)
                sums_toward += (toward[k] + y * (base + slopes[k] * old),)
                sums_along += (along[k] + y * (moving - old),)
        toward, along = sums_toward, sums_along

        if adds_pairs:
            sums_apart = ()
            for k in tl.static_range(BLOCK_S):
                partner = ((g + first_s + k + 1) % G).to(tl.int64)[:, None]
                difference = x - tl.load(candidates_ptr + partner * candidates_stride_g + d, inside, other).to(ACC)
                # Neighbours, which one thread holds, are added at once: that saves three registers of four.
                square = tl.reshape(difference * difference, [BLOCK_G, BLOCK_D // 4, 4])
                sums_apart += (apart[k] + tl.sum(square, axis=2),)
            apart = sums_apart

    sums_ptr += (p * tl.num_programs(1) + chunk) * ((2 * B + SHIFTS) * G) + g
    for k in tl.static_range(BLOCK_B):
        mask = g < tl.where(first_b + k < B, G, 0)
        if not LITERAL:
            tl.store(sums_ptr + 2 * (first_b + k) * G, tl.sum(toward[k], axis=1), mask)
        if LITERAL or old_ptr is not None:
            tl.store(sums_ptr + (2 * (first_b + k) + 1) * G, tl.sum(along[k], axis=1), mask)
    for k in tl.static_range(BLOCK_S):
        mask = g < tl.where(first_s + k < SHIFTS, G, 0)
        tl.store(sums_ptr + (2 * B + first_s + k) * G, tl.sum(apart[k], axis=1), mask)


@triton.jit
def pair_at(i, k, B: tl.constexpr, G: tl.constexpr):
    """Position of |x_i - x_k|^2 among the sums of a chunk; any position of a pair for i = k."""
    ahead = (k - i + G) % G
    forward = ahead <= G // 2
    shift = tl.where(forward, ahead, G - ahead) - 1
    return (2 * B + tl.maximum(shift, 0)) * G + tl.where(forward, i, k)
