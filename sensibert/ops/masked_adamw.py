"""One AdamW step over all tensors of all groups, with masks, a bf16 working copy and the sensitivity in the same pass.

g = grad * grad_factor
w = w * (1 - lr * weight_decay)
m = beta1 * m + (1 - beta1) * g,   v = beta2 * v + (1 - beta2) * g^2
w = w - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)        Loshchilov and Hutter, 1711.05101
w, m, v = 0 where keep is False;   working copy = bf16(w), or only its kept rows and columns
score = decay * score + scale * finish(sum over the block of reduce(w before the step, g)), survivors only
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import SensibertError
from ..core.grid import Grid
from .block_sensitivity import FINISHES, REDUCES
from .checked import checked

OP = "sensibert::masked_adamw_"
_MOMENTS = "Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor[] step, "
_SETTINGS = "int[] group, float[] beta1, float[] beta2, float[] eps, float[] weight_decay, "
_EXTRAS = (
    "Tensor[] keep, int[] keep_of, int[] keep_blocks, Tensor(d!)[] working_copy, int[] working_copy_of, "
    "Tensor[] row_map, int[] row_map_of, Tensor[] col_map, int[] col_map_of, "
    "Tensor(e!)[] score, int[] score_of, int[] score_blocks, str reduce, str finish, float decay, float scale"
)
torch.library.define(
    OP,
    f"(Tensor(a!)[] param, Tensor[] grad, {_MOMENTS}Tensor lr, {_SETTINGS}Tensor? grad_factor, {_EXTRAS}) -> ()",
)
HOLD, RUN = "sensibert::masked_adamw_hold", "sensibert::masked_adamw_run_"
torch.library.define(HOLD, f"({_MOMENTS}{_SETTINGS}{_EXTRAS}) -> Tensor")
torch.library.define(RUN, "(Tensor held, Tensor(a!)[] param, Tensor[] grad, Tensor lr, Tensor? grad_factor) -> bool")


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """[N, ...] seen as [N, K]; a vector is [N, 1], a scalar [1, 1]."""
    num_rows = tensor.shape[0] if tensor.ndim else 1
    return num_rows, tensor.shape[1:].numel() if tensor.ndim else 1


@checked
def masked_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    groups: Sequence[int],
    betas: Sequence[tuple[float, float]],
    eps: Sequence[float],
    weight_decay: Sequence[float],
    *,
    grad_factor: Tensor | None = None,
    keeps: Mapping[int, tuple[Tensor, Grid]] | None = None,
    working_copies: Mapping[int, Tensor] | None = None,
    row_maps: Mapping[int, Tensor] | None = None,
    col_maps: Mapping[int, Tensor] | None = None,
    scores: Mapping[int, tuple[Tensor, Grid]] | None = None,
    reduce: str = "abs",
    finish: str = "none",
    decay: float = 1.0,
    scale: float = 1.0,
) -> None:
    """Update params, exp_avgs and exp_avg_sqs in place: fp32, bf16, fp16 or fp64, one dtype per tensor.

    steps: one fp32 per tensor, the number of this step; the first is 1. groups: the group of each tensor. lr [G]: fp32,
    or fp64 for fp64 params. betas, eps, weight_decay: one entry per group. grad_factor: one fp32, multiplies every
    gradient (clipping, inverse loss scale). keeps, working_copies, scores: by position in params; keep bool and score
    fp32 in the shape of their grid, a working copy bf16 in the shape of its param. row_maps, col_maps (`index_map`):
    int32 [N], [K] for a compact working copy [n, k]; they give the row and column of the copy for each of the weight
    [N, K], or -1. Without a map the axis is complete. Every row and column of the copy must be in its map. All tensors
    are on one device; no synchronization; deterministic. SensibertError names an argument that does not fit.
    """
    _check(params, grads, exp_avgs, exp_avg_sqs, steps, lr, groups, betas, eps, weight_decay)
    if reduce not in REDUCES or finish not in FINISHES:
        raise SensibertError(
            f"masked_adamw: reduce, finish are {reduce!r}, {finish!r}, want one of {REDUCES}, {FINISHES}"
        )
    if grad_factor is not None:
        _check_scalar("grad_factor", grad_factor, lr.device)
    keeps, working_copies, scores = keeps or {}, working_copies or {}, scores or {}
    _check_blocks("keep", keeps, torch.bool, params)
    _check_blocks("score", scores, torch.float32, params)
    row_maps, col_maps = row_maps or {}, col_maps or {}
    _check_working_copies(working_copies, row_maps, col_maps, params)
    mutated = [*params, *exp_avgs, *exp_avg_sqs, *working_copies.values(), *(score for score, _ in scores.values())]
    packed = [tensor.contiguous() for tensor in mutated]  # the kernels walk flat memory
    tensors = iter(packed)
    # Kernels compute in 32 bits; double precision takes the reference everywhere.
    wide = any(p.dtype == torch.float64 for p in params)
    step: Callable[..., None] = reference if wide else torch.ops.sensibert.masked_adamw_
    step(
        [next(tensors) for _ in params],
        [grad.contiguous() for grad in grads],
        [next(tensors) for _ in params],
        [next(tensors) for _ in params],
        list(steps),
        lr,
        *_listed_settings(groups, betas, eps, weight_decay),
        grad_factor,
        *_listed_extras(
            {t: (keep.contiguous(), grid) for t, (keep, grid) in keeps.items()},
            {t: next(tensors) for t in working_copies},
            {t: row_map.contiguous() for t, row_map in row_maps.items()},
            {t: col_map.contiguous() for t, col_map in col_maps.items()},
            {t: (next(tensors), grid) for t, (_, grid) in scores.items()},
            reduce,
            finish,
            decay,
            scale,
        ),
    )
    for tensor, copy in zip(mutated, packed, strict=True):
        if tensor is not copy:
            tensor.copy_(copy)


def _listed_settings(
    groups: Sequence[int], betas: Sequence[tuple[float, float]], eps: Sequence[float], weight_decay: Sequence[float]
) -> tuple[list, ...]:
    """Settings as arguments of the op."""
    return list(groups), [beta[0] for beta in betas], [beta[1] for beta in betas], list(eps), list(weight_decay)


def _listed_extras(
    keeps: Mapping[int, tuple[Tensor, Grid]],
    working_copies: Mapping[int, Tensor],
    row_maps: Mapping[int, Tensor],
    col_maps: Mapping[int, Tensor],
    scores: Mapping[int, tuple[Tensor, Grid]],
    reduce: str,
    finish: str,
    decay: float,
    scale: float,
) -> tuple:
    """Masks, working copies and scores as arguments of the op."""
    return (
        [keep for keep, _ in keeps.values()],
        list(keeps),
        [size for _, grid in keeps.values() for size in (grid.block_rows, grid.block_cols)],
        list(working_copies.values()),
        list(working_copies),
        list(row_maps.values()),
        list(row_maps),
        list(col_maps.values()),
        list(col_maps),
        [score for score, _ in scores.values()],
        list(scores),
        [size for _, grid in scores.values() for size in (grid.block_rows, grid.block_cols)],
        reduce,
        finish,
        decay,
        scale,
    )


_masked_adamw = inspect.unwrap(masked_adamw)  # without the check of its arguments' types


class HeldAdamW:
    """masked_adamw for many calls on the same tensors with the same settings. Takes less host time.

    `extras`: all keyword arguments of masked_adamw except grad_factor. The first call runs masked_adamw; later calls
    pass only parameters, gradients and learning rates to a kernel. The other arguments are held as tensors, not as
    addresses, and checked at every call: if one no longer fits, the call runs masked_adamw. So do all calls where there
    is no kernel. Types of arguments are checked by the first call alone."""

    def __init__(
        self,
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        groups: Sequence[int],
        betas: Sequence[tuple[float, float]],
        eps: Sequence[float],
        weight_decay: Sequence[float],
        **extras: Any,
    ) -> None:
        self._params, self._moments = params, (exp_avgs, exp_avg_sqs, steps)
        self._settings, self._extras = (groups, betas, eps, weight_decay), extras
        self._held: Tensor | None = None
        self._checked = False

    def __call__(self, grads: list[Tensor], lr: Tensor, grad_factor: Tensor | None) -> None:
        if self._checked and self._run(grads, lr, grad_factor):
            return
        groups, betas, eps, weight_decay = self._settings
        step = _masked_adamw if self._checked else masked_adamw
        step(
            self._params, grads, *self._moments, lr, groups, betas, eps, weight_decay,
            grad_factor=grad_factor, **self._extras,
        )  # fmt: skip
        self._checked = True

    def _run(self, grads: list[Tensor], lr: Tensor, grad_factor: Tensor | None) -> bool:
        """Run the step in a kernel; False if no kernel can."""
        if self._held is None:
            lists = *self._moments, *_listed_settings(*self._settings), *_listed_extras(**self._extras)
            self._held = torch.ops.sensibert.masked_adamw_hold(*lists)
        if self._held.numel() == 0:
            return False
        return torch.ops.sensibert.masked_adamw_run_.default(self._held, self._params, grads, lr, grad_factor)


def _named(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    groups: Sequence[int],
    betas: Sequence[tuple[float, float]],
    eps: Sequence[float],
    weight_decay: Sequence[float],
) -> None:
    lists: dict[str, Sequence[Any]] = {
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "steps": steps,
        "groups": groups,
    }
    for name, values in lists.items():
        if len(values) != len(params):
            raise SensibertError(f"masked_adamw: {name} has {len(values)} entries, want {len(params)} as params")
    for name, values in {"betas": betas, "eps": eps, "weight_decay": weight_decay}.items():
        if lr.ndim != 1 or len(values) != lr.shape[0]:
            raise SensibertError(
                f"masked_adamw: {name} has {len(values)} entries, lr is {tuple(lr.shape)}: one a group"
            )
    num_groups, device = lr.shape[0], lr.device
    for t, (param, grad, exp_avg, exp_avg_sq, step, group) in enumerate(zip(params, *lists.values(), strict=True)):
        if not param.dtype.is_floating_point or param.device != device:
            raise SensibertError(
                f"masked_adamw: params[{t}] is {_named(param)}, want a floating type on {device} as lr"
            )
        kind = (param.shape, param.dtype, device)
        for name, other in (("grads", grad), ("exp_avgs", exp_avg), ("exp_avg_sqs", exp_avg_sq)):
            if (other.shape, other.dtype, other.device) != kind:
                raise SensibertError(f"masked_adamw: {name}[{t}] is {_named(other)}, want {_named(param)}")
        _check_scalar(f"steps[{t}]", step, device)
        if not 0 <= group < num_groups:
            raise SensibertError(f"masked_adamw: groups[{t}] is {group}, want 0 to {num_groups - 1}")


def _check_scalar(name: str, value: Tensor, device: torch.device) -> None:
    if value.numel() != 1 or value.dtype != torch.float32 or value.device != device:
        raise SensibertError(f"masked_adamw: {name} is {_named(value)}, want one float32 on {device} as lr")


def _check_blocks(
    name: str, entries: Mapping[int, tuple[Tensor, Grid]], dtype: torch.dtype, params: Sequence[Tensor]
) -> None:
    for t, (value, grid) in entries.items():
        if not 0 <= t < len(params):
            raise SensibertError(f"masked_adamw: {name} is for params[{t}], of {len(params)}")
        shape = grid.shape(*matrix_shape(params[t]))
        if value.dtype != dtype or tuple(value.shape) != shape or value.device != params[t].device:
            want = f"{str(dtype).removeprefix('torch.')} {shape} on {params[t].device}"
            raise SensibertError(f"masked_adamw: {name} of params[{t}] is {_named(value)}, want {want} (grid {grid})")


def _check_working_copies(
    working_copies: Mapping[int, Tensor],
    row_maps: Mapping[int, Tensor],
    col_maps: Mapping[int, Tensor],
    params: Sequence[Tensor],
) -> None:
    for name, maps, axis in (("row_map", row_maps, 0), ("col_map", col_maps, 1)):
        for t, of in maps.items():
            if t not in working_copies:
                raise SensibertError(f"masked_adamw: {name} is for params[{t}], which has no working_copy")
            size = matrix_shape(params[t])[axis]
            if (of.dtype, tuple(of.shape), of.device) != (torch.int32, (size,), params[t].device):
                want = f"int32 ({size},) on {params[t].device}"
                raise SensibertError(f"masked_adamw: {name} of params[{t}] is {_named(of)}, want {want}")
    for t, working_copy in working_copies.items():
        shape = tuple(params[t].shape)
        if t in row_maps or t in col_maps:  # not checked: every row and column of the copy is in its map
            N, K = matrix_shape(params[t])
            n, k = (*working_copy.shape, -1, -1)[:2]
            shape = (n if t in row_maps and 0 <= n <= N else N, k if t in col_maps and 0 <= k <= K else K)
        if (working_copy.dtype, tuple(working_copy.shape), working_copy.device) != (
            torch.bfloat16,
            shape,
            params[t].device,
        ):
            raise SensibertError(f"masked_adamw: working_copy[{t}] is {_named(working_copy)}, want bfloat16 {shape}")


def index_map(index: Tensor, size: int) -> Tensor:
    """The kept positions [n] of an axis -> int32 [size]: the rank of each among the kept ones, -1 for the others."""
    ranks = torch.full((size,), -1, dtype=torch.int32, device=index.device)
    ranks[index] = torch.arange(len(index), dtype=torch.int32, device=index.device)
    return ranks


_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _keep_bits(keep: Tensor, block_rows: int, block_cols: int, like: Tensor) -> Tensor:
    """keep, one bool per block -> integers with all bits set (kept) or no bit set; broadcastable to [N, K]."""
    for dim, block, length in zip((0, 1), (block_rows, block_cols), matrix_shape(like), strict=True):
        if block > 1:  # 0, the whole axis, has one entry
            keep = keep.repeat_interleave(block, dim).narrow(dim, 0, length)
    return keep.to(_INTEGER[like.itemsize]).neg_()


def _as_bits(tensor: Tensor) -> Tensor:
    """[N, K] integers in the same memory. Masking them clears a NaN too, and is faster than masked_fill_."""
    return tensor.view(matrix_shape(tensor)).view(_INTEGER[tensor.itemsize])


@torch.no_grad()
def reference(
    param: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], step: list[Tensor],
    lr: Tensor, group: list[int], beta1: list[float], beta2: list[float], eps: list[float], weight_decay: list[float],
    grad_factor: Tensor | None, keep: list[Tensor], keep_of: list[int], keep_blocks: list[int],
    working_copy: list[Tensor], working_copy_of: list[int], row_map: list[Tensor], row_map_of: list[int],
    col_map: list[Tensor], col_map_of: list[int], score: list[Tensor], score_of: list[int], score_blocks: list[int],
    reduce: str, finish: str, decay: float, scale: float,
) -> None:  # fmt: skip
    settings = list(zip(lr.unbind(), beta1, beta2, eps, weight_decay, strict=True))
    kept, scored, copied = ({t: i for i, t in enumerate(of)} for of in (keep_of, score_of, working_copy_of))
    maps = [dict(zip(of, given, strict=True)) for of, given in ((row_map_of, row_map), (col_map_of, col_map))]
    plain = defaultdict(list)
    for t, (w, g, m, v) in enumerate(zip(param, grad, exp_avg, exp_avg_sq, strict=True)):
        if w.numel() == 0:
            continue
        if t not in kept and t not in scored and t not in copied:
            plain[group[t], w.dtype].append((w, g, m, v, step[t]))
            continue
        # Tensor by tensor: each is still in a cache, and temporary memory is reused.
        g = _scaled(g, grad_factor)
        shape, i, j = matrix_shape(w), kept.get(t), scored.get(t)
        bits = None if i is None else _keep_bits(keep[i], keep_blocks[2 * i], keep_blocks[2 * i + 1], w)
        if j is not None:
            if bits is not None:  # scores count survivors only
                _as_bits(w).bitwise_and_(bits)
                g = (_as_bits(g) & bits).view(g.dtype).view(g.shape)
            total, blocks = [score[j]], score_blocks[2 * j : 2 * j + 2]
            weight, gradient = [w.view(shape)], [g.view(shape)]
            torch.ops.sensibert.block_sensitivity_(total, weight, gradient, blocks, reduce, finish, decay, scale)
        _adamw([w], [g], [m], [v], [step[t]], *settings[group[t]])
        if bits is not None:
            for tensor in (w, m, v):
                _as_bits(tensor).bitwise_and_(bits)
        if t in copied:
            out, compact = working_copy[copied[t]], w
            for dim, ranks in enumerate(of.get(t) for of in maps):
                if ranks is not None:  # sorted, the ranks are -1, ..., -1, 0, ..., n - 1
                    index = ranks.argsort()[len(ranks) - out.shape[dim] :]
                    compact = compact.view(matrix_shape(compact)).index_select(dim, index)
            out.copy_(compact)
    for (number, _), entries in plain.items():
        _plain_adamw(entries, grad_factor, *settings[number])


def _scaled(grad: Tensor, factor: Tensor | None) -> Tensor:
    """grad * factor, multiplied in fp32: 1 / 65536 is 0 in half precision."""
    if factor is None:
        return grad
    factor = factor.view(())
    return grad * factor if grad.itemsize > 2 else (grad.float() * factor).to(grad.dtype)


_PIECE = 1 << 17  # elements per piece, so that a scaled gradient fits into the cache of a CPU


def _plain_adamw(entries: Sequence[tuple[Tensor, ...]], factor: Tensor | None, *settings: Any) -> None:
    """_adamw of (w, grad, m, v, step) of one dtype. Large gradients are scaled in pieces, to need little memory."""
    together, scratch = [], None
    for w, g, m, v, step in entries:
        if factor is None or not w.is_cpu or w.numel() <= _PIECE or w.itemsize == 2:
            together.append((w, _scaled(g, factor), m, v, step))
            continue
        scratch = torch.empty(_PIECE, dtype=g.dtype) if scratch is None else scratch
        for *piece, grad in zip(*(tensor.view(-1).split(_PIECE) for tensor in (w, m, v, g)), strict=True):
            w, m, v = piece
            scaled = torch.mul(grad, factor.view(()), out=scratch[: len(grad)])
            _adamw([w], [scaled], [m], [v], [step], *settings)
    if together:
        params, grads, exp_avgs, exp_avg_sqs, steps = map(list, zip(*together, strict=True))
        _adamw(params, grads, exp_avgs, exp_avg_sqs, steps, *settings)


def _adamw(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], steps: list[Tensor],
    lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """torch's fused kernel: one pass over memory, arithmetic in fp32 for half precision."""
    if not lr.is_cpu and lr.dtype == torch.float64:
        if params[0].dtype == torch.float64:
            for entry in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
                _adamw_in_double(*entry, lr, beta1, beta2, eps, weight_decay)
            return
        lr = lr.float()
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, [], steps,
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip


def _adamw_in_double(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor,
    lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """For a GPU: torch's kernel there takes a float32 learning rate only."""
    w.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    step = step.double()
    w.sub_(lr / (1 - beta1**step) * m / ((v / (1 - beta2**step)).sqrt_().add_(eps)))


def _nothing_held(*_: object) -> Tensor:
    """An empty handle: no kernel holds tensors on this device."""
    return torch.empty(0, dtype=torch.uint8)


torch.library.register_kernel(HOLD, "default", _nothing_held)
torch.library.register_fake(HOLD, _nothing_held)
torch.library.register_kernel(OP, "default", reference)  # not as a decorator: it would bind the name to None


@torch.library.register_fake(OP)
def _fake(*args: object) -> None:
    return None
