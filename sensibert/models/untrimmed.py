"""A model before a run trims it, in whose units all cuts of the run are counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.artifacts import BlockPlan, Plan, UnitPlan
from ..core.budget import Budget
from ..core.layout import Layout
from .layout_of import layout_of
from .masks import masks_of
from .structure import is_trimmed, structure_of


@dataclass
class Untrimmed:
    """The model as a run saw it first."""

    layout: Layout
    units: dict[str, Tensor]  # `structure_of` it
    trimmed_before: bool
    guard: RemovableHandle | None = None  # until training begins: explains why a checkpoint does not fit

    @classmethod
    def of(cls, model: nn.Module) -> Untrimmed:
        return cls(layout_of(model), structure_of(model), is_trimmed(model))

    def whole_plan(self, model: nn.Module, budget: Budget, method: str) -> Plan:
        """All cuts of the model since then as one plan."""
        masks, kept = masks_of(model), structure_of(model)
        if masks is not None:
            return BlockPlan(self.layout, masks.keep, budget, method, grid=masks.grid)
        keep = {name: torch.isin(units, kept[name]) for name, units in self.units.items()}
        return UnitPlan(self.layout, keep, budget, method)

    def remove_guard(self) -> None:
        if self.guard is not None:
            self.guard.remove()
            self.guard = None
