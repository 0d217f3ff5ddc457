"""y = x (W * keep)^T + b for any grid of W, with gradients to x, W and b (and to their gradients in turn).

Three ops, so that a traced backward is two calls the compiler knows: masked_linear (NT), masked_linear_dx (NN) and
masked_linear_dweight (TN). Each is linear in both float inputs, and the derivative of any one is the other two.
Accumulation is that of torch's matmul for the dtype (fp32 for fp16 and bf16); deterministic where that is.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake

from ...core.grid import Grid
from . import dispatch as paths
from .bits import column_bits, row_bits
from .dweight import block_list
from .kept_index import ALIGN, Live, blank, live, places, published, remember, wide_bits
from .take_columns import DTYPES
from .tiles import column_tile_list, tile_list

OP = "sensibert::masked_linear"
define(OP, "(Tensor x, Tensor weight, Tensor? bias, Tensor keep, int block_rows, int block_cols) -> Tensor")
define(OP + "_dx", "(Tensor dy, Tensor weight, Tensor keep, int block_rows, int block_cols) -> Tensor")
define(OP + "_dweight", "(Tensor dy, Tensor x, Tensor keep, int block_rows, int block_cols) -> Tensor")
ops = torch.ops.sensibert


def masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, grid: Grid) -> Tensor:
    """x [..., K], weight [N, K], bias [N] or None, keep bool grid.shape(N, K), True survives -> y [..., N].

    What a dropped block of W holds, NaN included, reaches neither y nor a gradient; dweight is exactly 0 there. Columns
    of x (rows of dy) whose blocks are all dropped are not read, and their gradient is exactly 0. One dtype for x,
    weight and bias; under autocast x is cast to its dtype, and of the weight only the kept part. ValueError names the
    argument that does not fit."""
    if weight.dim() != 2:
        raise ValueError(f"masked_linear: weight is {tuple(weight.shape)}, want [N, K]")
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"masked_linear: x is {tuple(x.shape)}, want [..., {K}] for a weight {(N, K)}")
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"masked_linear: bias is {tuple(bias.shape)}, want ({N},)")
    if keep.dtype != torch.bool or tuple(keep.shape) != grid.shape(N, K):
        want = f"torch.bool {grid.shape(N, K)} for the grid {grid}"
        raise ValueError(f"masked_linear: keep is {keep.dtype} {tuple(keep.shape)}, want {want}")
    for name, other in (("weight", weight), ("bias", bias), ("keep", keep)):
        if other is not None and other.device != x.device:
            raise ValueError(f"masked_linear: {name} is on {other.device}, want {x.device} as x")
        if name != "keep" and other is not None and other.dtype != x.dtype:
            if not torch.is_autocast_enabled(x.device.type):
                raise ValueError(f"masked_linear: {name} is {other.dtype}, want {x.dtype} as x (or autocast)")
    return ops.masked_linear(x, weight, bias, keep, grid.block_rows, grid.block_cols)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """The formula at full size: the oracle of the tests, and the path "reference"."""
    wide = Grid(block_rows, block_cols).expand(keep, *weight.shape)  # [N, K]
    x = x.masked_fill(~wide.any(0), 0)
    return F.linear(x, weight.to(x.dtype).masked_fill(~wide, 0), None if bias is None else bias.to(x.dtype))


def _forward(x, weight, bias, keep, block_rows, block_cols):
    at = (keep, Grid(block_rows, block_cols), *weight.shape)
    path, kept = _plan("fwd", x, weight, at)
    if path == "reference":
        return reference(x, weight, bias, keep, block_rows, block_cols)
    bias = None if bias is None else bias.to(x.dtype)
    if path == "tiles":
        return ops.masked_linear_tiles(x, _whole(weight, at, x.dtype), bias, *remember(tile_list, *at), False)
    if path == "bits":
        bits = remember(row_bits, *at)
        return ops.masked_linear_bits(_only(x, kept.cols), _whole(weight, at, x.dtype), bias, bits, False)
    rows, few = kept.rows, _gather(_flat(x), "cols", at)
    if path == "shadow":
        y = F.linear(few, _aligned(_masked("fwd", weight, at, x.dtype), None, few.shape[1]), bias)
    else:
        w = _compact(path, weight, at, x.dtype)
        w = _aligned(w, None if rows is None else _width(x, len(w)), few.shape[1])
        some = bias if rows is None or bias is None else F.pad(bias[rows], (0, len(w) - len(rows)))
        y = _spread(F.linear(few, w, some), "rows", at, bias)  # a dropped row of W still has its bias
    return y.view(*x.shape[:-1], len(weight))


def _dx(dy, weight, keep, block_rows, block_cols):
    """dy [..., N], weight [N, K] -> dx [..., K] = dy (W * keep)."""
    at = (keep, Grid(block_rows, block_cols), *weight.shape)
    path, kept = _plan("dx", dy, weight, at)
    if path == "tiles":
        return ops.masked_linear_tiles(dy, _whole(weight, at, dy.dtype), None, *remember(column_tile_list, *at), True)
    if path == "bits":
        bits = remember(column_bits, *at)
        return ops.masked_linear_bits(_only(dy, kept.rows), _whole(weight, at, dy.dtype), None, bits, True)
    few = _gather(_flat(dy), "rows", at)
    if path == "shadow":
        dx = few @ _aligned(_masked("dx", weight, at, dy.dtype), few.shape[1], None)
    else:
        w = _compact(path, weight, at, dy.dtype)
        w = _aligned(w, few.shape[1], None if kept.cols is None else _width(dy, w.shape[1]))
        dx = _spread(few @ w, "cols", at)
    return dx.view(*dy.shape[:-1], weight.shape[1])


def _dweight(dy, x, keep, block_rows, block_cols):
    """dy [..., N], x [..., K] -> dweight [N, K] = (dy^T x) * keep."""
    at = (keep, Grid(block_rows, block_cols), dy.shape[-1], x.shape[-1])
    path, (rows, cols, bits, *_) = _plan("dw", x, None, at)  # W is not read here
    if path == "tiles":
        return ops.masked_linear_tiles_dweight(dy, x, *remember(block_list, *at))
    if path == "shadow":
        return blank(_flat(dy).T @ _flat(x), wide_bits("dw", *at), in_place=True)
    dweight = _gather(_flat(dy), "rows", at).T @ _gather(_flat(x), "cols", at)
    n, k = (size if index is None else len(index) for index, size in ((rows, at[2]), (cols, at[3])))
    dweight = _spread(blank(dweight[:n, :k], bits, in_place=True), "cols", at)
    return dweight if rows is None else dweight.new_zeros(at[2:]).index_copy_(0, rows, dweight)


At = tuple[Tensor, Grid, int, int]  # keep, grid, N, K


def _plan(part: str, x: Tensor, weight: Tensor | None, at: At) -> tuple[str, Live]:
    kept = live(*at)
    row_share = 1.0 if kept.rows is None else len(kept.rows) / at[2]
    ready = weight is not None and published(weight, *at[:2], x.dtype) is not None
    problem = paths.Problem(
        x.shape[:-1].numel(), *at[2:], x.dtype, at[1], kept.density, kept.share, paths.architecture(x.device),
        part, row_share, ready,
    )  # fmt: skip
    return paths.resolve(problem).path, kept


def _compact(path: str, weight: Tensor, at: At, dtype: torch.dtype) -> Tensor:
    """The matrix [n, k] to multiply with: kept rows and columns, in the compute dtype, 0 in the holes."""
    compact, kept = published(weight, *at[:2], dtype), live(*at)
    if compact is not None:
        return compact
    if path == "dense":
        return weight.to(dtype)
    return blank(_take(_take(weight, kept.rows, 0), kept.cols).to(dtype), kept.bits)


def _masked(part: str, weight: Tensor, at: At, dtype: torch.dtype) -> Tensor:
    """The matrix whose output axis is at full size: [N, k] for part "fwd", [n, K] for "dx"."""
    compact, kept = published(weight, *at[:2], dtype), live(*at)
    if compact is not None and kept.share == 1:
        return compact
    taken = _take(weight, kept.cols) if part == "fwd" else _take(weight, kept.rows, 0)
    return blank(taken.to(dtype), wide_bits(part, *at))


def _whole(weight: Tensor, at: At, dtype: torch.dtype) -> Tensor:
    """W [N, K] in the compute dtype, for kernels that apply keep themselves."""
    compact = published(weight, *at[:2], dtype)
    return compact if compact is not None and compact.shape == weight.shape else weight.to(dtype)


def _flat(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _take(t: Tensor, index: Tensor | None, dim: int = 1) -> Tensor:
    return t if index is None else t.index_select(dim, index)


def _only(t: Tensor, index: Tensor | None) -> Tensor:
    """t [..., K] with 0 in the columns that index leaves out, whatever they hold."""
    return t if index is None else torch.zeros_like(t).index_copy_(-1, index, t.index_select(-1, index))


@cache
def _takes(device_type: str, dtype: torch.dtype) -> bool:
    """Whether take_columns has a kernel for that, which torch's own indexing is several times slower than."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return device_type == "cuda" and dtype in DTYPES and has_kernel("sensibert::take_columns", "CUDA")


