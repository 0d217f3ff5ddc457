"""Parameters and FLOPs of a layout, untrimmed or trimmed, in closed form.

Parameters count every tensor once. FLOPs are 2 per multiply-add of the matrix products of one forward pass; for a head
at sequence length s that is 2 * (projections) * s + 4 * head_dim * s^2 (scores and weighted sum). `torch.utils.
flop_counter` with eager attention counts the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .arguments import one_of, show, want
from .budget import SCOPES, Budget
from .cost_table import CostTable
from .errors import SensibertError
from .grid import Grid
from .layout import Layout, Site, Weight


def counts_of(layout: Layout, keep: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """Number of units that every site keeps; keep: site name -> bool [units], None keeps all."""
    return {s.name: s.units if keep is None else int(keep[s.name].sum()) for s in layout.sites}


def params(layout: Layout, counts: Mapping[str, int], scope: str = "encoder") -> int:
    """Parameters of the encoder or the model when every site keeps counts[site name] units."""
    untrimmed = layout.encoder_params if scope == "encoder" else layout.total_params
    return untrimmed - sum((site.units - counts[site.name]) * site.params for site in layout.sites)


def flops(layout: Layout, counts: Mapping[str, int], scope: str = "encoder", batch: int = 1, length: int = 128) -> int:
    """FLOPs of one forward pass over `batch` sequences of `length` tokens; counts as in `params`."""
    total = layout.encoder_rest if scope == "encoder" else layout.model_rest
    for site in layout.sites:
        # Projections of relative positions run once per pass; they shrink with the kept units too.
        total = total + site.flops * counts[site.name]
    return total.at(batch, length)


def encoder_left(layout: Layout, budget: Budget) -> float:
    """Fraction of the encoder's cost that remains when the budget is met. Only the encoder shrinks. Where costs are
    measured, that of heads and neurons."""
    counts = counts_of(layout)
    if budget.measured:
        encoder = spent(layout, counts, budget) - (rest := table_of(budget).rest)
        allowed = budget.value * (whole(layout, budget) if budget.relative else 1)
        return min(1.0, max(0.0, (allowed - rest) / encoder))
    total, encoder = (spent(layout, counts, replace(budget, scope=scope)) for scope in (budget.scope, "encoder"))
    return ((total if budget.relative else 1) * budget.value - (total - encoder)) / encoder


def table_of(budget: Budget) -> CostTable:
    """The measured costs of a budget; SensibertError if it has none."""
    if budget.table is None:
        want = "finetune or trim, which measure"
        want = want if budget.kind == "size" else f"a table of `sensibert latency`, or {want}"
        raise SensibertError(f"budget: {budget} needs measured costs, want {want} them")
    return budget.table


def whole(layout: Layout, budget: Budget) -> int:
    """The cost of the untrimmed model, of which a relative budget is a fraction."""
    known = table_of(budget).whole if budget.measured else 0
    return known or spent(layout, counts_of(layout), budget)


def unit_cost(site: Site, budget: Budget) -> int:
    """Cost of one unit of a site: parameters, or FLOPs of one sequence of budget.length tokens. The mean over all
    units, at least 1, where costs are measured."""
    if budget.measured:
        return max(1, table_of(budget).cost(site.kind, site.units) // max(1, site.units))
    return site.params if budget.kind == "params" else site.flops.at(1, budget.length)


def units_cost(site: Site, count: int, budget: Budget) -> int:
    """Cost of `count` units of a site."""
    return table_of(budget).cost(site.kind, count) if budget.measured else count * unit_cost(site, budget)


def spent(layout: Layout, counts: Mapping[str, int], budget: Budget) -> int:
    """Cost of the budget's scope, in the unit of its kind, with counts[site name] units in every site."""
    if budget.measured:
        table = table_of(budget)
        cut = any(counts[site.name] < site.units for site in layout.sites)
        return table.rest + sum(table.cost(site.kind, counts[site.name]) for site in layout.sites) + cut * table.offset
    if budget.kind == "params":
        return params(layout, counts, budget.scope)
    return flops(layout, counts, budget.scope, 1, budget.length)


def element_cost(weight: Weight, budget: Budget) -> int:
    """Cost of one element of a weight: 1 parameter, or its FLOPs in a sequence of budget.length tokens."""
    return 1 if budget.kind == "params" else weight.flops * budget.length


