"""select_threshold: keep exactly the k largest of many score tensors, without concatenating them.

Order: larger scores first, then the earlier tensor, then the lower flat index; -0.0 equals 0.0; NaN comes after -inf.
No two elements tie, so the result is unique and a budget is met exactly. Kernel and reference give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from ..core.errors import SensibertError
from .checked import checked

OP = "sensibert::select_threshold_"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN_KEY = torch.iinfo(torch.int32).min  # below the key of -inf
define(OP, "(Tensor(a!)[] keep, Tensor(b!) threshold, Tensor(c!) num_nan, Tensor[] scores, int k) -> ()")


class Selection(NamedTuple):
    """What `select_threshold` returns."""

    keep: list[Tensor]  # bool, shaped like its scores; True survives
    threshold: Tensor  # float32 scalar: the k-th largest score (+inf for k = 0, NaN if NaN had to be kept)
    num_nan: Tensor  # int64 scalar


@checked
def select_threshold(scores: Sequence[Tensor], k: int) -> Selection:
    """scores: float32, bfloat16 or float16 tensors of one device -> bool masks with exactly k True in total.

    Dtypes may be mixed. No gradient; deterministic; a kernel does not synchronize. SensibertError for a k outside [0,
    number of scores], or a wrong dtype or device."""
    scores = [s.detach() for s in scores]
    _check(scores, k)
    device = scores[0].device if scores else torch.device("cpu")
    out = Selection(
        [torch.empty(s.shape, dtype=torch.bool, device=device) for s in scores],
        torch.empty((), dtype=torch.float32, device=device),
        torch.empty((), dtype=torch.int64, device=device),
    )
    torch.ops.sensibert.select_threshold_(*out, scores, k)
    return out


def _check(scores: list[Tensor], k: int) -> None:
    for i, s in enumerate(scores):
        if s.dtype not in DTYPES:
            raise SensibertError(f"select_threshold: scores[{i}] is {s.dtype}, want float32, bfloat16 or float16")
        if s.device != scores[0].device:
            raise SensibertError(
                f"select_threshold: scores[{i}] is on {s.device}, want {scores[0].device} like scores[0]"
            )
    total = sum(s.numel() for s in scores)
    if not 0 <= k <= total:
        raise SensibertError(f"select_threshold: k is {k!r}, want an int in [0, {total}], the number of scores")


def _key(s: Tensor) -> Tensor:
    """int32 [numel] in the order of the scores. A float's bits are sign and magnitude, so those of negatives are
    flipped."""
    x = s.reshape(-1).float() + 0.0  # a copy, in which -0.0 has become 0.0
    nan, key = x.isnan(), x.view(torch.int32)
    return key.bitwise_xor_((key >> 31) & 0x7FFFFFFF).masked_fill_(nan, NAN_KEY)


def _kth_largest(keys: list[Tensor], k: int) -> Tensor:
    """The k-th largest key, k >= 1: count keys by their upper 16 bits, then search only the bin of the k-th."""
    counts = cast(Tensor, sum(torch.bincount((key >> 16) + 2**15, minlength=2**16) for key in keys))  # k >= 1: not 0
    above = counts.flip(0).cumsum(0)  # of the largest bin, of the two largest, ...
    bin = int((above < k).sum())
    rank = k - int(above[bin - 1]) if bin else k
    inside = torch.cat([key[key >> 16 == 2**15 - 1 - bin] for key in keys])
    return inside.kthvalue(len(inside) - rank + 1).values


def reference(keep: list[Tensor], threshold: Tensor, num_nan: Tensor, scores: list[Tensor], k: int) -> None:
    keys = [_key(s) for s in scores]
    num_nan.copy_(sum((key == NAN_KEY).sum() for key in keys))  # type: ignore[arg-type]  # torch takes a number, too
    if k == 0:
        threshold.fill_(torch.inf)
        for out in keep:
            out.zero_()
    else:
        cut = _kth_largest(keys, k)
        inverse = cut ^ ((cut >> 31) & 0x7FFFFFFF)  # of _key; NAN_KEY gives a NaN
        threshold.copy_(inverse.view(torch.float32))
        above = [key > cut for key in keys]
        left = k - sum(int(kept.sum()) for kept in above)  # number to keep of the scores that tie at the threshold
        for out, key, kept in zip(keep, keys, above, strict=True):
            if left:
                ties = (key == cut).nonzero()[:left, 0]  # ascending
                kept[ties] = True
                left -= len(ties)
            out.copy_(kept.view_as(out))


impl(OP, "default", reference)


@register_fake(OP)
def _(keep: list[Tensor], threshold: Tensor, num_nan: Tensor, scores: list[Tensor], k: int) -> None:
    return None