def _width(like: Tensor, size: int) -> int:
    """Of a compact axis with so many entries: up to the next multiple of ALIGN where take_columns fills up with 0."""
    return size + -size % ALIGN if _takes(like.device.type, like.dtype) else size


def _aligned(w: Tensor, num_rows: int | None, num_cols: int | None) -> Tensor:
    """w with rows and columns of 0 behind it, up to these numbers; None: as it is."""
    below, behind = (0 if size is None else size - have for size, have in zip((num_rows, num_cols), w.shape))
    return F.pad(w, (0, behind, 0, below)) if below or behind else w


def _gather(t: Tensor, axis: str, at: At) -> Tensor:
    """t [M, size of the axis of W, "rows" or "cols"] -> [M, what is kept of it, aligned]."""
    index = getattr(live(*at), axis)
    if index is None or not _takes(t.device.type, t.dtype):
        return _take(t, index)
    return ops.take_columns(t, getattr(places(*at), axis), None)


def _spread(t: Tensor, axis: str, at: At, fill: Tensor | None = None) -> Tensor:
    """t [M, what is kept of the axis, aligned or not] -> [M, its size], in between fill [size] or 0."""
    index, size = getattr(live(*at), axis), at[2] if axis == "rows" else at[3]
    if index is None:
        return t
    if _takes(t.device.type, t.dtype):
        return ops.take_columns(t, getattr(places(*at), f"of_{axis}"), fill)
    empty = t.new_zeros(()) if fill is None else fill
    return empty.expand(len(t), size).clone(memory_format=torch.contiguous_format).index_copy_(1, index, t)


