"""dweight of masked_linear on a list of its 64 x 64 blocks. The CUDA kernel (csrc/kernels) computes the kept blocks
only. The reference here reads the same list. Keep grids as in `tiles`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from ...core.grid import Grid
from .tiles import BAND, kept_blocks

OP = "sensibert::masked_linear_tiles_dweight"
define(OP, "(Tensor dy, Tensor x, Tensor tiles, Tensor dropped) -> Tensor")
TILE_BANDS = 4  # blocks of a row in an output tile, at most


class BlockList(NamedTuple):
    """The blocks of dW [N, K]; masked_linear_dweight.h has the format."""

    tiles: Tensor  # [T, 5 + 2 * TILE_BANDS] int32; most blocks first, ties by position
    dropped: Tensor  # [D] int32: block row * ceil(K / 64) + block column, ascending


def block_list(keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> BlockList:
    """keep bool grid.shape(N, K) -> BlockList. Rows with many kept blocks in common share tiles, so that common blocks
    are loaded once."""
    kept = kept_blocks(keep, grid, num_rows, num_cols)
    rows = [{col for col, alive in enumerate(row) if alive} for row in kept.tolist()]
    tiles = [tile for pair in _pairs(rows) for tile in _tiles(rows, *pair)]
    tiles.sort(key=_num_blocks, reverse=True)
    words = [tile + [0] * (5 + 2 * TILE_BANDS - len(tile)) for tile in tiles]
    table = torch.tensor(words, dtype=torch.int32, device=keep.device).view(len(words), 5 + 2 * TILE_BANDS)
    return BlockList(table, (~kept).flatten().nonzero()[:, 0].int())


def _pairs(rows: list[set[int]]) -> list[tuple[int, int]]:
    """Pairs that contain each row once: the longest remaining row with the one that has most blocks in common with it.
    A single last row is paired with itself."""
    left, pairs = sorted(range(len(rows)), key=lambda i: -len(rows[i])), []
    while left:
        first = left.pop(0)
        other = max(left, key=lambda i: len(rows[first] & rows[i]), default=first)
        if left:
            left.remove(other)
        pairs.append((first, other))
    return pairs


def _tiles(rows: list[set[int]], i: int, j: int) -> Iterator[list[int]]:
    """The tiles of block rows i and j, each as words: i, j, counts, block columns."""
    both = sorted(rows[i] & rows[j]) if i != j else []
    only_i, only_j = sorted(rows[i] - set(both)), sorted(rows[j] - set(both)) if i != j else []
    while both or (only_i and only_j):
        shared, both = both[:TILE_BANDS], both[TILE_BANDS:]
        free = TILE_BANDS - len(shared)
        own_i, own_j, only_i, only_j = only_i[:free], only_j[:free], only_i[free:], only_j[free:]
        yield [i, j, len(own_i), len(shared), len(own_j), *own_i, *shared, *own_j]
    row, single = (i, only_i) if only_i else (j, only_j)
    num_tiles = -(-len(single) // (2 * TILE_BANDS))
    for t in range(num_tiles):  # tiles of one row, of nearly equal size
        cols = single[t * len(single) // num_tiles : (t + 1) * len(single) // num_tiles]
        half = (len(cols) + 1) // 2
        yield [row, row, half, 0, len(cols) - half, *cols]


def _num_blocks(tile: list[int]) -> int:
    return tile[2] + 2 * tile[3] + tile[4]


def reference(dy: Tensor, x: Tensor, tiles: Tensor, dropped: Tensor) -> Tensor:
    """dweight [N, K] = dy [..., N]^T x [..., K] in every listed block, and exactly 0 in the others."""
    return _blank(dy.flatten(0, -2).T @ x.flatten(0, -2), tiles)


def _blank(t: Tensor, tiles: Tensor) -> Tensor:
    kept = torch.zeros([-(-size // BAND) for size in t.shape], dtype=torch.bool, device=t.device)
    for i, j, only_i, both, only_j, *cols in tiles.tolist():
        kept[i, cols[: only_i + both]] = True
        kept[j, cols[only_i : only_i + both + only_j]] = True
    wide = kept.repeat_interleave(BAND, 0).repeat_interleave(BAND, 1)[: len(t), : t.shape[1]]
    return t.masked_fill(~wide, 0)


impl(OP, "default", reference)


@register_fake(OP)
def _(dy: Tensor, x: Tensor, tiles: Tensor, dropped: Tensor) -> Tensor:
    return x.new_empty(dy.shape[-1], x.shape[-1])
