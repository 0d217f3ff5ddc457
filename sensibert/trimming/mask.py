"""Model and kept blocks -> masked model: `trim` with a plan of blocks. Dropped weights become and remain 0.

The layers become MaskedLinear, whose gradient is exactly 0 in dropped blocks. Weights and moments are 0 there too, so
weight decay, momentum and Adam do not change them.
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
    """Set dropped blocks to 0 and mask them, in the model and in its optimizer's state, in place; return the model.

    keep: name of a parameter in the base model -> bool [blocks of rows, blocks of columns], True = kept. A block that
    was dropped by an earlier mask and is kept now trains again, from 0. SensibertError if whole units were removed from
    the model, or if keep does not fit; the model is then unchanged."""
    if is_trimmed(model):
        raise SensibertError(f"trim: units were removed already, want an untrimmed model for grid {grid}")
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