for _name, _kernel in (("", _forward), ("_dx", _dx), ("_dweight", _dweight)):
    impl(OP + _name, "default", _kernel)


@register_fake(OP)
def _(x, weight, bias, keep, block_rows, block_cols):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register_fake(OP + "_dx")
def _(dy, weight, keep, block_rows, block_cols):
    return dy.new_empty(*dy.shape[:-1], weight.shape[1])


@register_fake(OP + "_dweight")
def _(dy, x, keep, block_rows, block_cols):
    return x.new_empty(dy.shape[-1], x.shape[-1])


def _save(ctx, inputs, output):
    """Both matrices of the product, each only if the other's gradient is wanted, and the keep grid."""
    first, second, *bias, keep, block_rows, block_cols = inputs
    need_first, need_second = ctx.needs_input_grad[:2]
    ctx.save_for_backward(first if need_second else None, second if need_first else None, keep)
    ctx.blocks, ctx.dtypes = (block_rows, block_cols), [None if t is None else t.dtype for t in (second, *bias)]


def _backward(ctx, dy):  # y = x (W * keep)^T + b
    x, weight, keep = ctx.saved_tensors
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    dx = ops.masked_linear_dx(dy, weight, keep, *ctx.blocks) if need_x else None
    dweight = ops.masked_linear_dweight(dy, x, keep, *ctx.blocks).to(ctx.dtypes[0]) if need_weight else None
    dbias = _flat(dy).sum(0).to(ctx.dtypes[1]) if need_bias else None
    return dx, dweight, dbias, None, None, None


def _backward_dx(ctx, g):  # dx = dy (W * keep)
    dy, weight, keep = ctx.saved_tensors
    need_dy, need_weight, *_ = ctx.needs_input_grad
    ddy = ops.masked_linear(g, weight, None, keep, *ctx.blocks) if need_dy else None
    dweight = ops.masked_linear_dweight(dy, g, keep, *ctx.blocks).to(ctx.dtypes[0]) if need_weight else None
    return ddy, dweight, None, None, None


def _backward_dweight(ctx, g):  # dweight = (dy^T x) * keep
    dy, x, keep = ctx.saved_tensors
    need_dy, need_x, *_ = ctx.needs_input_grad
    ddy = ops.masked_linear(x, g, None, keep, *ctx.blocks) if need_dy else None
    dx = ops.masked_linear_dx(dy, g, keep, *ctx.blocks) if need_x else None
    return ddy, dx, None, None, None


for _name, _rule in (("", _backward), ("_dx", _backward_dx), ("_dweight", _backward_dweight)):
    register_autograd(OP + _name, _rule, setup_context=_save)


def _autocast(device_type: str):
    """x goes to the autocast dtype (float64 stays, as in torch); W and b are cast inside, only what is kept of W."""

    def cast(x, weight, bias, keep, block_rows, block_cols):
        dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return ops.masked_linear(x.to(dtype), weight, bias, keep, block_rows, block_cols)

    return cast


_library = torch.library.Library("sensibert", "FRAGMENT")  # register_autocast knows one fixed dtype, users have two
for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("masked_linear", _autocast(_device_type), _key)

masked_linear.force = paths.force  # where sensibert.ops.masked_linear is the function, not the module
force = paths.force
