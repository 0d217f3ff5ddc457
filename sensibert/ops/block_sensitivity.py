"""One number per block of every weight: a reduction of weight and gradient over the block, for all tensors at once.

The gate gradient of a unit is sum(w * g) over its block of the consuming weight (docs/design.md), so `fisher` is
reduce="signed", finish="square"; `taylor` is "signed", "abs"; `saliency` is "abs".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from ..core.errors import SensibertError
from ..core.grid import Grid
from .checked import checked

OP = "sensibert::block_sensitivity_"
define(
    OP,
    "(Tensor(a!)[] out, Tensor[] weight, Tensor[] grad, int[] blocks, str reduce, str finish, float decay, float scale)"
    " -> ()",
)
REDUCES = ("signed", "abs", "square", "grad_square", "weight_square")
FINISHES = ("none", "square", "abs")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@checked
def block_sensitivity(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    grids: Sequence[Grid] | Grid,
    reduce: str = "abs",
    finish: str = "none",
    out: Sequence[Tensor] | None = None,
    decay: float = 1.0,
    scale: float = 1.0,
) -> list[Tensor]:
    """out[t] = decay * out[t] + scale * finish(reduce over each block of weights[t], grads[t]); returns out.

    weights[t], grads[t]: [N, K], or [N] (taken as [N, 1]); fp32, bf16, fp16 or fp64, which may be mixed. grids: one per
    tensor, or one for all. out[t]: fp32 [ceil(N / bn), ceil(K / bk)]; None starts from 0; with decay 0 its values are
    not read. reduce: signed sum(w g) | abs sum|w g| | square sum (w g)^2 | grad_square sum g^2 | weight_square sum w^2
    (grads may then be empty). finish, applied to the sum of a block: none | square | abs. Sums are fp32 (fp64 if an
    input is fp64, which the CUDA kernel refuses), in an order fixed by the shapes: deterministic. SensibertError names
    the argument that does not fit."""
    grids = [grids] * len(weights) if isinstance(grids, Grid) else grids
    shapes = _check(weights, grads, grids, reduce, finish)
    if out is None:
        out, decay = [w.new_empty(shape, dtype=torch.float32) for w, shape in zip(weights, shapes)], 0.0
    _check_out(out, weights, shapes)
    blocks = [size for grid in grids for size in (grid.block_rows, grid.block_cols)]
    torch.ops.sensibert.block_sensitivity_(
        list(out), list(weights), list(grads), blocks, reduce, finish, float(decay), float(scale)
    )
    return list(out)


def reference(
    out: list[Tensor],
    weight: list[Tensor],
    grad: list[Tensor],
    blocks: list[int],
    reduce: str,
    finish: str,
    decay: float,
    scale: float,
) -> None:
    with torch.no_grad():  # the op has no gradient, but torch would record these lines
        for t, total in enumerate(out):
            terms = _terms(weight[t], grad[t] if grad else None, reduce)
            sums = _block_sums(terms if terms.dim() == 2 else terms[:, None], *blocks[2 * t : 2 * t + 2])
            sums = sums.square() if finish == "square" else sums.abs() if finish == "abs" else sums
            sums = sums.float()
            if decay:
                total.mul_(decay).add_(sums, alpha=scale)
            else:
                torch.mul(sums, scale, out=total)


impl(OP, "default", reference)


@register_fake(OP)
def _(*_: object) -> None:
    return None


def _terms(w: Tensor, g: Tensor | None, reduce: str) -> Tensor:
    """The terms of the sums, one per element, in fp32 or fp64."""
    exact = torch.float64 if torch.float64 in (w.dtype, w.dtype if g is None else g.dtype) else torch.float32
    if reduce == "weight_square":
        return w.to(exact).square()
    assert g is not None  # grads may be empty for weight_square only
    if reduce == "grad_square":
        return g.to(exact).square()
    product = w.to(exact) * g.to(exact)
    return product if reduce == "signed" else product.abs_() if reduce == "abs" else product.square_()


def _block_sums(terms: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """terms [N, K] -> [ceil(N / bn), ceil(K / bk)]."""
    rows, cols = terms.shape
    bn, bk = block_rows or max(rows, 1), block_cols or max(cols, 1)
    if rows % bn == 0 and cols % bk == 0:
        return terms.view(rows // bn, bn, cols // bk, bk).sum((1, 3))
    for dim, length, size in ((1, cols, bk), (0, rows, bn)):  # the short block at the end is summed separately
        full = length // size * size
        parts = [terms.narrow(dim, 0, full).unflatten(dim, (full // size, size)).sum(dim + 1)]
        if full < length:
            parts.append(terms.narrow(dim, full, length - full).sum(dim, keepdim=True))
        terms = torch.cat(parts, dim)
    return terms


def _check(
    weights: Sequence[Tensor], grads: Sequence[Tensor], grids: Sequence[Grid], reduce: str, finish: str
) -> list[tuple[int, int]]:
    """Return the shape of each out. SensibertError for the first argument that does not fit."""
    if reduce not in REDUCES:
        raise SensibertError(f"block_sensitivity: reduce is {reduce!r}, want one of {', '.join(REDUCES)}")
    if finish not in FINISHES:
        raise SensibertError(f"block_sensitivity: finish is {finish!r}, want one of {', '.join(FINISHES)}")
    if len(grids) != len(weights):
        raise SensibertError(f"block_sensitivity: grids are {len(grids)}, want one for each of {len(weights)} weights")
    if len(grads) != len(weights) and not (reduce == "weight_square" and not grads):
        raise SensibertError(f"block_sensitivity: grads are {len(grads)}, want one for each of {len(weights)} weights")
    for name, tensors in (("weights", weights), ("grads", grads)):
        for t, tensor in enumerate(tensors):
            if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
                got = f"{tensor.dtype}, {tensor.layout}"
                raise SensibertError(
                    f"block_sensitivity: {name}[{t}] is {got}, want dense float32, bfloat16, float16, float64"
                )
            if tensor.device != weights[0].device:
                raise SensibertError(f"block_sensitivity: {name}[{t}] is on {tensor.device}, want {weights[0].device}")
    for t, w in enumerate(weights):
        if w.dim() not in (1, 2):
            raise SensibertError(f"block_sensitivity: weights[{t}] is {tuple(w.shape)}, want [N, K] or [N]")
        if grads and grads[t].shape != w.shape:
            raise SensibertError(f"block_sensitivity: grads[{t}] is {tuple(grads[t].shape)}, want {tuple(w.shape)}")
    return [grid.shape(w.shape[0], w.shape[1] if w.dim() == 2 else 1) for w, grid in zip(weights, grids)]


def _check_out(out: Sequence[Tensor], weights: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> None:
    if len(out) != len(weights):
        raise SensibertError(f"block_sensitivity: out has {len(out)} tensors, want {len(weights)}")
    for t, (total, w, shape) in enumerate(zip(out, weights, shapes)):
        if total.dtype != torch.float32 or tuple(total.shape) != shape or not total.is_contiguous():
            got = f"{total.dtype} {tuple(total.shape)}{'' if total.is_contiguous() else ' with gaps'}"
            raise SensibertError(f"block_sensitivity: out[{t}] is {got}, want contiguous torch.float32 {shape}")
        if total.device != w.device:
            raise SensibertError(f"block_sensitivity: out[{t}] is on {total.device}, want {w.device}")
