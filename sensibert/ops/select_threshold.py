"""select_threshold: keep exactly the k largest of many score tensors, without concatenating them.

Order: larger score first, then the earlier tensor, then the lower flat index; -0.0 equals 0.0; NaN comes after -inf.
So no two elements tie, the answer is unique, and a budget is met exactly. Every path below gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

OP = "sensibert::select_threshold_"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN_KEY = torch.iinfo(torch.int32).min  # below the key of -inf
define(
    OP,
    "(Tensor(a!)[] keep, Tensor(b!)[] bits, Tensor(c!)[] occupancy, Tensor(d!) threshold, Tensor(e!) num_nan, "
    "Tensor[] scores, int k, int tile_rows, int tile_cols) -> ()",
)


class Selection(NamedTuple):
    """What `select_threshold` returns; one entry per score tensor in each list."""

    keep: list[Tensor]  # bool, shaped like its scores; True survives
    threshold: Tensor  # float32 scalar: the k-th largest score (+inf for k = 0, NaN if NaN had to be kept)
    num_nan: Tensor  # int64 scalar
    bits: list[Tensor]  # uint8 [N, ceil(K / 8)], lowest bit first, each row padded with 0; [] unless asked for
    occupancy: list[Tensor]  # uint8 per tile: 0 empty, 1 partial, 2 full; [] unless asked for


def select_threshold(
    scores: Sequence[Tensor], k: int, bits: bool = False, tile: tuple[int, int] | None = None
) -> Selection:
    """scores: float32, bfloat16 or float16 tensors of one device, mixed freely -> masks with exactly k True in all.

    bits adds the masks packed eight to a byte; tile = (rows, cols) adds what every tile of that size holds, ragged
    last tiles included. Both read a score as [N, K] ([N] as [N, 1]), so want at most two axes. Carries no gradient;
    deterministic. ValueError names a k outside [0, number of scores], a wrong dtype, device, rank or tile."""
    scores = [s.detach() for s in scores]
    _check(scores, k, bits, tile)
    device = scores[0].device if scores else torch.device("cpu")
    rows, cols = tile or (0, 0)
    matrices = [_matrix_shape(s) for s in scores]
    out = Selection(
        [torch.empty(s.shape, dtype=torch.bool, device=device) for s in scores],
        torch.empty((), dtype=torch.float32, device=device),
        torch.empty((), dtype=torch.int64, device=device),
        [torch.empty(N, -(-K // 8), dtype=torch.uint8, device=device) for N, K in matrices if bits],
        [torch.empty(-(-N // rows), -(-K // cols), dtype=torch.uint8, device=device) for N, K in matrices if tile],
    )
    torch.ops.sensibert.select_threshold_(
        out.keep, out.bits, out.occupancy, out.threshold, out.num_nan, scores, k, rows, cols
    )
    return out


def _check(scores: list[Tensor], k: int, bits: bool, tile: tuple[int, int] | None) -> None:
    for i, s in enumerate(scores):
        if s.dtype not in DTYPES:
            raise ValueError(f"select_threshold: scores[{i}] is {s.dtype}, want float32, bfloat16 or float16")
        if s.device != scores[0].device:
            raise ValueError(f"select_threshold: scores[{i}] is on {s.device}, want {scores[0].device} like scores[0]")
        if (bits or tile) and s.dim() > 2:
            raise ValueError(f"select_threshold: scores[{i}] is {tuple(s.shape)}, want at most 2 axes for bits or tile")
    total = sum(s.numel() for s in scores)
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= total:
        raise ValueError(f"select_threshold: k is {k!r}, want an int in [0, {total}], the number of scores")
    if tile is not None and (len(tile) != 2 or min(tile) < 1):
        raise ValueError(f"select_threshold: tile is {tile}, want two sizes of at least 1")


def _matrix_shape(s: Tensor) -> tuple[int, int]:
    """The [N, K] reading of a tensor of at most two axes: [N] is [N, 1], a scalar is [1, 1]."""
    return (*s.shape, 1, 1)[:2]


def _key(s: Tensor) -> Tensor:
    """int32 [numel] in the order of the scores: a float's bits are sign and magnitude, so negatives are turned over."""
    x = s.reshape(-1).float() + 0.0  # + 0.0 makes -0.0 into 0.0
    b = x.view(torch.int32)
    return torch.where(x.isnan(), NAN_KEY, b ^ ((b >> 31) & 0x7FFFFFFF))


def reference(keep, bits, occupancy, threshold, num_nan, scores, k, tile_rows, tile_cols) -> None:
    keys = [_key(s) for s in scores]
    every = torch.cat([torch.empty(0, dtype=torch.int32, device=threshold.device), *keys])
    num_nan.copy_((every == NAN_KEY).sum())
    if k == 0:
        threshold.fill_(torch.inf)
        kept = torch.zeros_like(every, dtype=torch.bool)
    else:
        cut = every.kthvalue(len(every) - k + 1).values
        threshold.copy_((cut ^ ((cut >> 31) & 0x7FFFFFFF)).view(torch.float32))  # a key turned back; NAN_KEY into a NaN
        kept = every > cut
        ties = (every == cut).nonzero()[:, 0]  # ascending: by tensor, then by index
        kept[ties[: k - int(kept.sum())]] = True
    for out, part in zip(keep, kept.split([len(key) for key in keys]), strict=True):
        out.copy_(part.view_as(out))
    for out, mask in zip(bits, keep, strict=False):
        _pack(out, mask)
    for out, mask in zip(occupancy, keep, strict=False):
        _occupy(out, mask, tile_rows, tile_cols)


impl(OP, "default", reference)


@register_fake(OP)
def _(keep, bits, occupancy, threshold, num_nan, scores, k, tile_rows, tile_cols):
    return None


def _pack(out: Tensor, keep: Tensor) -> None:
    N, K = _matrix_shape(keep)
    padded = keep.new_zeros(N, out.shape[1] * 8)
    padded[:, :K] = keep.reshape(N, K)
    weight = 2 ** torch.arange(8, dtype=torch.uint8, device=keep.device)
    out.copy_((padded.view(N, out.shape[1], 8) * weight).sum(-1))


def _occupy(out: Tensor, keep: Tensor, tile_rows: int, tile_cols: int) -> None:
    N, K = _matrix_shape(keep)
    rows, cols = min(tile_rows, max(N, 1)), min(tile_cols, max(K, 1))  # a tile may be larger than the matrix
    kept, present = (keep.new_zeros(out.shape[0] * rows, out.shape[1] * cols) for _ in range(2))
    kept[:N, :K], present[:N, :K] = keep.reshape(N, K), True
    kept, present = (mask.view(out.shape[0], rows, out.shape[1], cols).sum((1, 3)) for mask in (kept, present))
    out.copy_((kept > 0).to(torch.uint8) + (kept == present))
