"""Optimizer state under trimming: slicing it along with a parameter that shrinks."""

from __future__ import annotations

import torch
from torch import Tensor


def _unwrap(optimizer) -> torch.optim.Optimizer:
    """accelerate's AcceleratedOptimizer (and its like) hold the real one in `.optimizer`."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _take(tensor: Tensor, index: dict[int, Tensor]) -> Tensor:
    for dim, kept in index.items():
        tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor


def slice_state(optimizer, old: Tensor, new: Tensor, index: dict[int, Tensor]) -> None:
    """Let `optimizer` hold the smaller parameter `new` in the place of `old`, with its state cut alike.

    index: axis -> kept positions [n] int64, in their new order; axes left out stay whole. Every state tensor of the shape
    of `old` is cut, all others (step counts) are carried over. Any torch optimizer, also one wrapped by accelerate.
    ValueError if `old` is not held, or if `new` has not the shape that index leaves.
    """
    optimizer = _unwrap(optimizer)
    shape = list(old.shape)
    for dim, kept in index.items():
        shape[dim] = len(kept)
    if list(new.shape) != shape:
        raise ValueError(f"slice_state: new is {tuple(new.shape)}, want {tuple(shape)} as index leaves of old")
    places = [(g["params"], i) for g in optimizer.param_groups for i, p in enumerate(g["params"]) if p is old]
    if not places:
        raise ValueError(f"slice_state: old {tuple(old.shape)} is in none of the optimizer's param_groups")
    for params, i in places:
        params[i] = new
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == old.shape and value.ndim:
                state[name] = _take(value, index)
        optimizer.state[new] = state
