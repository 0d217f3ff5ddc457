"""The masks of a model trimmed by a grid: the kept blocks of its weights, stored in its MaskedLinear layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..core.cost import cost_of_blocks, cost_of_units
from ..core.errors import SensibertError
from ..core.grid import Grid
from ..core.json_text import parse_json
from ..nn import MaskedLinear, replace
from .layout_of import layout_of
from .modules import base_of

FORMAT = "sensibert.masks"
NOTE = "sensibert_note"  # attribute of a masked model: its budget, see unfinished.py
_ATTRIBUTE = "sensibert_grid"  # of a model masked by a trim; layers masked by a user with `replace` do not count


@dataclass(frozen=True, eq=False)
class Masks:
    """keep: name of a parameter in the base model -> bool [blocks of rows, blocks of columns], True = kept. note: the
    model's budget, see unfinished.py."""

    grid: Grid
    keep: dict[str, Tensor]
    note: dict[str, str] = field(default_factory=dict)

    def packed(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(tensors of bits, facts to unpack them): eight blocks a byte, lowest bit first, each row padded with 0."""
        bits = {name: np.packbits(keep.numpy(), axis=1, bitorder="little") for name, keep in self.keep.items()}
        columns = json.dumps({name: keep.shape[1] for name, keep in self.keep.items()})
        facts = {"format": FORMAT, "grid": str(self.grid), "columns": columns, "note": json.dumps(self.note)}
        return {name: torch.from_numpy(array) for name, array in bits.items()}, facts

    @classmethod
    def unpacked(cls, bits: Mapping[str, Tensor], facts: Mapping[str, str]) -> Masks:
        """The inverse of `packed`; KeyError, ValueError, TypeError, AttributeError or IndexError for anything else."""
        keep = {}
        for name, count in parse_json(facts["columns"]).items():
            if (
                not isinstance(count, int)
                or bits[name].dtype != torch.uint8
                or not 0 <= 8 * bits[name].shape[1] - count < 8
            ):
                raise ValueError(f"{name} has {tuple(bits[name].shape)} bytes for {count} columns")
            blocks = np.unpackbits(bits[name].numpy(), axis=1, count=count, bitorder="little")
            keep[name] = torch.from_numpy(blocks).bool()
        note = parse_json(facts.get("note", "{}"))
        if keep.keys() != bits.keys() or not all(isinstance(text, str) for text in note.values()):
            raise ValueError("its masks or note are not those that were written")
        return cls(Grid.parse(facts["grid"]), keep, note)


def masks_of(model: nn.Module) -> Masks | None:
    """Copies of the model's masks, on the CPU; None if it was not trimmed by a grid, or after `restore`."""
    grid, layers = getattr(model, _ATTRIBUTE, None), base_of(model).named_modules()
    if grid is None:
        return None
    masked = ((f"{name}.weight", m) for name, m in layers if isinstance(m, MaskedLinear) and m.grid == grid)
    keep = {name: layer.keep.to("cpu", copy=True) for name, layer in masked}
    return Masks(grid, keep, dict(getattr(model, NOTE, {}))) if keep else None


def set_masks(model: nn.Module, masks: Masks) -> None:
    """Turn the layers into MaskedLinear, with their weights unchanged. SensibertError if a mask does not fit."""
    try:
        replace(base_of(model), {name.removesuffix(".weight"): (k, masks.grid) for name, k in masks.keep.items()})
    except ValueError as error:
        raise SensibertError(f"masks: do not fit this model ({error})") from None
    setattr(model, _ATTRIBUTE, masks.grid)
    setattr(model, NOTE, dict(masks.note))


def kept_of(model: nn.Module) -> tuple[dict[str, Tensor] | None, Grid | None]:
    """The masks and their grid; (None, None) if the model was not trimmed by a grid."""
    masks = masks_of(model)
    return (None, None) if masks is None else (masks.keep, masks.grid)


def cost_of(model: nn.Module, scope: str = "encoder", length: int = 128) -> tuple[int, int]:
    """(parameters, FLOPs of one sequence of `length` tokens) of a model, without masked blocks."""
    layout, masks = layout_of(model), masks_of(model)
    if masks is None:
        return cost_of_units(layout, None, scope, length)
    return cost_of_blocks(layout, masks.keep, masks.grid, scope, length)
