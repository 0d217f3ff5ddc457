"""What a keep grid leaves of a weight: the rows and columns that still hold a kept block, and the holes among them.

Found once per value of `keep` and remembered, so that a call on a GPU neither waits for the device nor breaks a graph
capture. Remembered means: until the tensor dies or its version counter moves, as for tensors autograd saves. So change
keep in place with torch (`keep.copy_(...)`), not through `keep.data`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar
from weakref import WeakMethod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...core.grid import Grid
from ..masked_adamw import index_map


class Live(NamedTuple):
    """The compact matrix of a weight [N, K]: its n kept rows and k kept columns."""

    rows: Tensor | None  # [n] int64, ascending; None: all N
    cols: Tensor | None  # [k] int64, ascending; None: all K
    bits: Tensor | None  # [n, k] int8: all bits set where kept, none in the holes of the compact matrix; None: no hole
    density: float  # kept weights / (N * K); 1 for an empty weight
    share: float  # n * k / (N * K): what is left for a matmul that skips empty rows and columns


T = TypeVar("T")
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # keep -> (its version, {(find, grid, N, K): found})


def remember(find: Callable[..., T], keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> T:
    """find(keep, grid, N, K), asked once per value of keep."""
    if keep.is_inference():  # has no version counter
        return find(keep, grid, num_rows, num_cols)
    known = _known.get(keep)
    if known is None or known[0] != keep._version:
        known = _known[keep] = (keep._version, {})
    key = (find, grid, num_rows, num_cols)
    if key not in known[1]:
        known[1][key] = find(keep, grid, num_rows, num_cols)
    return known[1][key]


def live(keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> Live:
    """keep bool grid.shape(N, K) -> Live."""
    return remember(_find, keep, grid, num_rows, num_cols)


_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def blank(t: Tensor, bits: Tensor | None, in_place: bool = False) -> Tensor:
    """t [n, k] with 0 in the holes. By bits: NaN goes too, and a CPU is 3 times as fast as by masked_fill."""
    if bits is None:
        return t
    words = t.view(_INTEGER[t.itemsize])
    return (words.bitwise_and_(bits) if in_place else words & bits).view(t.dtype)


def _find(keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> Live:
    if num_rows * num_cols == 0:
        return Live(None, None, None, 1.0, 1.0)
    sizes = grid.block_size(num_rows, num_cols)
    row_block = torch.arange(num_rows, device=keep.device) // sizes[0]  # [N] block number of each row
    col_block = torch.arange(num_cols, device=keep.device) // sizes[1]  # [K]
    rows = keep.any(1)[row_block].nonzero()[:, 0]
    cols = keep.any(0)[col_block].nonzero()[:, 0]
    # Counted in strips: an element grid would cost a float64 copy of the weight otherwise.
    block_cols = torch.bincount(col_block, minlength=keep.shape[1]).double()
    block_rows = torch.bincount(row_block, minlength=keep.shape[0]).double()
    per_row = torch.cat([part.double().mv(block_cols) for part in keep.split(256)])
    kept = float(per_row.dot(block_rows))
    size = num_rows * num_cols
    bits = None
    if kept < len(rows) * len(cols):
        bits = keep[row_block[rows]][:, col_block[cols]].to(torch.int8).neg_()
    full = (len(rows) == num_rows, len(cols) == num_cols)
    return Live(None if full[0] else rows, None if full[1] else cols, bits, kept / size, len(rows) * len(cols) / size)


ALIGN = 8  # where a row of half-precision values is not whole 16-byte words, cuBLAS is three times slower on an H200


class Places(NamedTuple):
    """The kept rows and columns of a weight [N, K] as `take_columns` reads them, int32; None: all are kept."""

    rows: Tensor | None  # [n] numbers, and -1 up to a multiple of ALIGN
    cols: Tensor | None  # [k], the same
    of_rows: Tensor | None  # [N] place among the kept rows, -1: none
    of_cols: Tensor | None  # [K]


def places(keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> Places:
    return remember(_find_places, keep, grid, num_rows, num_cols)


def _find_places(keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> Places:
    kept = live(keep, grid, num_rows, num_cols)
    both = ((kept.rows, num_rows), (kept.cols, num_cols))
    numbers = (None if index is None else F.pad(index.int(), (0, -len(index) % ALIGN), value=-1) for index, _ in both)
    return Places(*numbers, *(None if index is None else index_map(index, size) for index, size in both))


def wide_bits(part: str, keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> Tensor | None:
    """As `Live.bits`, where one output axis or both stay at full size: of W [N, k] for part "fwd", of W [n, K] for
    "dx", of dW [N, K] for "dw"; broadcast over an axis along which all is alike."""
    return remember(_WIDE[part], keep, grid, num_rows, num_cols)


def _find_wide(keep: Tensor, grid: Grid, num_rows: int, num_cols: int, take_rows: bool, take_cols: bool):
    kept = live(keep, grid, num_rows, num_cols)
    rows, cols = kept.rows if take_rows else None, kept.cols if take_cols else None
    if kept.bits is None:  # no hole but for whole rows and columns
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
    # As wide as what they mask: torch is slow on two dtypes. A CPU would rather read less.
    return bits.to(torch.int16 if keep.is_cuda else torch.int8).neg_()


_WIDE = {
    "fwd": partial(_find_wide, take_rows=False, take_cols=True),
    "dx": partial(_find_wide, take_rows=True, take_cols=False),
    "dw": partial(_find_wide, take_rows=False, take_cols=False),
}


@dataclass(eq=False)
class CompactWeight:
    """What `publish` promised, of the weight with this version; who has written both again says so here."""

    weight_version: int
    keep: Tensor
    keep_version: int
    grid: Grid
    compact: Tensor
    renew: WeakMethod | None


_published: WeakTensorKeyDictionary = (
    WeakTensorKeyDictionary()
)  # weight -> CompactWeight, which must not hold the weight


def publish(
    weight: Tensor, keep: Tensor, grid: Grid, compact: Tensor, renew: WeakMethod | None = None
) -> CompactWeight:
    """Promise that compact [n, k] holds the kept rows and columns of weight * keep in the compute dtype, so that no
    call has to gather, cast or mask.

    For an optimizer that writes it in its own pass. It is used until the version counter of weight or keep moves; who
    publishes brings weight_version up to date after each step. torch's fused optimizers do not move the counter: they
    must not hold the weight. renew is called when keep has changed, and may publish anew."""
    promise = _published[weight] = CompactWeight(weight._version, keep, keep._version, grid, compact, renew)
    return promise


def withdraw(weight: Tensor) -> None:
    """End the promise, and let go of the matrix."""
    _published.pop(weight, None)


def published(weight: Tensor, keep: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor | None:
    known = None if weight.is_inference() or keep.is_inference() else _published.get(weight)
    if known is None or known.keep is not keep or known.compact.dtype != dtype:
        return None
    if known.keep_version != keep._version and known.renew is not None and (renew := known.renew()) is not None:
        renew()
        known = _published.get(weight, known)
    now = (weight._version, keep._version, grid)
    return known.compact if (known.weight_version, known.keep_version, known.grid) == now else None
