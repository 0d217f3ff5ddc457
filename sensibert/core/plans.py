"""Which parts of a model survive a budget: whole units (`UnitPlan`) or blocks of the weights (`BlockPlan`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .arguments import checked, one_of, show, want_fields
from .artifact_files import load_artifact, same_tensors, save_artifact
from .budget import Budget
from .cost import cost_of_blocks, cost_of_units, counts_of, kept_by_weight
from .errors import SensibertError
from .grid import Grid
from .layout import Layout
from .text import share, table
from .views import View

AnyPlan = TypeVar("AnyPlan", bound="Plan")


@dataclass(frozen=True, eq=False, repr=False)
class Plan(ABC):
    """Base class of `UnitPlan` and `BlockPlan`.

    keep: name -> bool tensor, True survives, on any device. budget, method: those that the plan was made with.
    SensibertError if keep does not fit the layout, or for a field of another type."""

    layout: Layout
    keep: dict[str, Tensor]
    budget: Budget
    method: str

    table_header: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        want_fields(self)
        shapes = self._shapes()
        if self.keep.keys() != shapes.keys():
            name = min(self.keep.keys() ^ shapes.keys())
            wrong = f"lacks {name!r}" if name in shapes else f"has {name!r}, which is not in the layout"
            raise SensibertError(f"{type(self).__name__}: keep {wrong}, want one mask for each of {len(shapes)} names")
        for name, shape in shapes.items():
            mask = self.keep[name]
            if mask.dtype != torch.bool or mask.shape != shape:
                got = f"{mask.dtype} {tuple(mask.shape)}"
                raise SensibertError(f"{type(self).__name__}: keep[{name!r}] is {got}, want torch.bool {shape}")

    @abstractmethod
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of its mask, for everything in the layout that can be kept."""

    @abstractmethod
    def cost(self, scope: str = "encoder", length: int = 128) -> tuple[int, int]:
        """(parameters, FLOPs of one sequence of `length` tokens) that are left; scope: encoder or model."""

    @abstractmethod
    def table_rows(self) -> list[tuple]:
        """The rows of the table, under `table_header`."""

    @property
    def params(self) -> int:
        """Parameters that are left in the scope of the budget."""
        return self.cost(self.budget.scope, self.budget.length)[0]

    @property
    def flops(self) -> int:
        """FLOPs that are left in the scope of the budget, for one sequence of its length."""
        return self.cost(self.budget.scope, self.budget.length)[1]

    def on_cpu(self: AnyPlan) -> AnyPlan:
        """The same plan with `keep` on the CPU, as from a file."""
        return replace(self, keep={name: keep.cpu() for name, keep in self.keep.items()})

    def table(self) -> str:
        """The plan as a table in plain text."""
        return table(self.table_header, self.table_rows())

    def __repr__(self) -> str:
        return self._view().text()

    def _repr_html_(self) -> str:
        return self._view().html()

    def _view(self) -> View:
        scope, length = self.budget.scope, self.budget.length
        sizes = zip(("parameters", "FLOPs"), self.cost(scope, length), cost_of_units(self.layout, None, scope, length))
        left = ", ".join(f"{after:,} of {before:,} {name} ({share(after, before)})" for name, after, before in sizes)
        title = f"{type(self).__name__}: {self.layout.family}, {self.budget} of the {scope} by {self.method}"
        return View((title, f"left: {left}"), self.table_header, self.table_rows())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._facts() == other._facts() and same_tensors(self.keep, other.keep)

    @checked
    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically. SensibertError if that is not possible."""
        save_artifact(path, "plan", self.keep, self._facts())

    @classmethod
    @checked
    def load(cls: type[AnyPlan], path: str | Path) -> AnyPlan:
        """Read a UnitPlan or BlockPlan from a file, with `keep` on the CPU. SensibertError for any other file."""
        plan = load_artifact(path, "plan", _plan_from)
        if not isinstance(plan, cls):
            raise SensibertError(f"{path}: holds a {type(plan).__name__}, want a {cls.__name__}")
        return plan

    def _facts(self) -> dict[str, object]:
        """Metadata of the file. The grid of a plan of units is None."""
        facts = {"layout": self.layout, "budget": self.budget, "method": self.method}
        sizes = {"params": self.params, "flops": self.flops}
        return {**facts, **sizes, "grid": getattr(self, "grid", None)}


@dataclass(frozen=True, eq=False, repr=False)
class UnitPlan(Plan):
    """Which attention heads and FFN neurons survive; keep: site name -> bool [units]."""

    grid: ClassVar[None] = None
    table_header: ClassVar[tuple[str, ...]] = ("", "heads", "of", "ffn width", "of")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {site.name: (site.units,) for site in self.layout.sites}

    def cost(self, scope: str = "encoder", length: int = 128) -> tuple[int, int]:
        return cost_of_units(self.layout, self.keep, scope, length)

    def table_rows(self) -> list[tuple]:
        """(layer, heads kept, heads, FFN width kept, FFN width) for every layer."""
        counts = counts_of(self.layout, self.keep)
        rows: dict[int, dict[str, tuple[int, int]]] = {}
        for site in self.layout.sites:
            rows.setdefault(site.layer, {})[site.kind] = (counts[site.name], site.units)
        return [(f"layer {n}", *row.get("head", (0, 0)), *row.get("ffn", (0, 0))) for n, row in sorted(rows.items())]

    def kept(self, name: str) -> Tensor:
        """Indices of the surviving units of a site: int64 [kept], ascending, on the device of `keep`."""
        if name not in self.keep:
            raise SensibertError(f"kept: name is {show(name)}, {one_of(name, self.keep)}")
        return self.keep[name].nonzero().flatten()


@dataclass(frozen=True, eq=False, repr=False)
class BlockPlan(Plan):
    """Which blocks of a grid survive in every weight; keep: parameter name -> bool [block rows, block columns]."""

    grid: Grid = field(kw_only=True)
    table_header: ClassVar[tuple[str, ...]] = ("tensor", "kept", "of", "share")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {w.parameter: self.grid.shape(w.rows, w.cols) for w in self.layout.weights}

    def cost(self, scope: str = "encoder", length: int = 128) -> tuple[int, int]:
        return cost_of_blocks(self.layout, self.keep, self.grid, scope, length)

    def table_rows(self) -> list[tuple]:
        """(tensor, elements in kept blocks, elements, their share as text) for every weight."""
        kept = kept_by_weight(self.layout, self.keep, self.grid)
        return [(name, count, whole, share(count, whole)) for name, count, whole in kept]


def _plan_from(keep: dict[str, Tensor], facts: dict[str, Any]) -> Plan:
    """Build the plan of a file. The sizes in the file are not used: they follow from `keep`."""
    grid = facts.pop("grid", None)
    facts.pop("notes", None)  # of files written by version 0.1
    del facts["params"], facts["flops"]
    return UnitPlan(keep=keep, **facts) if grid is None else BlockPlan(keep=keep, grid=grid, **facts)
