"""y = x (W * keep)^T + b for any grid of W, with gradients to x, W and b (and to their gradients in turn).

Three ops: masked_linear (NT), masked_linear_dx (NN) and masked_linear_dweight (TN), so that a compiler sees a backward
pass as two calls. Each is linear in both float inputs, and its derivative is computed by the other two. They accumulate
like torch's matmul of the dtype (in fp32 for fp16 and bf16) and are deterministic where that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake

from ...core.arguments import want
from ...core.errors import SensibertError
from ...core.grid import Grid
from . import dispatch as paths
from .bits import column_bits, row_bits
from .dweight import block_list
from .kept_index import ALIGN, CompactWeight, KeptIndex, blank, cached, kept_index, take_index, valid_matrix, wide_bits
from .take_columns import DTYPES
from .tiles import column_tile_list, tile_list

OP = "sensibert::masked_linear"
_KEEP = "Tensor keep, int block_rows, int block_cols"
_COMPACT = "Tensor? compact=None, Tensor? versions=None"  # the fields matrix and versions of a CompactWeight
define(OP, f"(Tensor x, Tensor weight, Tensor? bias, {_KEEP}, {_COMPACT}) -> Tensor")
define(OP + "_dx", f"(Tensor dy, Tensor weight, {_KEEP}, {_COMPACT}) -> Tensor")
define(OP + "_dweight", f"(Tensor dy, Tensor x, {_KEEP}) -> Tensor")
ops = torch.ops.sensibert


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, grid: Grid, compact: CompactWeight | None = None
) -> Tensor:
    """x [..., K], weight [N, K], bias [N] or None, keep bool grid.shape(N, K), True survives -> y [..., N].

    Values in a dropped block of W, NaN included, affect neither y nor a gradient; dweight is exactly 0 there. Columns
    of x (and of dy) whose blocks are all dropped are not read, and their gradient is exactly 0. x, weight and bias have
    one dtype. Autocast casts x and the kept part of the weight.

    compact: the compact weight of this weight and keep (`MaskedAdamW.follow`). It is used while it is valid and has the
    dtype of x; otherwise, and in an exported program, the call gathers from weight.

    SensibertError names the argument that does not fit."""
    if not all(isinstance(t, Tensor) for t in (x, weight, keep)) or not isinstance(bias, Tensor | None):
        for name, value in (("x", x), ("weight", weight), ("keep", keep)):
            want(f"masked_linear: {name}", value, Tensor)
        want("masked_linear: bias", bias, Tensor | None)
    if not isinstance(grid, Grid) or not isinstance(compact, CompactWeight | None):
        want("masked_linear: grid", grid, Grid)
        want("masked_linear: compact", compact, CompactWeight | None)
    if weight.dim() != 2:
        raise SensibertError(f"masked_linear: weight is {tuple(weight.shape)}, want [N, K]")
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise SensibertError(f"masked_linear: x is {tuple(x.shape)}, want [..., {K}] for a weight {(N, K)}")
    if bias is not None and tuple(bias.shape) != (N,):
        raise SensibertError(f"masked_linear: bias is {tuple(bias.shape)}, want ({N},)")
    if keep.dtype != torch.bool or tuple(keep.shape) != grid.shape(N, K):
        fitting = f"torch.bool {grid.shape(N, K)} for the grid {grid}"
        raise SensibertError(f"masked_linear: keep is {keep.dtype} {tuple(keep.shape)}, want {fitting}")
    for name, other in (("weight", weight), ("bias", bias), ("keep", keep)):
        if other is not None and other.device != x.device:
            raise SensibertError(f"masked_linear: {name} is on {other.device}, want {x.device} as x")
        if name != "keep" and other is not None and other.dtype != x.dtype:
            if not torch.is_autocast_enabled(x.device.type):
                raise SensibertError(f"masked_linear: {name} is {other.dtype}, want {x.dtype} as x (or autocast)")
    blocks = (grid.block_rows, grid.block_cols)
    if compact is None or compact.weight is not weight or compact.keep is not keep or torch.compiler.is_exporting():
        return ops.masked_linear(x, weight, bias, keep, *blocks)
    return ops.masked_linear(x, weight, bias, keep, *blocks, compact.matrix, compact.versions)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """The formula at full size: the reference in tests, and the path "reference"."""
    wide = Grid(block_rows, block_cols).expand(keep, *weight.shape)  # [N, K]
    x = x.masked_fill(~wide.any(0), 0)
    return F.linear(x, weight.to(x.dtype).masked_fill(~wide, 0), None if bias is None else bias.to(x.dtype))


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keep: Tensor,
    block_rows: int,
    block_cols: int,
    compact: Tensor | None = None,
    versions: Tensor | None = None,
) -> Tensor:
    at = (keep, Grid(block_rows, block_cols), *weight.shape)
    matrix = valid_matrix(compact, versions, weight, keep, x.dtype)
    path, kept = _plan("fwd", x, at, matrix is not None)
    if path == "reference":
        return reference(x, weight, bias, keep, block_rows, block_cols)
    bias = None if bias is None else bias.to(x.dtype)
    if path == "tiles":
        return ops.masked_linear_tiles(x, _full(weight, matrix, x.dtype), bias, *cached(tile_list, *at), False)
    if path == "bits":
        bits = cached(row_bits, *at)
        return ops.masked_linear_bits(_only(x, kept.cols), _full(weight, matrix, x.dtype), bias, bits, False)
    rows, few = kept.rows, _gather(_flat(x), "cols", at)
    if path == "masked":
        y = F.linear(few, _aligned(_masked("fwd", weight, at, matrix, x.dtype), None, few.shape[1]), bias)
    else:
        w = _compact(path, weight, at, x.dtype) if matrix is None else matrix
        w = _aligned(w, None if rows is None else _width(x, len(w)), few.shape[1])
        some = bias if rows is None or bias is None else F.pad(bias[rows], (0, len(w) - len(rows)))
        y = _spread(F.linear(few, w, some), "rows", at, bias)  # a dropped row of W keeps its bias
    return y.view(*x.shape[:-1], len(weight))


def _dx(
    dy: Tensor,
    weight: Tensor,
    keep: Tensor,
    block_rows: int,
    block_cols: int,
    compact: Tensor | None = None,
    versions: Tensor | None = None,
) -> Tensor:
    """dy [..., N], weight [N, K] -> dx [..., K] = dy (W * keep)."""
    at = (keep, Grid(block_rows, block_cols), *weight.shape)
    matrix = valid_matrix(compact, versions, weight, keep, dy.dtype)
    path, kept = _plan("dx", dy, at, matrix is not None)
    if path == "tiles":
        return ops.masked_linear_tiles(dy, _full(weight, matrix, dy.dtype), None, *cached(column_tile_list, *at), True)
    if path == "bits":
        bits = cached(column_bits, *at)
        return ops.masked_linear_bits(_only(dy, kept.rows), _full(weight, matrix, dy.dtype), None, bits, True)
    few = _gather(_flat(dy), "rows", at)
    if path == "masked":
        dx = few @ _aligned(_masked("dx", weight, at, matrix, dy.dtype), few.shape[1], None)
    else:
        w = _compact(path, weight, at, dy.dtype) if matrix is None else matrix
        w = _aligned(w, few.shape[1], None if kept.cols is None else _width(dy, w.shape[1]))
        dx = _spread(few @ w, "cols", at)
    return dx.view(*dy.shape[:-1], weight.shape[1])


def _dweight(dy: Tensor, x: Tensor, keep: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """dy [..., N], x [..., K] -> dweight [N, K] = (dy^T x) * keep."""
    at = (keep, Grid(block_rows, block_cols), dy.shape[-1], x.shape[-1])
    path, (rows, cols, bits, *_) = _plan("dw", x, at)
    if path == "tiles":
        return ops.masked_linear_tiles_dweight(dy, x, *cached(block_list, *at))
    if path == "masked":
        return blank(_flat(dy).T @ _flat(x), wide_bits("dw", *at), in_place=True)
    dweight = _gather(_flat(dy), "rows", at).T @ _gather(_flat(x), "cols", at)
    n, k = (size if index is None else len(index) for index, size in ((rows, at[2]), (cols, at[3])))
    dweight = _spread(blank(dweight[:n, :k], bits, in_place=True), "cols", at)
    return dweight if rows is None else dweight.new_zeros(at[2:]).index_copy_(0, rows, dweight)


At = tuple[Tensor, Grid, int, int]  # keep, grid, N, K


def _plan(part: str, x: Tensor, at: At, ready: bool = False) -> tuple[str, KeptIndex]:
    kept = kept_index(*at)
    row_share = 1.0 if kept.rows is None else len(kept.rows) / at[2]
    problem = paths.Problem(
        x.shape[:-1].numel(), *at[2:], x.dtype, at[1], kept.density, kept.share, paths.architecture(x.device),
        part, row_share, ready,
    )  # fmt: skip
    return paths.resolve(problem).path, kept


def _compact(path: str, weight: Tensor, at: At, dtype: torch.dtype) -> Tensor:
    """The matrix [n, k] to multiply with: kept rows and columns, in the compute dtype, 0 in the holes."""
    if path == "dense":
        return weight.to(dtype)
    kept = kept_index(*at)
    return blank(_take(_take(weight, kept.rows, 0), kept.cols).to(dtype), kept.bits)


def _masked(part: str, weight: Tensor, at: At, matrix: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The masked matrix whose output axis has full size: [N, k] for part "fwd", [n, K] for "dx"."""
    kept = kept_index(*at)
    if matrix is not None and kept.share == 1:
        return matrix
    taken = _take(weight, kept.cols) if part == "fwd" else _take(weight, kept.rows, 0)
    return blank(taken.to(dtype), wide_bits(part, *at))


