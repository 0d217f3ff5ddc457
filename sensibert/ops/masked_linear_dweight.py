"""dweight of masked_linear on a list of its 64 x 64 blocks: for CUDA a kernel that computes the kept ones only and
scores each while it is in registers (csrc/kernels), and here its reference, which reads the same list. Keep grids as
in masked_linear_tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from ..artifacts import Grid
from .masked_linear_tiles import BAND, kept_blocks

OP = "sensibert::masked_linear_tiles_dweight"
define(OP, "(Tensor dy, Tensor x, Tensor tiles, Tensor dropped) -> Tensor")
define(
    OP + "_score_",
    "(Tensor(a!) out, Tensor dy, Tensor x, Tensor weight, Tensor tiles, Tensor dropped, str reduce, str finish, "
    "float decay, float scale) -> Tensor",
)
TILE_BANDS = 6  # blocks of an output tile


class BlockList(NamedTuple):
    """The blocks of dW [N, K]; masked_linear_dweight.h has the format."""

    tiles: Tensor  # [T, 2 + TILE_BANDS] int32: block row, count, block columns; longest first, ties by position
    dropped: Tensor  # [D] int32: block row * ceil(K / 64) + block column, ascending


def block_list(keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> BlockList:
    """keep bool grid.shape(N, K) -> BlockList. The kept blocks of a row share as few tiles as hold them, evenly."""
    kept = kept_blocks(keep, grid, num_rows, num_cols)
    row, col = kept.nonzero(as_tuple=True)  # ascending in both
    count = kept.sum(1)
    num_tiles = -(-count // TILE_BANDS)  # of each row
    rank = kept.cumsum(1)[kept] - 1
    tile = (num_tiles.cumsum(0) - num_tiles)[row] + rank * num_tiles[row] // count[row]
    size = torch.bincount(tile)
    place = torch.arange(len(tile), device=keep.device) - (size.cumsum(0) - size)[tile]
    tiles = keep.new_zeros(len(size), 2 + TILE_BANDS, dtype=torch.int32)
    tiles[tile, 0], tiles[:, 1], tiles[tile, 2 + place] = row.int(), size.int(), col.int()
    order = torch.sort(size, descending=True, stable=True).indices
    return BlockList(tiles[order], (~kept).flatten().nonzero()[:, 0].int())


def reference(dy: Tensor, x: Tensor, tiles: Tensor, dropped: Tensor) -> Tensor:
    """dweight [N, K] = dy [..., N]^T x [..., K] in every listed block, and exactly 0 in the others."""
    return _blank(dy.flatten(0, -2).T @ x.flatten(0, -2), tiles)


def reference_score(out, dy, x, weight, tiles, dropped, reduce, finish, decay, scale):
    """dweight as `reference`; out [ceil(N / 64), ceil(K / 64)] fp32 = decay * out + scale * finish(total), total the
    reduction of weight [N, K] * dweight over a block as in block_sensitivity, dweight not yet rounded to x's dtype."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    dweight = reference(dy.to(exact), x.to(exact), tiles, dropped)
    terms = _blank(weight.to(exact) * dweight, tiles)
    terms = terms if reduce == "signed" else terms.abs() if reduce == "abs" else terms.square()
    rows, cols = (torch.arange(size, device=x.device) // BAND for size in terms.shape)
    totals = terms.new_zeros(len(out), terms.shape[1]).index_add_(0, rows, terms)
    totals = terms.new_zeros(out.shape).index_add_(1, cols, totals)
    totals = (totals.square() if finish == "square" else totals.abs() if finish == "abs" else totals).float()
    out.copy_(totals * scale + (out * decay if decay else 0))
    return dweight.to(x.dtype)


def _blank(t: Tensor, tiles: Tensor) -> Tensor:
    kept = torch.zeros([-(-size // BAND) for size in t.shape], dtype=torch.bool, device=t.device)
    for row, count, *cols in tiles.tolist():
        kept[row, cols[:count]] = True
    wide = kept.repeat_interleave(BAND, 0).repeat_interleave(BAND, 1)[: len(t), : t.shape[1]]
    return t.masked_fill(~wide, 0)


impl(OP, "default", reference)
impl(OP + "_score_", "default", reference_score)


@register_fake(OP)
def _(dy, x, tiles, dropped):
    return x.new_empty(dy.shape[-1], x.shape[-1])


@register_fake(OP + "_score_")
def _(out, dy, x, weight, tiles, dropped, reduce, finish, decay, scale):
    return x.new_empty(dy.shape[-1], x.shape[-1])
