"""Model and kept blocks -> masked model: what `trim` does with a plan of blocks. Dropped weights are and stay 0.

The layers become MaskedLinear, whose gradient is exactly 0 in dropped blocks. As weight and moments are 0 too, no step
of an optimizer that multiplies and adds (weight decay, momentum, Adam) changes such a weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core.errors import SensibertError
from ..core.grid import Grid
from ..models import base_of
from ..models.masks import Masks, set_masks
from ..models.structure import is_trimmed
from ..optim.state import mask_state


@torch.no_grad()
def mask_blocks(
    model: nn.Module, keep: Mapping[str, Tensor], grid: Grid, optimizer: torch.optim.Optimizer | None = None
) -> nn.Module:
    """Zero and mask what `keep` drops, in the model and in the state of its optimizer, in place; return the model.

    keep: name of a parameter in the base model -> bool [blocks of rows, blocks of columns], True = kept. A block that
    an earlier mask dropped trains again, from 0. SensibertError if whole units were cut from the model, or if keep does
    not fit; the model is then as it was."""
    if is_trimmed(model):
        raise SensibertError(f"trim: the model has lost whole units already, want a whole one for grid {grid}")
    state, held = dict(base_of(model).named_parameters()), set()
    if optimizer is not None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(state.get(name)) in held for name in keep):
            raise SensibertError("trim: the optimizer holds none of the weights, want the optimizer of this model")
    set_masks(model, Masks(grid, dict(keep)))
    for name, kept in keep.items():
        weight = state[name]
        dropped = ~grid.expand(kept.to(weight.device), *weight.shape)
        for tensor in (weight, weight.grad):
            if tensor is not None:
                tensor.masked_fill_(dropped, 0)
        if optimizer is not None and id(weight) in held:
            mask_state(optimizer, weight, kept, grid)
    return model