def kept_elements(weight: Weight, keep: Tensor, grid: Grid) -> int:
    """Elements of a weight inside kept blocks; keep: bool [block rows, block columns], on any device."""
    rows, cols = grid.block_size(weight.rows, weight.cols)
    down, across = keep.shape[0] * rows - weight.rows, keep.shape[1] * cols - weight.cols  # missing in the last blocks
    edges = (keep, keep[-1:], keep[:, -1:], keep[-1:, -1:])
    whole, below, right, corner = torch.stack([edge.sum() for edge in edges]).tolist()  # one transfer, not four
    return whole * rows * cols - below * down * cols - right * rows * across + corner * down * across


def kept_by_weight(layout: Layout, keep: Mapping[str, Tensor], grid: Grid) -> list[tuple[str, int, int]]:
    """(parameter, elements in kept blocks, elements) of every weight; keep: parameter -> bool [block rows, columns]."""
    return [(w.parameter, kept_elements(w, keep[w.parameter], grid), w.rows * w.cols) for w in layout.weights]


def cost_of_units(
    layout: Layout, keep: Mapping[str, Tensor] | None = None, scope: str = "encoder", length: int = 128
) -> tuple[int, int]:
    """(parameters, FLOPs of one sequence of `length` tokens) with the kept units of every site; None keeps all.
    SensibertError for another scope or length."""
    if scope not in SCOPES:
        raise SensibertError(f"scope is {show(scope)}, {one_of(scope, SCOPES)}")
    want("length", length, int)
    if length < 1:
        raise SensibertError(f"length is {length}, want at least 1")
    counts = counts_of(layout, keep)
    return params(layout, counts, scope), flops(layout, counts, scope, 1, length)


def cost_of_blocks(
    layout: Layout, keep: Mapping[str, Tensor], grid: Grid, scope: str = "encoder", length: int = 128
) -> tuple[int, int]:
    """(parameters, FLOPs of one sequence of `length` tokens) with the kept blocks of every weight.

    FLOPs assume a kernel that skips empty blocks. No kernel skips single elements, so with a grid of elements the FLOPs
    are those of the untrimmed model."""
    total_params, total_flops = cost_of_units(layout, None, scope, length)
    for weight, (_, kept, whole) in zip(layout.weights, kept_by_weight(layout, keep, grid), strict=True):
        total_params -= whole - kept
        total_flops -= 0 if grid == Grid.element() else (whole - kept) * weight.flops * length
    return total_params, total_flops


def _as_budget(budget: Budget, cost: int) -> str:
    """A text that `parse` reads as a budget of at least this cost."""
    if budget.measured:
        return str(replace(budget, value=float(cost + 1), relative=False))
    return f"{cost}{budget.kind}"


def _untrimmable(budget: Budget, smallest: int) -> str:
    if not budget.measured:
        return f"{smallest:,} cannot be trimmed"
    return f"everything but heads and neurons takes {budget.amount(smallest)} ({table_of(budget).described()})"


def want_reach(layout: Layout, budget: Budget, grid: Grid | None = None) -> int:
    """`limit` of an untrimmed model; SensibertError also if the budget exceeds its cost."""
    allowed, most = limit(layout, budget, grid), whole(layout, budget)
    if allowed > most:
        raise SensibertError(
            f"budget: {budget}, and the {budget.scope} has {budget.amount(most)}: nothing would be trimmed, want less"
        )
    return allowed


def limit(layout: Layout, budget: Budget, grid: Grid | None = None) -> int:
    """The budget as an absolute number for this layout, rounded down; SensibertError if the smallest model exceeds it.

    grid: the blocks that are masked; None: whole units are removed."""
    if grid is not None:
        budget.check_grid(grid == Grid.element())
    most = whole(layout, budget)
    if grid is None:
        smallest = spent(layout, {site.name: site.minimum for site in layout.sites}, budget)
    else:
        smallest = most - sum(w.rows * w.cols * element_cost(w, budget) for w in layout.weights)
    allowed = int(most * budget.value) if budget.relative else int(budget.value)
    if allowed < smallest:
        share = f"{math.ceil(1e4 * smallest / most) / 100:g} %"
        raise SensibertError(
            f"budget: {budget} of the {budget.scope} is {budget.amount(allowed)}, "
            f"but {_untrimmable(budget, smallest)}; "
            f"the smallest reachable budget is {_as_budget(budget, smallest)} ({share})"
        )
    return allowed
