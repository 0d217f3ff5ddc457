"""masked_linear on a tile list. The CUDA kernel (csrc/kernels) does not load empty tiles of W. The reference here reads
the same list. Blocks of keep grids must be multiples of 64, or complete axes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import define, impl, register_fake

from ...core.grid import Grid

OP = "sensibert::masked_linear_tiles"
define(
    OP,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor offsets, Tensor entries, Tensor order, int tile_cols, "
    "bool by_columns) -> Tensor",
)
BAND = 64  # output features that are kept or dropped together, and input features of a step


class TileList(NamedTuple):
    """The kept blocks of W [N, K], for T = ceil(N / tile_cols) tiles of output features. The format is described in
    masked_linear_tiles.h."""

    offsets: Tensor  # [2 T + 1] int32
    entries: Tensor  # [offsets[-1]] int32: step << 4 | bands
    order: Tensor  # [T] int32: longest first, ties by index
    tile_cols: int


def kept_blocks(keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> Tensor:
    """keep bool grid.shape(N, K) -> bool [ceil(N / 64), ceil(K / 64)], for blocks that are multiples of 64."""
    rows, cols = grid.block_size(num_rows, num_cols)
    row_block = torch.arange(0, num_rows, BAND, device=keep.device) // rows
    col_block = torch.arange(0, num_cols, BAND, device=keep.device) // cols
    return keep[row_block][:, col_block]


def tile_list(keep: Tensor, grid: Grid, num_rows: int, num_cols: int, tile_cols: int | None = None) -> TileList:
    """keep bool grid.shape(N, K) -> TileList. tile_cols None: 192, which can skip each 64 x 64 block; or 256, if that
    divides N, 192 does not, and all blocks of a tile are kept or dropped together."""
    kept = kept_blocks(keep, grid, num_rows, num_cols)
    if tile_cols is None:
        wide = num_rows % 256 == 0 and num_rows % 192 and bool((kept == kept[::4].repeat_interleave(4, 0)).all())
        tile_cols = 256 if wide else 192
    num_bands = tile_cols // BAND
    kept = F.pad(kept, (0, 0, 0, -len(kept) % num_bands)).unflatten(0, (-1, num_bands))  # [T, bands, S]
    bands = (kept.int() << torch.arange(num_bands, device=keep.device)[:, None]).sum(1)  # [T, S]
    full = bands == (1 << num_bands) - 1
    tile, step = bands.nonzero(as_tuple=True)  # ascending in both
    first = torch.sort(2 * tile + ~full[tile, step], stable=True).indices
    entries = (step << 4 | bands[tile, step])[first].int()
    counts = torch.stack([full.sum(1), ((bands > 0) & ~full).sum(1)], 1).flatten()
    offsets = F.pad(counts.cumsum(0), (1, 0)).int()
    cost = (kept.sum((1, 2)) if tile_cols == 192 else (bands > 0).sum(1)).long()
    order = torch.sort(cost, descending=True, stable=True).indices.int()
    return TileList(offsets, entries, order, tile_cols)


def column_tile_list(keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> TileList:
    """The tile list for y = x (W * keep): its tiles are columns of W [N, K]."""
    return tile_list(keep.T, Grid(grid.block_cols, grid.block_rows), num_cols, num_rows)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    entries: Tensor,
    order: Tensor,
    tile_cols: int,
    by_columns: bool,
) -> Tensor:
    """y [..., N] = x [..., K] weight [N, K]^T + bias [N] or None, with the listed 64 x 64 blocks only.

    by_columns: the weight is [K, N] and not transposed, the tiles are of its columns."""
    weight = weight.T if by_columns else weight
    N, K = weight.shape
    num_bands = tile_cols // BAND
    kept = torch.zeros(len(order) * num_bands, -(-K // BAND), dtype=torch.bool, device=x.device)
    for tile in order.tolist():
        for entry in entries[offsets[2 * tile] : offsets[2 * tile + 2]].tolist():
            for band in range(num_bands):
                kept[tile * num_bands + band, entry >> 4] = entry >> band & 1
    wide = kept.repeat_interleave(BAND, 0)[:N].repeat_interleave(BAND, 1)[:, :K]
    return F.linear(x.masked_fill(~wide.any(0), 0), weight.masked_fill(~wide, 0), bias)


impl(OP, "default", reference)


@register_fake(OP)
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    entries: Tensor,
    order: Tensor,
    tile_cols: int,
    by_columns: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1 if by_columns else 0])