def _full(weight: Tensor, matrix: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W [N, K] in the compute dtype, for kernels that apply keep."""
    return matrix if matrix is not None and matrix.shape == weight.shape else weight.to(dtype)


def _flat(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _take(t: Tensor, index: Tensor | None, dim: int = 1) -> Tensor:
    return t if index is None else t.index_select(dim, index)


def _only(t: Tensor, index: Tensor | None) -> Tensor:
    """t [..., K] with 0 in the columns that are not in index, even where t is NaN."""
    return t if index is None else torch.zeros_like(t).index_copy_(-1, index, t.index_select(-1, index))


@cache
def _takes(device_type: str, dtype: torch.dtype) -> bool:
    """Whether take_columns has a kernel for this dtype. The kernel is several times as fast as torch's indexing."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return device_type == "cuda" and dtype in DTYPES and has_kernel("sensibert::take_columns", "CUDA")


def _width(like: Tensor, size: int) -> int:
    """The length of a compact axis of `size` entries: a multiple of ALIGN where take_columns pads with 0."""
    return size + -size % ALIGN if _takes(like.device.type, like.dtype) else size


def _aligned(w: Tensor, num_rows: int | None, num_cols: int | None) -> Tensor:
    """w padded with rows and columns of 0 to this shape; None: the axis is not padded."""
    below, behind = (0 if size is None else size - have for size, have in zip((num_rows, num_cols), w.shape))
    return F.pad(w, (0, behind, 0, below)) if below or behind else w


def _gather(t: Tensor, axis: str, at: At) -> Tensor:
    """t [M, size of the axis of W, "rows" or "cols"] -> [M, number of kept entries, aligned]."""
    index = getattr(kept_index(*at), axis)
    if index is None or not _takes(t.device.type, t.dtype):
        return _take(t, index)
    return ops.take_columns(t, getattr(take_index(*at), axis), None)


def _spread(t: Tensor, axis: str, at: At, fill: Tensor | None = None) -> Tensor:
    """t [M, number of kept entries, aligned or not] -> [M, size of the axis], with fill [size] or 0 elsewhere."""
    index, size = getattr(kept_index(*at), axis), at[2] if axis == "rows" else at[3]
    if index is None:
        return t
    if _takes(t.device.type, t.dtype):
        return ops.take_columns(t, getattr(take_index(*at), f"of_{axis}"), fill)
    empty = t.new_zeros(()) if fill is None else fill
    return empty.expand(len(t), size).clone(memory_format=torch.contiguous_format).index_copy_(1, index, t)


for _name, _kernel in (("", _forward), ("_dx", _dx), ("_dweight", _dweight)):
    impl(OP + _name, "default", _kernel)


@register_fake(OP)
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register_fake(OP + "_dx")
def _(dy: Tensor, weight: Tensor, *_: object) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], weight.shape[1])


