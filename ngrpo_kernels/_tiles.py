"""Block sizes of the Triton kernels, from shapes alone, so that every machine sums in the same order.

A program keeps a tile of at most ROWS candidates in registers, and 4 elements of D in each thread: one 16-byte load in
float32. Further candidates, anchors and shifts go to further programs, which find the candidates in the cache.
tests/kernels/test_compile.py checks that no register is spilled.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened); M draws.

from typing import NamedTuple

import triton

ROWS = 16  # candidates in a tile at most
ELEMENTS = 1024  # of a tile of candidates: 64 of D for 16 candidates, so that FLUX's D = 64 T needs no mask
ANCHORS = 4  # that share a tile: the paper's B
SHIFTS = 8  # pairs of candidates g, (g + s) mod G that share a tile: all of G = 16
PROGRAMS = 256  # about two for every multiprocessor of an H100; with 12 candidates their sums take 172 KB
WARPS = 4


class SumsTile(NamedTuple):
    """Division of the latents of a row among the programs that sum over D."""

    block_g: int  # candidates of a program
    block_b: int  # anchors of a program
    block_s: int  # shifts of a program
    block_d: int  # elements that a program holds at a time
    parts: int  # programs for one stretch of D: blocks of candidates times blocks of anchors and shifts
    chunk: int  # elements of D that a program sums over, in whole blocks
    chunks: int


def sums_tile(prompts: int, anchors: int, group: int, dim: int, shifts: int) -> SumsTile:
    """Tile for the sums over D of `prompts` rows: anchors with candidates, and candidates up to `shifts` apart."""
    block_g = min(triton.next_power_of_2(group), ROWS)
    block_b, block_s = min(anchors, ANCHORS), min(shifts, SHIFTS)
    block_d = ELEMENTS // block_g
    blocks = max(triton.cdiv(anchors, block_b), triton.cdiv(shifts, block_s) if shifts else 0)
    parts = triton.cdiv(group, block_g) * blocks
    chunk, chunks = _chunks(dim, block_d, PROGRAMS // (prompts * parts))
    return SumsTile(block_g, block_b, block_s, block_d, parts, chunk, chunks)


def _chunks(dim: int, block_d: int, programs: int) -> tuple[int, int]:
    """Elements of D, in whole blocks, that each of about `programs` programs sums over, and the number of programs."""
    tiles = triton.cdiv(dim, block_d)
    chunk = triton.cdiv(tiles, min(tiles, max(1, programs))) * block_d
    return chunk, triton.cdiv(dim, chunk)


class FinishTile(NamedTuple):
    """Sizes of what one program of `finish_kernel` holds at a time."""

    block_b: int  # anchors
    block_g: int  # candidates
    block_c: int  # chunks whose sums it adds at once


def finish_tile(anchors: int, group: int) -> FinishTile:
    """Tile for the sums [2 B + S, G] and the table of distances [G, G] of a row."""
    block_g = triton.next_power_of_2(group)
    return FinishTile(min(triton.next_power_of_2(anchors), ANCHORS), block_g, max(1, 4096 // block_g**2))


# The backward pass:
WRITTEN = 1024  # elements of D that a program writes, for ANCHORS anchors
AT_ONCE = 4  # candidates whose loads are in flight together


# The Gaussian policy, whose programs hold a stretch of one row at a time:
STRETCH = 1024  # elements of D, 8 for each thread: a 16-byte load in bfloat16, two in float32


def stretches(rows: int, dim: int) -> tuple[int, int]:
    """Elements of D that a program sums over, in whole stretches, and the number of programs for each of M rows."""
    return _chunks(dim, STRETCH, PROGRAMS // max(rows, 1))
