"""Scores of the blocks of a grid, and a budget -> the blocks of every weight that survive.

Blocks are taken in descending order of score / cost, ties by (weight, block), until the next one does not fit. All
blocks cost the same, except shorter ones at the end of an axis, and in FLOPs those of weights that run several times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.artifacts import BlockPlan, Sensitivity
from ..core.budget import Budget
from ..core.cost import counts_of, element_cost, kept_elements, limit, spent
from ..core.errors import SensibertError
from ..core.grid import Grid
from ..core.layout import Weight
from ..ops import select_threshold


def _sides(weight: Weight, grid: Grid) -> tuple[list[int], list[int]]:
    """Elements of every block along the rows and along the columns; only the last may be shorter."""
    rows, cols = grid.block_size(weight.rows, weight.cols)
    high = [min(rows, weight.rows - first) for first in range(0, weight.rows, rows)]
    wide = [min(cols, weight.cols - first) for first in range(0, weight.cols, cols)]
    return high, wide


def _rank_in_weight(scores: Tensor) -> Tensor:
    """Ranks that can be compared between weights of any size: 0 for the best block, nearly -1 for the last; NaN is
    last."""
    order = torch.argsort(scores.flatten().nan_to_num(nan=-torch.inf), descending=True, stable=True)
    ranks = torch.empty(scores.numel(), device=scores.device)
    ranks[order] = _quotient(-torch.arange(scores.numel(), device=scores.device), scores.numel())
    return ranks.view(scores.shape)


def _quotient(values: Tensor, divisor: int) -> Tensor:
    """values / divisor in fp32, with the same bits on every device: a GPU multiplies by 1 / divisor if it is a
    number."""
    return values / torch.tensor(divisor, device=values.device)


def allocate_blocks(sensitivity: Sensitivity, grid: Grid, budget: Budget, allocation: str) -> BlockPlan:
    """Choose the blocks that survive, on the device of the scores. The plan is below the budget by less than one block.

    allocation: `global` (one threshold for all weights) or `uniform` (the same fraction of every weight).
    SensibertError if the budget is below the cost of what cannot be masked or counts FLOPs of single elements, or if
    the scores do not fit the layout."""
    layout, scores = sensitivity.layout, sensitivity.scores
    allowed = limit(layout, budget, grid)
    keep: dict[str, Tensor] = {}
    for w in layout.weights:
        score, want = scores.get(w.parameter), grid.shape(w.rows, w.cols)
        if score is None or score.shape != want:
            shape = None if score is None else tuple(score.shape)
            raise SensibertError(f"allocate: scores of {w.parameter} are {shape}, want {want} (grid {grid})")
        keep[w.parameter] = torch.ones(want, dtype=torch.bool, device=score.device)
    prices = {w.parameter: element_cost(w, budget) for w in layout.weights}
    priced = [w for w in layout.weights if prices[w.parameter] and w.rows and w.cols]  # others are kept
    sides = {w.parameter: _sides(w, grid) for w in priced}
    highest = max((high[0] * wide[0] * prices[name] for name, (high, wide) in sides.items()), default=1)
    lowest = min((high[-1] * wide[-1] * prices[name] for name, (high, wide) in sides.items()), default=1)
    ranks = []
    for name, (high, wide) in sides.items():
        score = scores[name].float()
        if allocation == "uniform":
            score = _rank_in_weight(score)
        elif sensitivity.statistic != "random":  # random scores do not depend on cost
            cost = torch.outer(*(torch.tensor(side, device=score.device) for side in (high, wide))) * prices[name]
            score = score / _quotient(cost, highest)
        ranks.append(score)

    def spend() -> int:
        return sum(kept_elements(w, keep[w.parameter], grid) * prices[w.parameter] for w in priced)

    available = allowed - (spent(layout, counts_of(layout), budget) - spend())
    total = sum(rank.numel() for rank in ranks)
    fewest, most = min(total, available // highest), min(total, available // lowest)
    while True:  # bisection: a larger selection contains the smaller ones
        k = (fewest + most + 1) // 2
        keep |= dict(zip(sides, select_threshold(ranks, k).keep, strict=True))
        if fewest == most:
            break
        fewest, most = (k, most) if spend() <= available else (fewest, k - 1)
    return BlockPlan(layout, keep, budget, sensitivity.statistic, grid=grid)