@register_fake(OP + "_dweight")
def _(dy: Tensor, x: Tensor, *_: object) -> Tensor:
    return x.new_empty(dy.shape[-1], x.shape[-1])


Grads = tuple[Tensor | None, ...]  # of each input, in order; None: it has none or needs none


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, keep, block_rows, block_cols, *compact = inputs
    _save_product(ctx, x, weight, keep, (block_rows, block_cols), compact)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _save_dx(ctx: Any, inputs: tuple, output: Tensor) -> None:
    dy, weight, keep, block_rows, block_cols, *compact = inputs
    _save_product(ctx, dy, weight, keep, (block_rows, block_cols), compact)


def _save_dweight(ctx: Any, inputs: tuple, output: Tensor) -> None:
    dy, x, keep, block_rows, block_cols = inputs
    _save_product(ctx, dy, x, keep, (block_rows, block_cols))


def _save_product(
    ctx: Any,
    first: Tensor,
    second: Tensor,
    keep: Tensor,
    blocks: tuple[int, int],
    compact: Sequence[Tensor | None] = (None, None),
) -> None:
    """Save both matrices of the product, each only if the gradient of the other is needed; second with its compact
    form."""
    need_first, need_second = ctx.needs_input_grad[:2]
    seconds = (second, *compact) if need_first else (None, None, None)
    ctx.save_for_backward(first if need_second else None, keep, *seconds)
    ctx.blocks, ctx.dtype = blocks, second.dtype


