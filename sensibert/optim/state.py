"""Changes of optimizer state when a parameter is trimmed or masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core.arguments import checked
from ..core.errors import SensibertError
from ..core.grid import Grid
from ..ops.gather_kept import DTYPES, gather_kept
from ..ops.masked_adamw import matrix_shape
from .masked_adamw import MaskedAdamW

Index = Mapping[int, Tensor]  # axis -> kept positions [n] int64, in their new order; other axes are not cut


def take_kept(requests: Sequence[tuple[Tensor, Index]]) -> list[Tensor]:
    """The kept positions of each (tensor, index): bit for bit the result of `index_select`.

    All float vectors and matrices of a device are gathered by one call of `gather_kept`. IndexError on a CPU for a
    position outside its axis."""
    taken: list[Tensor] = [tensor for tensor, _ in requests]
    together: dict[torch.device, list[int]] = {}
    for t, (tensor, index) in enumerate(requests):
        if tensor.dim() in (1, 2) and tensor.dtype in DTYPES and index:
            together.setdefault(tensor.device, []).append(t)
        else:
            for dim, kept in index.items():
                taken[t] = taken[t].index_select(dim, kept.to(tensor.device))
    for device, chosen in together.items():
        matrices = [taken[t].unsqueeze(1) if taken[t].dim() == 1 else taken[t] for t in chosen]
        here = [{dim: kept.to(device) for dim, kept in requests[t][1].items()} for t in chosen]
        small = gather_kept(matrices, *([index.get(dim) for index in here] for dim in (0, 1)))
        for t, matrix in zip(chosen, small, strict=True):
            taken[t] = matrix.flatten() if taken[t].dim() == 1 else matrix
    return taken


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


@checked
def slice_state(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor, index: Index) -> None:
    """Replace the parameter `old` of `optimizer` by the smaller `new`, and cut its state in the same way.

    index: axis -> kept positions [n] int64, in their new order; other axes are not cut. State tensors in the shape of
    `old`, the factors of Adafactor and the keep of MaskedAdamW are cut; single numbers (step counts) are copied; a
    working copy or score of `old` is dropped. Works for every torch optimizer, also inside accelerate's wrapper
    (`.optimizer`). SensibertError if `old` is not in a param group, if the shape of `new` does not agree with index, or
    for a state of another shape; the optimizer is then unchanged.
    """
    shape = list(old.shape)
    for dim, kept in index.items():
        if not 0 <= dim < len(shape) or kept.dtype != torch.int64 or kept.dim() != 1:
            came = f"{kept.dtype} {tuple(kept.shape)} for axis {dim}"
            raise SensibertError(
                f"slice_state: index is {came}, want torch.int64 [n] for an axis of old {tuple(shape)}"
            )
        shape[dim] = len(kept)
    if list(new.shape) != shape:
        raise SensibertError(f"slice_state: new is {tuple(new.shape)}, want {tuple(shape)} as index leaves of old")
    cuts = state_cuts(optimizer, old, index)
    swap(optimizer, old, new, dict(zip(cuts, take_kept(list(cuts.values())), strict=True)))


def state_cuts(optimizer: torch.optim.Optimizer, old: Tensor, index: Index) -> dict[str, tuple[Tensor, Index]]:
    """The state of `old` that has to be cut: name -> (tensor, index) for `take_kept`. SensibertError as in
    `slice_state`."""
    optimizer = unwrapped(optimizer)
    if not any(p is old for group in optimizer.param_groups for p in group["params"]):
        raise SensibertError(f"slice_state: old {tuple(old.shape)} is in none of the optimizer's param_groups")
    cuts = {}
    state = optimizer.state[old] if old in optimizer.state else {}
    for name, value in state.items():
        if name == "keep":  # as single elements: a cut may split blocks
            keep = Grid(*state["keep_grid"]).expand(value, *matrix_shape(old))
            cuts[name] = keep.reshape(old.shape), index
        elif isinstance(value, Tensor) and value.numel() != 1 and name != "step":
            cuts[name] = value, _state_index(optimizer, name, value, old, index)
    return cuts


def swap(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor, taken: Mapping[str, Tensor]) -> None:
    """Replace `old` by `new`, with the tensors in taken as its state. Cannot fail after `state_cuts`."""
    optimizer = unwrapped(optimizer)
    for group in optimizer.param_groups:
        group["params"][:] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        state = {**optimizer.state.pop(old), **taken}
        if "keep" in state:
            state["keep"], state["keep_grid"] = state["keep"].reshape(matrix_shape(new)), (1, 1)
            if state["keep"].all():
                del state["keep"], state["keep_grid"]
        optimizer.state[new] = state
    if isinstance(optimizer, MaskedAdamW):
        optimizer.forget(old)


def _state_index(optimizer: torch.optim.Optimizer, name: str, value: Tensor, old: Tensor, index: Index) -> Index:
    """The index for a state tensor: one in the shape of `old`, or a factor of Adafactor (arXiv 1804.04235)."""
    if value.dim() == old.dim() and all(n in (1, full) for n, full in zip(value.shape, old.shape, strict=True)):
        return {dim: kept for dim, kept in index.items() if value.shape[dim] == old.shape[dim]}
    for dim, end in ((0, "_row"), (1, "_col")):  # the names in transformers
        if old.dim() == 2 and name.endswith(end) and value.shape == old.shape[dim : dim + 1]:
            return {0: index[dim]} if dim in index else {}
    raise SensibertError(
        f"slice_state: {type(optimizer).__name__} keeps {name} {tuple(value.shape)} for a parameter "
        f"{tuple(old.shape)}, want a state that can be cut (not quantized)"
    )


def mask_state(optimizer: torch.optim.Optimizer, param: Tensor, keep: Tensor, grid: Grid) -> None:
    """Set the state of the dropped weights of `param` to 0. A MaskedAdamW also gets the mask.

    Works for every torch optimizer, also inside accelerate's wrapper (`.optimizer`)."""
    optimizer = unwrapped(optimizer)
    if isinstance(optimizer, MaskedAdamW):
        optimizer.set_keep(param, keep, grid)
    dropped = ~grid.expand(keep.to(param.device), *matrix_shape(param)).view(param.shape)
    for name, value in optimizer.state.get(param, {}).items():
        if isinstance(value, Tensor) and value.shape == param.shape and name not in ("step", "keep"):
            value.masked_fill_(dropped, 0)
