"""Functions that several kernels share. They keep small numbers exact and let NaN through."""

import triton
import triton.language as tl

NEAR = tl.constexpr(0.25)  # up to here the series below are exact to float64; the same in every kernel


@triton.jit
def expm1(x):
    """Function exp(x) - 1, relatively accurate near 0 and exactly 0 at 0."""
    series = 0 * x + 1
    for k in tl.static_range(11, 1, -1):
        series = 1 + series * x / k
    return tl.where(tl.abs(x) <= NEAR, x * series, tl.exp(x) - 1)


@triton.jit
def log1p_near_zero(x):
    """Function log(1 + x) for |x| < 0.3, relatively accurate, exactly 0 at 0: the series of 2 atanh(x / (2 + x))."""
    z = x / (2 + x)
    one = 0 * z + 1
    series = one / 15
    for k in tl.static_range(13, 0, -2):
        series = series * z * z + one / k
    return 2 * z * series


@triton.jit
def clamp(x, low, high):
    """Clamp `x` to [low, high]. NaN stays NaN, unlike in tl.clamp."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def row_max(x, valid):
    """Largest valid entry of every row, [.., 1]. NaN is skipped here, so it must reach the result on another path."""
    return tl.max(tl.where(valid, x, float("-inf")), axis=-1, keep_dims=True)


@triton.jit
def row_sum(x):
    """Sum of every row, [.., 1]."""
    return tl.sum(x, axis=-1, keep_dims=True)


@triton.jit
def powers(magnitude, p):
    """Powers magnitude^p, for magnitudes that are not negative and p > 0."""
    logs = tl.log2(tl.where(magnitude == 0, 1, magnitude))
    return tl.where(magnitude == 0, 0, tl.exp2(p * logs))


@triton.jit
def standardised(rewards, valid, count, min_std, EPS: tl.constexpr):
    """Rewards [.., G] of one group less their mean, over their standard deviation (Eq. 3); 0 where flat or masked.

    As in `reference.quasi_norm_advantages`, step by step. EPS is the dtype's.
    """
    rewards = tl.where(valid, rewards, 0)
    centred = rewards
    for _ in tl.static_range(2):
        mean = row_sum(centred) / tl.maximum(count, 1)
        centred = tl.where(valid, centred - mean, 0)
    largest = row_max(tl.abs(centred), valid)
    unit = centred / tl.where(largest > 0, largest, 1)
    unit_std = tl.sqrt(row_sum(unit * unit) / tl.maximum(count - 1, 1))
    std = largest * unit_std
    flat = (std <= 8 * EPS * row_max(tl.abs(rewards), valid)) | (std < min_std) | (count < 2)
    return tl.where(flat, 0 * centred, unit / tl.where(flat, 1, unit_std))  # 0 * NaN stays NaN


@triton.jit
def over_quasi_norm(combined, magnitude, valid, p, EPS: tl.constexpr):
    """Advantages combined / |combined|_p (Eq. 11); 0 where masked, and where only rounding is left of `combined`.

    That is where terms of the size of `magnitude` cancel.
    """
    peak = row_max(tl.abs(combined), valid)
    cancelled = peak <= 8 * EPS * row_max(magnitude, valid)
    scaled = combined / tl.where(peak > 0, peak, 1)
    total = row_sum(powers(tl.abs(scaled), p))
    quasi_norm = tl.exp2(tl.log2(tl.where(total > 0, total, 1)) / p)
    result = tl.where(cancelled, 0 * combined, scaled / tl.where(cancelled, 1, quasi_norm))
    return tl.where(valid, result, 0)


@triton.jit
def block(first, WARPS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Elements of D from `first` on as [WARPS, BLOCK_D], for tiles that have a row for each warp.

    An anchor's one row is thus a tile like the others, which threads load 16 bytes at a time. With unsigned offsets of
    32 bits, a kernel keeps one number for all rows. Otherwise the compiler keeps each row's address, two registers.
    """
    return tl.broadcast_to(first + tl.arange(0, BLOCK_D)[None, :], [WARPS, BLOCK_D]).to(tl.uint32)


@triton.jit
def load_quarters(at, inside, other, ACC: tl.constexpr):
    """Load a tile [.., BLOCK_D] as four [.., BLOCK_D / 4], each of which has one of four neighbours.

    One thread holds all four neighbours, and adds their terms one after the other into the same register.
    """
    tile = tl.load(at, inside, other).to(ACC)
    even, odd = tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 4, 2, 2]))
    return tl.split(even) + tl.split(odd)
