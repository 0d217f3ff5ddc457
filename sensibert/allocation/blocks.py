"""Scores of the blocks of a grid and a budget -> which blocks of every weight survive: `allocate` without units.

Blocks are taken in falling score / cost, ties by (weight, block), until the next one does not fit. They all cost the
same, but for short ones at the end of an axis and for weights that run more than once (FLOPs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.artifacts import Plan, Sensitivity
from ..core.budget import Budget
from ..core.cost import counts_of, element_cost, kept_elements, left, limit, spent
from ..core.errors import SensibertError
from ..core.grid import Grid
from ..core.layout import Weight
from ..ops import select_threshold


def _costs(weight: Weight, grid: Grid, price: int) -> Tensor:
    """Cost of every block, int64, as grid.shape."""
    rows, cols = grid.block_size(weight.rows, weight.cols)
    high = (weight.rows - torch.arange(0, weight.rows, rows)).clamp(max=rows)
    wide = (weight.cols - torch.arange(0, weight.cols, cols)).clamp(max=cols)
    return torch.outer(high, wide) * price


def _places(scores: Tensor) -> Tensor:
    """The order inside one weight as a share that compares between weights: best 0, then below it; NaN last."""
    order = torch.argsort(scores.flatten().nan_to_num(nan=-torch.inf), descending=True, stable=True)
    places = torch.empty(scores.numel())
    places[order] = -torch.arange(scores.numel()) / max(scores.numel(), 1)
    return places.view(scores.shape)


def allocate_blocks(sensitivity: Sensitivity, grid: Grid, budget: Budget, policy: str) -> Plan:
    """Choose the blocks that survive; the plan is below the budget by less than one block.

    policy: `global` (one threshold for all weights) or `uniform` (the same share of each; scores rank inside one).
    SensibertError if the budget is below what cannot be masked, or in FLOPs of single elements."""
    layout, scores = sensitivity.layout, sensitivity.scores
    allowed = limit(layout, budget, grid)
    prices = {w.parameter: element_cost(w, budget) for w in layout.weights}
    keep = {w.parameter: torch.ones(grid.shape(w.rows, w.cols), dtype=torch.bool) for w in layout.weights}
    for name, kept in keep.items():
        found = tuple(scores[name].shape) if name in scores else None
        if found != kept.shape:
            raise SensibertError(f"allocate: scores of {name} are {found}, want {tuple(kept.shape)} (grid {grid})")
    priced = [w for w in layout.weights if prices[w.parameter] and w.rows and w.cols]  # what costs nothing stays
    costs = {w.parameter: _costs(w, grid, prices[w.parameter]) for w in priced}
    dearest = max((int(cost.max()) for cost in costs.values()), default=1)
    cheapest = min((int(cost.min()) for cost in costs.values()), default=1)
    ranks = []
    for name, cost in costs.items():
        score = scores[name].float()
        if policy == "uniform":
            score = _places(score)
        elif sensitivity.statistic != "random":  # a coin says nothing about cost
            score = score / (cost / dearest)
        ranks.append(score)

    def spend() -> int:
        return sum(kept_elements(w, keep[w.parameter], grid) * prices[w.parameter] for w in priced)

    room = allowed - (spent(layout, counts_of(layout), budget) - spend())
    total = sum(rank.numel() for rank in ranks)
    low, high = min(total, room // dearest), min(total, room // cheapest)
    while True:  # a larger selection contains the smaller ones, so its cost can be bisected
        k = (low + high + 1) // 2
        keep |= dict(zip(costs, select_threshold(ranks, k).keep, strict=True))
        if low == high:
            break
        low, high = (k, high) if spend() <= room else (low, k - 1)
    params, flops = left(layout, keep, grid, budget.scope, budget.length)
    return Plan(layout, keep, budget, sensitivity.statistic, params, flops, grid=grid)
