"""Which blocks of its weights a model keeps, where a grid was cut and no unit: carried by its MaskedLinear layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..core.cost import cost_of_blocks, cost_of_units
from ..core.errors import SensibertError
from ..core.grid import Grid
from ..nn import MaskedLinear, replace
from .layout_of import layout_of
from .modules import base_of

FORMAT = "sensibert.masks"
_ATTRIBUTE = "sensibert_grid"  # on the model: its layers may also be masked by units, which is nobody's result


@dataclass(frozen=True, eq=False)
class Masks:
    """keep: parameter name in the base model -> bool [blocks of rows, blocks of columns]."""

    grid: Grid
    keep: dict[str, Tensor]

    def packed(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(eight blocks a byte, lowest bit first, each row padded with 0; what it takes to unpack them)."""
        bits = {name: np.packbits(keep.numpy(), axis=1, bitorder="little") for name, keep in self.keep.items()}
        columns = json.dumps({name: keep.shape[1] for name, keep in self.keep.items()})
        facts = {"format": FORMAT, "grid": str(self.grid), "columns": columns}
        return {name: torch.from_numpy(array) for name, array in bits.items()}, facts

    @classmethod
    def unpacked(cls, bits: Mapping[str, Tensor], facts: Mapping[str, str]) -> Masks:
        """Inverse of `packed`; KeyError, ValueError or TypeError if it is not that."""
        keep = {}
        for name, count in json.loads(facts["columns"]).items():
            found = np.unpackbits(bits[name].numpy(), axis=1, count=count, bitorder="little")
            keep[name] = torch.from_numpy(found).bool()
        return cls(Grid.parse(facts["grid"]), keep)


def masks_of(model: nn.Module) -> Masks | None:
    """The model's masks as they are now (copies, on the CPU); None where no grid was cut, or `restore` has ended it."""
    grid, layers = getattr(model, _ATTRIBUTE, None), base_of(model).named_modules()
    if grid is None:
        return None
    masked = ((f"{name}.weight", m) for name, m in layers if isinstance(m, MaskedLinear) and m.grid == grid)
    keep = {name: layer.keep.to("cpu", copy=True) for name, layer in masked}
    return Masks(grid, keep) if keep else None


def set_masks(model: nn.Module, masks: Masks) -> None:
    """Turn the layers into MaskedLinear; their weights stay what they are. SensibertError where a mask does not fit."""
    try:
        replace(base_of(model), {name.removesuffix(".weight"): (k, masks.grid) for name, k in masks.keep.items()})
    except ValueError as error:
        raise SensibertError(f"masks: do not fit this model ({error})") from None
    setattr(model, _ATTRIBUTE, masks.grid)


def kept_of(model: nn.Module) -> tuple[dict[str, Tensor] | None, Grid | None]:
    """The masks and their grid; (None, None) where no grid was cut."""
    masks = masks_of(model)
    return (None, None) if masks is None else (masks.keep, masks.grid)


def cost_of(model: nn.Module, scope: str = "encoder", length: int = 128) -> tuple[int, int]:
    """(parameters, FLOPs of one sequence of `length` tokens) of a model as it is now, without what its masks drop."""
    layout, masks = layout_of(model), masks_of(model)
    if masks is None:
        return cost_of_units(layout, None, scope, length)
    return cost_of_blocks(layout, masks.keep, masks.grid, scope, length)
