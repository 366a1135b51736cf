"""Block sizes of the Triton kernels, from shapes alone, so that every machine sums in the same order.

A program that sums over D has WARPS warps. Each keeps the sums of at most ROWS candidates of its own in registers, with
all that it needs of 128 elements of D: a thread loads 4 neighbours at a time, 16 bytes of float32. Further candidates,
anchors and shifts go to further programs, which find the candidates in the cache. tests/kernels/test_compile.py checks
that no register is spilled, and docs/kernels.md says how many bytes are then on their way to a multiprocessor.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened); M draws.

from typing import NamedTuple

WARPS = 4
ROWS = 4  # candidates of a warp at most, 16 of a program
BLOCK_D = 128  # elements of D at a time
ANCHORS = 4  # that share a tile: the paper's B
SHIFTS = 8  # pairs of candidates g, (g + s) mod G that share a tile: all of G = 16
# Registers allow 2 or 3 programs of `sums_kernel` on a multiprocessor. An H100 or H200 has 132 of these, so that both
# make whole waves. With 12 candidates the sums of all programs take 532 KB.
PROGRAMS = 6 * 132


class SumsTile(NamedTuple):
    """Division of the latents of a row among the programs that sum over D."""

    rows: int  # candidates of a warp
    block_b: int  # anchors of a program
    block_s: int  # shifts of a program
    block_d: int  # elements that a program holds at a time
    parts: int  # programs for one stretch of D: blocks of candidates times blocks of anchors and shifts
    chunk: int  # elements of D that a program sums over, in whole blocks
    chunks: int


def sums_tile(prompts: int, anchors: int, group: int, dim: int, shifts: int) -> SumsTile:
    """Tile for the sums over D of `prompts` rows: anchors with candidates, and candidates up to `shifts` apart."""
    if dim >= 2**31:
        raise ValueError(f"latents have D = {dim} elements; Triton's kernels take fewer than 2^31: use another backend")
    rows = min(ceil_div(group, WARPS), ROWS)
    block_b, block_s = min(anchors, ANCHORS), min(shifts, SHIFTS)
    blocks = max(ceil_div(anchors, block_b), ceil_div(shifts, block_s) if shifts else 0)
    parts = ceil_div(group, WARPS * rows) * blocks
    chunk, chunks = _chunks(dim, BLOCK_D, PROGRAMS // (prompts * parts))
    return SumsTile(rows, block_b, block_s, BLOCK_D, parts, chunk, chunks)


def _chunks(dim: int, block_d: int, programs: int) -> tuple[int, int]:
    """Elements of D, in whole blocks, that each of about `programs` programs sums over, and the number of programs."""
    tiles = ceil_div(dim, block_d)
    chunk = ceil_div(tiles, min(tiles, max(1, programs))) * block_d
    return chunk, ceil_div(dim, chunk)


FINISH_WARPS = 8  # of the one program that adds all chunks of a row
FINISH_BYTES = 16 * 1024  # of anchors' sums, and of pairs', that it copies at a time


class FinishTile(NamedTuple):
    """Sizes of what one program of `finish_kernel` holds at a time."""

    block_b: int  # anchors
    block_g: int  # candidates
    block_n: int  # sums of its anchors in a chunk
    block_m: int  # sums of pairs in a chunk
    block_c: int  # chunks that it adds at once
    stages: int  # such blocks of chunks, all but one of which are on their way to shared memory: 64 KiB of it


def finish_tile(anchors: int, group: int, itemsize: int) -> FinishTile:
    """Tile for the sums [2 B + S, G] and the table of distances [G, G] of a row; `itemsize` is a sum's, in bytes."""
    block_b, block_g = min(next_power_of_2(anchors), ANCHORS), next_power_of_2(group)
    block_n, block_m = next_power_of_2(2 * block_b * group), next_power_of_2(group // 2 * group)
    block_c = FINISH_BYTES // (itemsize * max(block_n, block_m))
    return FinishTile(block_b, block_g, block_n, block_m, max(block_c, 1), 3 if block_c else 1)


# The backward pass:
WRITTEN = 512  # elements of D that a program writes, for ANCHORS anchors
AT_ONCE = 4  # candidates of which it copies so many elements at a time


# The Gaussian policy, whose programs hold a stretch of one row at a time:
STRETCH = 1024  # elements of D, 8 for each thread: a 16-byte load in bfloat16, two in float32


def stretches(rows: int, dim: int) -> tuple[int, int]:
    """Elements of D that a program sums over, in whole stretches, and the number of programs for each of M rows."""
    return _chunks(dim, STRETCH, PROGRAMS // max(rows, 1))


# In plain Python: Triton's own take some microseconds a call.


def ceil_div(number: int, by: int) -> int:
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
