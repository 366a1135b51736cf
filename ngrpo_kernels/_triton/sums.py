"""First kernel of the loss: everything that it needs from the latents, summed over D in one pass (Eqs. 8, 10)."""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).
#
# x_i candidate; x_j the anchor's own candidate; y_i = x_i - x_j; a the old policy's point; delta = x_theta - a.
# Sums of a row and chunk of D, [2 B + S, G]: rows 2 b are <y_i, a - x_j>; rows 2 b + 1 are <y_i, delta>, without the
# factor dt where delta is dt times a difference of velocities; rows 2 B + s are |x_i - x_k|^2, k = (i + s + 1) mod G,
# which are all pairs with S = floor(G / 2).

import triton
import triton.language as tl

from ngrpo_kernels._triton.maths import block, load_quarters


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
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,  # D is whole blocks
    WARPS: tl.constexpr,
    ACC: tl.constexpr,
):
    # The parts of a chunk come one after the other, so that the second finds the candidates in the cache.
    part, chunk, p = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    BLOCKS_G: tl.constexpr = (G + WARPS * ROWS - 1) // (WARPS * ROWS)
    SHIFTS: tl.constexpr = G // 2
    g = (part % BLOCKS_G * WARPS + tl.arange(0, WARPS)[:, None]) * ROWS  # [WARPS, 1], first of each warp's candidates
    # With all anchors, or all shifts, in one block, the first is a constant: the compiler needs fewer registers.
    first_b = 0 if B <= BLOCK_B else part // BLOCKS_G * BLOCK_B
    first_s = 0 if SHIFTS <= BLOCK_S else part // BLOCKS_G * BLOCK_S
    # One may take more blocks than the other.
    adds_anchors = True if SHIFTS <= BLOCK_S else part // BLOCKS_G * BLOCK_B < B
    adds_pairs = True if B <= BLOCK_B else part // BLOCKS_G * BLOCK_S < SHIFTS

    candidates_ptr += p * candidates_stride_p
    own_rows = ()
    slopes = ()
    for k in tl.static_range(BLOCK_B):
        at = p * B + tl.minimum(first_b + k, B - 1)
        j = tl.load(index_ptr + at)
        own_rows += (candidates_ptr + tl.minimum(tl.maximum(j, 0), G - 1) * candidates_stride_g,)
        slopes += (tl.load(slope_ptr + at),)

    zeros = (tl.zeros([WARPS, BLOCK_D // 4], ACC),)
    toward, along, apart = zeros * (BLOCK_B * ROWS), zeros * (BLOCK_B * ROWS), zeros * (BLOCK_S * ROWS)
    end = tl.minimum(chunk * CHUNK + CHUNK, D)
    whole = end if WHOLE else tl.minimum(end, D // BLOCK_D * BLOCK_D)
    for TAIL in tl.static_range(1 if WHOLE else 2):  # what is left of D has a loop of its own: only there masks cost
        for first in range(whole if TAIL else chunk * CHUNK, end if TAIL else whole, BLOCK_D):
            d = block(first, WARPS, BLOCK_D)
            inside, other = (d < D, 0.0) if TAIL else (None, None)
            x = ()
            for r in tl.static_range(ROWS):
                member = ((g + r) % G).to(tl.int64)  # there is no row to mask
                x += (load_quarters(candidates_ptr + member * candidates_stride_g + d, inside, other, ACC),)

            if adds_anchors:
                sums_toward = ()
                sums_along = ()
                for k in tl.static_range(BLOCK_B):
                    b = tl.minimum(first_b + k, B - 1).to(tl.int64)
                    own = load_quarters(own_rows[k] + d, inside, other, ACC)
                    row = moving_ptr + p * moving_stride_p + b * moving_stride_b
                    moving = load_quarters(row + d, inside, other, ACC)
                    if latents_ptr is not None:
                        row = latents_ptr + p * latents_stride_p + b * latents_stride_b
                        latents = load_quarters(row + d, inside, other, ACC)
                    if old_ptr is not None:
                        row = old_ptr + p * old_stride_p + b * old_stride_b
                        old = load_quarters(row + d, inside, other, ACC)
                    point = ()  # of the old policy, or of the new one, from x_j
                    delta = ()
                    for i in tl.static_range(4):
                        # Two states of one trajectory are subtracted first, and delta comes from velocities.
                        base = -own[i] if latents_ptr is None else latents[i] - own[i]
                        point += (base + slopes[k] * (moving[i] if old_ptr is None else old[i]),)
                        delta += (point[i] if old_ptr is None else moving[i] - old[i],)
                    for r in tl.static_range(ROWS):
                        sum_toward = toward[k * ROWS + r]
                        sum_along = along[k * ROWS + r]
                        for i in tl.static_range(4):
                            y = x[r][i] - own[i]
                            if not LITERAL:
                                sum_toward = tl.fma(y, point[i], sum_toward)
                            if LITERAL or old_ptr is not None:
                                sum_along = tl.fma(y, delta[i], sum_along)
                        sums_toward += (sum_toward,)
                        sums_along += (sum_along,)
                toward, along = sums_toward, sums_along

            if adds_pairs:
                # Candidates first_s further on. With all shifts in one block, the first ones are those of x.
                AT_HAND: tl.constexpr = ROWS if SHIFTS <= BLOCK_S else 0
                ahead = x if AT_HAND else ()
                for r in tl.static_range(AT_HAND, ROWS + BLOCK_S):
                    member = ((g + first_s + r) % G).to(tl.int64)
                    ahead += (load_quarters(candidates_ptr + member * candidates_stride_g + d, inside, other, ACC),)
                sums_apart = ()
                for k in tl.static_range(BLOCK_S):
                    for r in tl.static_range(ROWS):
                        square = apart[k * ROWS + r]
                        for i in tl.static_range(4):
                            difference = x[r][i] - ahead[r + k + 1][i]
                            square = tl.fma(difference, difference, square)
                        sums_apart += (square,)
                apart = sums_apart

    sums_ptr += (p * tl.num_programs(1) + chunk) * ((2 * B + SHIFTS) * G)
    # One of the threads that added a sum stores it. As [WARPS, 1], sums would first change threads, and warps wait.
    lane = tl.arange(0, BLOCK_D // 4)[None, :]
    for r in tl.static_range(ROWS):
        at = sums_ptr + g + r + 0 * lane
        if adds_anchors:
            for k in tl.static_range(BLOCK_B):
                row, mask = 2 * (first_b + k), (lane == 0) & (g + r < tl.where(first_b + k < B, G, 0))
                if not LITERAL:
                    tl.store(at + row * G, tl.sum(toward[k * ROWS + r], axis=1, keep_dims=True), mask)
                if LITERAL or old_ptr is not None:
                    tl.store(at + (row + 1) * G, tl.sum(along[k * ROWS + r], axis=1, keep_dims=True), mask)
        if adds_pairs:
            for k in tl.static_range(BLOCK_S):
                row, mask = 2 * B + first_s + k, (lane == 0) & (g + r < tl.where(first_s + k < SHIFTS, G, 0))
                tl.store(at + row * G, tl.sum(apart[k * ROWS + r], axis=1, keep_dims=True), mask)


@triton.jit
def pair_at(i, k, G: tl.constexpr):
    """Position of |x_i - x_k|^2 among a chunk's sums of pairs; any position of a pair for i = k."""
    ahead = (k - i + G) % G
    forward = ahead <= G // 2
    shift = tl.where(forward, ahead, G - ahead) - 1
    return tl.maximum(shift, 0) * G + tl.where(forward, i, k)
