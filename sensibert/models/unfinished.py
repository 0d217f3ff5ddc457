"""The budget of a trimmed model, noted on it: that of its schedule of cuts, or the one it reached so far."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..core.budget import Budget
from ..core.cost import counts_of, spent, table_of
from .layout_of import layout_of
from .masks import NOTE, cost_of
from .modules import base_of
from .structure import is_trimmed

UNFINISHED = "unfinished"  # the entry with the budget that was not reached


def reached(model: nn.Module, budget: Budget) -> int:
    """The cost that the budget limits, without masked blocks."""
    if budget.measured:
        layout = layout_of(model)
        return spent(layout, counts_of(layout), budget) + is_trimmed(model) * table_of(budget).offset
    return cost_of(model, budget.scope, budget.length)[budget.kind == "flops"]


def note_budget(model: nn.Module, budget: Budget, allowed: int) -> None:
    """Note the budget of a trimmed model in config.sensibert, or on a masked model. allowed: its absolute value."""
    actual = reached(model, budget)
    for part in {id(part): part for part in (model, base_of(model))}.values():
        if (note := _note(part)) is not None:
            note["budget"] = str(budget if actual <= allowed else replace(budget, value=float(actual), relative=False))
            note.pop(UNFINISHED, None)
            if actual > allowed:
                note[UNFINISHED] = str(budget)


def unfinished(model: nn.Module) -> tuple[str, str] | None:
    """(budget that was reached, budget of the schedule) of a model that was trimmed, but not to its budget."""
    note = _note(model) or {}
    return (note["budget"], note[UNFINISHED]) if UNFINISHED in note else None


def _note(model: nn.Module) -> dict[str, Any] | None:
    """The entry of a trimmed model's config; of a masked model, which has none, an attribute; else None."""
    entry = getattr(getattr(model, "config", None), "sensibert", None)
    return getattr(model, NOTE, None) if entry is None else entry