def _backward(ctx: Any, dy: Tensor) -> Grads:  # y = x (W * keep)^T + b
    x, keep, weight, *compact = ctx.saved_tensors
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    dx = ops.masked_linear_dx(dy, weight, keep, *ctx.blocks, *compact) if need_x else None
    dweight = ops.masked_linear_dweight(dy, x, keep, *ctx.blocks).to(ctx.dtype) if need_weight else None
    dbias = _flat(dy).sum(0).to(ctx.bias_dtype) if need_bias else None
    return dx, dweight, dbias, None, None, None, None, None


def _backward_dx(ctx: Any, g: Tensor) -> Grads:  # dx = dy (W * keep)
    dy, keep, weight, *compact = ctx.saved_tensors
    need_dy, need_weight, *_ = ctx.needs_input_grad
    ddy = ops.masked_linear(g, weight, None, keep, *ctx.blocks, *compact) if need_dy else None
    dweight = ops.masked_linear_dweight(dy, g, keep, *ctx.blocks).to(ctx.dtype) if need_weight else None
    return ddy, dweight, None, None, None, None, None


def _backward_dweight(ctx: Any, g: Tensor) -> Grads:  # dweight = (dy^T x) * keep
    dy, keep, x, *_ = ctx.saved_tensors
    need_dy, need_x, *_ = ctx.needs_input_grad
    ddy = ops.masked_linear(x, g, None, keep, *ctx.blocks) if need_dy else None
    dx = ops.masked_linear_dx(dy, g, keep, *ctx.blocks) if need_x else None
    return ddy, dx, None, None, None


for _name, _rule, _setup in (
    ("", _backward, _save),
    ("_dx", _backward_dx, _save_dx),
    ("_dweight", _backward_dweight, _save_dweight),
):
    register_autograd(OP + _name, _rule, setup_context=_setup)


def _autocast(device_type: str) -> Callable[..., Tensor]:
    """Cast x to the autocast dtype, except float64, as torch does. The op casts b and the kept part of W."""

    def cast(x: Tensor, *others: Any) -> Tensor:
        unchanged = x.dtype == torch.float64 or x.device.type != device_type  # `versions` is on the CPU, x may not be
        dtype = x.dtype if unchanged else torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return ops.masked_linear(x.to(dtype), *others)

    return cast


# Not register_autocast: it takes one fixed dtype, but users choose between two.
_library = torch.library.Library("sensibert", "FRAGMENT")
for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("masked_linear", _autocast(_device_type), _key)

# sensibert.ops.masked_linear is the function, which hides the module.
masked_linear.force = paths.force  # type: ignore[attr-defined]
force = paths.force
