"""Rows and columns of a weight with at least one kept block, and the holes: dropped weights inside them.

The result is cached for each value of `keep`, so that a call on a GPU neither waits for the device nor breaks a graph
capture. The cache of a tensor is valid until the tensor is freed or its version counter changes, as for tensors that
autograd saves. So change keep in place with torch (`keep.copy_(...)`), not through `keep.data`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...core.grid import Grid
from ..masked_adamw import index_map


class KeptIndex(NamedTuple):
    """The compact matrix of a weight [N, K]: its n kept rows and k kept columns."""

    rows: Tensor | None  # [n] int64, ascending; None: all N
    cols: Tensor | None  # [k] int64, ascending; None: all K
    bits: Tensor | None  # [n, k] int8: all bits set where kept, none in the holes of the compact matrix; None: no hole
    density: float  # kept weights / (N * K); 1 for an empty weight
    share: float  # n * k / (N * K): the work of a matmul that skips empty rows and columns


T = TypeVar("T")
_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # keep -> (its version, {(compute, grid, N, K): result})


def cached(compute: Callable[..., T], keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> T:
    """compute(keep, grid, N, K), called once per value of keep."""
    if keep.is_inference():  # has no version counter
        return compute(keep, grid, num_rows, num_cols)
    entry = _cache.get(keep)
    if entry is None or entry[0] != keep._version:
        entry = _cache[keep] = (keep._version, {})
    key = (compute, grid, num_rows, num_cols)
    if key not in entry[1]:
        entry[1][key] = compute(keep, grid, num_rows, num_cols)
    return entry[1][key]


def kept_index(keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> KeptIndex:
    """keep bool grid.shape(N, K) -> KeptIndex."""
    return cached(_kept_index, keep, grid, num_rows, num_cols)


_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def blank(t: Tensor, bits: Tensor | None, in_place: bool = False) -> Tensor:
    """t [n, k] with 0 in the holes. Uses bit masks: NaN becomes 0 too, and on a CPU it is 3 times as fast as
    masked_fill."""
    if bits is None:
        return t
    words = t.view(_INTEGER[t.itemsize])
    return (words.bitwise_and_(bits) if in_place else words & bits).view(t.dtype)


def _kept_index(keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> KeptIndex:
    if num_rows * num_cols == 0:
        return KeptIndex(None, None, None, 1.0, 1.0)
    sizes = grid.block_size(num_rows, num_cols)
    row_block = torch.arange(num_rows, device=keep.device) // sizes[0]  # [N] block number of each row
    col_block = torch.arange(num_cols, device=keep.device) // sizes[1]  # [K]
    rows = keep.any(1)[row_block].nonzero()[:, 0]
    cols = keep.any(0)[col_block].nonzero()[:, 0]
    # Counted in strips: for an element grid a single product would need a float64 copy of the weight.
    block_cols = torch.bincount(col_block, minlength=keep.shape[1]).double()
    block_rows = torch.bincount(row_block, minlength=keep.shape[0]).double()
    per_row = torch.cat([part.double().mv(block_cols) for part in keep.split(256)])
    kept = float(per_row.dot(block_rows))
    size = num_rows * num_cols
    bits = None
    if kept < len(rows) * len(cols):
        bits = keep[row_block[rows]][:, col_block[cols]].to(torch.int8).neg_()
    full = (len(rows) == num_rows, len(cols) == num_cols)
    share = len(rows) * len(cols) / size
    return KeptIndex(None if full[0] else rows, None if full[1] else cols, bits, kept / size, share)


ALIGN = 8  # elements: if half-precision rows are not multiples of 16 bytes, cuBLAS is three times slower on an H200


class TakeIndex(NamedTuple):
    """The kept rows and columns of a weight [N, K] as `take_columns` reads them, int32; None: all are kept."""

    rows: Tensor | None  # [n] indices of the kept rows, padded with -1 to a multiple of ALIGN
    cols: Tensor | None  # [k], the same for columns
    of_rows: Tensor | None  # [N] position of each row among the kept ones, or -1
    of_cols: Tensor | None  # [K]


def take_index(keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> TakeIndex:
    """keep bool grid.shape(N, K) -> TakeIndex."""
    return cached(_take_index, keep, grid, num_rows, num_cols)


def _take_index(keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> TakeIndex:
    kept = kept_index(keep, grid, num_rows, num_cols)
    both = ((kept.rows, num_rows), (kept.cols, num_cols))
    numbers = (None if index is None else F.pad(index.int(), (0, -len(index) % ALIGN), value=-1) for index, _ in both)
    return TakeIndex(*numbers, *(None if index is None else index_map(index, size) for index, size in both))


def wide_bits(part: str, keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> Tensor | None:
    """Like `KeptIndex.bits`, with one axis or both at full size: of W [N, k] for part "fwd", of W [n, K] for "dx", of
    dW [N, K] for "dw". An axis along which all bits agree has size 1."""
    return cached(_WIDE[part], keep, grid, num_rows, num_cols)


def _wide_bits(
    keep: Tensor, grid: Grid, num_rows: int, num_cols: int, take_rows: bool, take_cols: bool
) -> Tensor | None:
    kept = kept_index(keep, grid, num_rows, num_cols)
    rows, cols = kept.rows if take_rows else None, kept.cols if take_cols else None
    if kept.bits is None:  # only complete rows and columns are dropped
        bits = torch.ones(1, 1, dtype=torch.bool, device=keep.device)
        for axis, index, taken in ((0, kept.rows, take_rows), (1, kept.cols, take_cols)):
            if index is not None and not taken:
                shape = (-1, 1) if axis == 0 else (1, -1)
                bits = bits & (index_map(index, (num_rows, num_cols)[axis]) >= 0).view(shape)
        if bits.numel() == 1:
            return None
    else:
        bits = grid.expand(keep, num_rows, num_cols)
        bits = bits if rows is None else bits[rows]
        bits = bits if cols is None else bits[:, cols]
    # On a GPU as wide as the values they mask: torch is slow on two dtypes. On a CPU small, which saves reads.
    return bits.to(torch.int16 if keep.is_cuda else torch.int8).neg_()


_WIDE = {
    "fwd": partial(_wide_bits, take_rows=False, take_cols=True),
    "dx": partial(_wide_bits, take_rows=True, take_cols=False),
    "dw": partial(_wide_bits, take_rows=False, take_cols=False),
}


class CompactWeight(NamedTuple):
    """The kept rows and columns of weight * keep, written in advance, so that no call gathers, casts or masks them.

    Valid while the version counters of weight and keep equal `versions`. Code that writes matrix also updates versions,
    without changing the version counter of `versions` itself: autograd saves that tensor."""

    matrix: Tensor  # [n, k] in the dtype of the matmul, 0 in the holes
    versions: Tensor  # [2] int64 on the CPU: version counters of weight and keep
    weight: Tensor  # [N, K]
    keep: Tensor  # bool grid.shape(N, K)


def valid_matrix(
    matrix: Tensor | None, versions: Tensor | None, weight: Tensor, keep: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """matrix, if it has this dtype and is valid for the current values of weight and keep; else None."""
    if matrix is None or matrix.dtype != dtype or weight.is_inference() or keep.is_inference():
        return None
    assert versions is not None  # both are fields of a CompactWeight
    return matrix if versions.tolist() == [weight._version, keep._version] else None
