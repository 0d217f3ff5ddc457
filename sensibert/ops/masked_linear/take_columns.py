"""take_columns: columns of activations by index; -1 means a column of fill values.

masked_linear uses it to gather the kept columns of x and to spread the columns of y over the full width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

OP = "sensibert::take_columns"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
define(OP, "(Tensor x, Tensor index, Tensor? fill) -> Tensor")


def take_columns(x: Tensor, index: Tensor, fill: Tensor | None = None) -> Tensor:
    """x [..., K], index int32 [k], fill [k] or None -> out [..., k] = x[..., index], fill or 0 where index is below 0.

    To gather, index holds the kept columns; to scatter, the position of each column among the kept ones, or -1. x is
    float32, bfloat16 or float16 and is copied bit for bit; columns that are not in index are not read. No gradient. The
    values of index are not checked, since that would wait for the device: K or more is an IndexError on a CPU, and a
    kernel reads out of bounds. ValueError names a tensor that does not fit."""
    if x.dim() == 0 or x.dtype not in DTYPES:
        raise ValueError(f"take_columns: x is {_named(x)}, want float32, bfloat16 or float16 [..., K]")
    if index.dim() != 1 or index.dtype != torch.int32 or index.device != x.device:
        raise ValueError(f"take_columns: index is {_named(index)}, want torch.int32 of one axis on {x.device}")
    if fill is not None and (fill.shape != index.shape or fill.dtype != x.dtype or fill.device != x.device):
        raise ValueError(
            f"take_columns: fill is {_named(fill)}, want {x.dtype} {tuple(index.shape)} on {x.device} as x and index"
        )
    return torch.ops.sensibert.take_columns(x.detach(), index, None if fill is None else fill.detach())


def _named(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} on {t.device}"


def reference(x: Tensor, index: Tensor, fill: Tensor | None) -> Tensor:
    if x.shape[-1] == 0:
        x = x.new_zeros(*x.shape[:-1], 1)  # index_select needs at least one column
    taken = x.index_select(-1, index.clamp(min=0))
    return taken.masked_fill(index < 0, 0) if fill is None else torch.where(index < 0, fill, taken)


impl(OP, "default", reference)


@register_fake(OP)
def _(x: Tensor, index: Tensor, fill: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(index))
