"""gather_kept: the kept rows and columns of many weights, each copied into a smaller matrix, in one launch.

Used when masks change; between mask changes `masked_adamw` writes the smaller matrices together with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from ..core.errors import SensibertError
from .checked import checked
from .masked_linear.kept_index import blank

OP = "sensibert::gather_kept_"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
define(
    OP,
    "(Tensor(a!)[] out, Tensor[] weight, Tensor[] rows, int[] rows_of, Tensor[] cols, int[] cols_of, "
    "Tensor[] bits, int[] bits_of) -> ()",
)


@checked
def gather_kept(
    weights: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    bits: Sequence[Tensor | None] | None = None,
    *,
    dtype: torch.dtype | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """weights [N, K] of one device; rows [n], cols [k] int64, None for all -> weight[rows][:, cols] [n, k] for each.

    bits int8 [n, k], as in `KeptIndex`: all bits set where a weight is kept, no bit where it is dropped and becomes
    exactly 0. dtype None: that of the weight. out: matrices to write instead of new ones. float32, bfloat16, float16
    and float64 may be mixed; values are rounded once. No gradient, no synchronization. An index outside its axis is an
    IndexError on a CPU and gives NaN in a kernel. SensibertError names an argument that does not fit."""
    weights = [w.detach() for w in weights]
    lists: dict[str, list[Tensor | None]] = {"rows": list(rows), "cols": list(cols)}
    lists["bits"] = [None] * len(weights) if bits is None else list(bits)
    for name, values in lists.items():
        if len(values) != len(weights):
            raise SensibertError(f"gather_kept: {name} has {len(values)} entries, want {len(weights)} as weights")
    shapes = [_shape(t, w, weights[0].device, lists) for t, w in enumerate(weights)]
    if out is None:
        out = [w.new_empty(shape, dtype=dtype or w.dtype) for w, shape in zip(weights, shapes, strict=True)]
    if len(out) != len(weights):
        raise SensibertError(f"gather_kept: out has {len(out)} entries, want {len(weights)} as weights")
    for t, (o, w, shape) in enumerate(zip(out, weights, shapes, strict=True)):
        if tuple(o.shape) != shape or o.device != w.device or o.dtype not in DTYPES or (dtype or o.dtype) != o.dtype:
            raise SensibertError(
                f"gather_kept: out[{t}] is {_named(o)}, want {dtype or 'a float'} {shape} on {w.device}"
            )
    packed = [o.contiguous() for o in out]  # the kernel walks flat memory
    given = [{t: index for t, index in enumerate(values) if index is not None} for values in lists.values()]
    # Kernels compute in 32 bits.
    wide = any(t.dtype == torch.float64 for t in (*weights, *out))
    gather: Callable[..., None] = reference if wide else torch.ops.sensibert.gather_kept_
    gather(
        packed,
        [w.contiguous() for w in weights],
        *(part for of in given for part in ([index.contiguous() for index in of.values()], list(of))),
    )
    for o, copy in zip(out, packed, strict=True):
        if o is not copy:
            o.copy_(copy)
    return list(out)


def _shape(t: int, weight: Tensor, device: torch.device, lists: dict[str, list[Tensor | None]]) -> tuple[int, int]:
    """(n, k) of entry t. SensibertError for a tensor that does not fit."""
    if weight.dim() != 2 or weight.dtype not in DTYPES or weight.device != device:
        raise SensibertError(f"gather_kept: weights[{t}] is {_named(weight)}, want a float [N, K] on {device}")
    shape = []
    for name, size in zip(("rows", "cols"), weight.shape, strict=True):
        index = lists[name][t]
        if index is not None and (index.dim() != 1 or index.dtype != torch.int64 or index.device != device):
            raise SensibertError(
                f"gather_kept: {name}[{t}] is {_named(index)}, want torch.int64 of one axis on {device}"
            )
        shape.append(size if index is None else len(index))
    bits = lists["bits"][t]
    if bits is not None and (list(bits.shape) != shape or bits.dtype != torch.int8 or bits.device != device):
        raise SensibertError(f"gather_kept: bits[{t}] is {_named(bits)}, want torch.int8 {tuple(shape)} on {device}")
    return shape[0], shape[1]


def _named(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} on {t.device}"


@torch.no_grad()
def reference(
    out: list[Tensor],
    weight: list[Tensor],
    rows: list[Tensor],
    rows_of: list[int],
    cols: list[Tensor],
    cols_of: list[int],
    bits: list[Tensor],
    bits_of: list[int],
) -> None:
    row, col, bit = (dict(zip(of, given)) for of, given in ((rows_of, rows), (cols_of, cols), (bits_of, bits)))
    for t, (o, w) in enumerate(zip(out, weight, strict=True)):
        for dim, index in ((0, row.get(t)), (1, col.get(t))):
            w = w if index is None else w.index_select(dim, index)
        blank(o.copy_(w), bit.get(t), in_place=True)


impl(OP, "default", reference)


@register_fake(OP)
def _(*_: object) -> None:
    return None
