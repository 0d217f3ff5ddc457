"""Optimizer state that follows a parameter when it shrinks or is masked."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..core.grid import Grid
from ..ops.masked_adamw import matrix_shape
from .masked_adamw import MaskedAdamW


def unwrapped(optimizer):
    """The torch optimizer inside the wrappers of accelerate."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def slice_state(optimizer, old: Tensor, new: Tensor, index: Mapping[int, Tensor]) -> None:
    """Let `optimizer` hold the smaller parameter `new` in the place of `old`, with its state cut alike.

    index: axis -> kept positions [n] int64, in their new order; axes left out stay whole. Every state tensor of the
    shape of `old` is cut, and so are the factors of Adafactor and a keep of MaskedAdamW; single numbers (step counts)
    are carried over; its working copy and score are let go. Any torch optimizer, also one wrapped by accelerate
    (`.optimizer`). ValueError if `old` is not held, if `new` has not the shape that index leaves, or for a state of
    another shape.
    """
    optimizer = unwrapped(optimizer)
    shape = list(old.shape)
    for dim, kept in index.items():
        shape[dim] = len(kept)
    if list(new.shape) != shape:
        raise ValueError(f"slice_state: new is {tuple(new.shape)}, want {tuple(shape)} as index leaves of old")
    places = [(g["params"], i) for g in optimizer.param_groups for i, p in enumerate(g["params"]) if p is old]
    if not places:
        raise ValueError(f"slice_state: old {tuple(old.shape)} is in none of the optimizer's param_groups")
    state = dict(optimizer.state[old]) if old in optimizer.state else None
    if state is not None and "keep" in state:  # its blocks need not survive the cut as blocks: single elements do
        keep = Grid(*state.pop("keep_grid")).expand(state.pop("keep"), *matrix_shape(old))
        keep = _take(keep.reshape(old.shape), index).reshape(matrix_shape(new))
        if not keep.all():
            state["keep"], state["keep_grid"] = keep, (1, 1)
    for name, value in (state or {}).items():
        if isinstance(value, Tensor) and value.numel() != 1 and name not in ("step", "keep"):
            state[name] = _take(value, _state_index(optimizer, name, value, old, index))
    # Nothing has been changed so far: an error above leaves the optimizer as it was.
    for params, i in places:
        params[i] = new
    if state is not None:
        del optimizer.state[old]
        optimizer.state[new] = state
    if isinstance(optimizer, MaskedAdamW):
        optimizer.forget(old)


def _state_index(optimizer, name: str, value: Tensor, old: Tensor, index: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The index for a state tensor: of the shape of `old`, or one of the factors of Adafactor (arXiv 1804.04235)."""
    if value.dim() == old.dim() and all(n in (1, full) for n, full in zip(value.shape, old.shape, strict=True)):
        return {dim: kept for dim, kept in index.items() if value.shape[dim] == old.shape[dim]}
    for dim, end in ((0, "_row"), (1, "_col")):  # as transformers has them
        if old.dim() == 2 and name.endswith(end) and value.shape == old.shape[dim : dim + 1]:
            return {0: index[dim]} if dim in index else {}
    raise ValueError(
        f"slice_state: {type(optimizer).__name__} keeps {name} {tuple(value.shape)} for a parameter "
        f"{tuple(old.shape)}, want a state that can be cut along (quantized ones cannot)"
    )


def mask_state(optimizer, param: Tensor, keep: Tensor, grid: Grid) -> None:
    """Set what `optimizer` remembers of the dropped weights of `param` to 0; a MaskedAdamW is told the keep as well.

    Any torch optimizer, also one wrapped by accelerate (`.optimizer`)."""
    optimizer = unwrapped(optimizer)
    if isinstance(optimizer, MaskedAdamW):
        optimizer.set_keep(param, keep, grid)
    dropped = ~grid.expand(keep.to(param.device), *matrix_shape(param)).view(param.shape)
    for name, value in optimizer.state.get(param, {}).items():
        if isinstance(value, Tensor) and value.shape == param.shape and name not in ("step", "keep"):
            value.masked_fill_(dropped, 0)


def _take(tensor: Tensor, index: Mapping[int, Tensor]) -> Tensor:
    for dim, kept in index.items():
        tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor
