"""What a plan costs, in closed form: parameters and FLOPs. Pure arithmetic on a layout.

Parameters count every tensor once. FLOPs are 2 per multiply-add of the matrix products of one forward pass; for a head
at sequence length s that is 2 * (projections) * s + 4 * head_dim * s^2 (scores and weighted sum). `torch.utils.
flop_counter` with eager attention counts the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from .budget import Budget
from .errors import SensibertError
from .grid import Grid
from .layout import Flops, Layout, Site, Weight


def counts_of(layout: Layout, keep: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """Units a site keeps; all of them without `keep`."""
    return {s.name: s.units if keep is None else int(keep[s.name].sum()) for s in layout.sites}


def params(layout: Layout, counts: Mapping[str, int], scope: str = "encoder") -> int:
    whole = layout.encoder_params if scope == "encoder" else layout.total_params
    return whole - sum((site.units - counts[site.name]) * site.params for site in layout.sites)


def flops(layout: Layout, counts: Mapping[str, int], scope: str = "encoder", batch: int = 1, length: int = 128) -> int:
    total = layout.encoder_rest if scope == "encoder" else layout.model_rest
    for site in layout.sites:
        # What runs once a pass whatever the batch (projected relative positions) still falls with the kept units.
        total = total + site.flops * counts[site.name]
    return Flops.at(total, batch, length)


def encoder_left(layout: Layout, budget: Budget) -> float:
    """The share of the encoder's cost that stays where the budget is met, since the rest of a model does not shrink."""
    counts = counts_of(layout)
    whole, encoder = (spent(layout, counts, replace(budget, scope=scope)) for scope in (budget.scope, "encoder"))
    return ((whole if budget.relative else 1) * budget.value - (whole - encoder)) / encoder


def unit_cost(site: Site, budget: Budget) -> int:
    """Cost of one unit in the budget's currency (FLOPs of one sequence of budget.length tokens)."""
    return site.params if budget.kind == "params" else site.flops.at(1, budget.length)


def spent(layout: Layout, counts: Mapping[str, int], budget: Budget) -> int:
    if budget.kind == "params":
        return params(layout, counts, budget.scope)
    return flops(layout, counts, budget.scope, 1, budget.length)


def element_cost(weight: Weight, budget: Budget) -> int:
    """The same of one element of a weight."""
    return 1 if budget.kind == "params" else weight.flops * budget.length


def kept_elements(weight: Weight, keep: Tensor, grid: Grid) -> int:
    """Elements of a weight inside kept blocks; keep bool grid.shape(rows, cols)."""
    rows, cols = grid.block_size(weight.rows, weight.cols)
    down, across = keep.shape[0] * rows - weight.rows, keep.shape[1] * cols - weight.cols  # what the last ones lack
    whole, below, right, corner = (int(k.sum()) for k in (keep, keep[-1:], keep[:, -1:], keep[-1:, -1:]))
    return whole * rows * cols - below * down * cols - right * rows * across + corner * down * across


def left(
    layout: Layout, keep: Mapping[str, Tensor] | None, grid: Grid | None, scope: str = "encoder", length: int = 128
) -> tuple[int, int]:
    """(parameters, FLOPs of one sequence) of a keep on units, or with a grid on the blocks of the weights; None: all.

    FLOPs are those of a kernel that skips empty blocks. None skips single elements: there they stay the dense ones."""
    counts = counts_of(layout, None if grid else keep)
    total_params, total_flops = params(layout, counts, scope), flops(layout, counts, scope, 1, length)
    if grid is None or keep is None:
        return total_params, total_flops
    for weight in layout.weights:
        gone = weight.rows * weight.cols - kept_elements(weight, keep[weight.parameter], grid)
        total_params -= gone
        total_flops -= 0 if grid == Grid.element() else gone * weight.flops * length
    return total_params, total_flops


def check_budget(budget: Budget, grid: Grid | None = None) -> None:
    """SensibertError for what no model and no keep could meet."""
    if budget.kind == "ms":
        raise SensibertError("budget: latency needs a measured table of the target, want params or flops")
    if budget.kind == "flops" and grid == Grid.element():
        raise SensibertError(f"budget: {budget}, but no kernel skips single elements, want params for grid element")


def want_reach(layout: Layout, budget: Budget, grid: Grid | None = None) -> int:
    """`limit` of a dense model; SensibertError too if the budget is more than it costs, for then nothing would go."""
    allowed, dense = limit(layout, budget, grid), spent(layout, counts_of(layout), budget)
    if allowed > dense:
        raise SensibertError(
            f"budget: {budget}, and the {budget.scope} has {dense:,} {budget.kind}: nothing would go, want less"
        )
    return allowed


def limit(layout: Layout, budget: Budget, grid: Grid | None = None) -> int:
    """The budget in absolute units for this layout; SensibertError if not even the smallest model fits."""
    check_budget(budget, grid)
    dense = spent(layout, counts_of(layout), budget)
    if grid is None:
        smallest = spent(layout, {site.name: site.minimum for site in layout.sites}, budget)
    else:
        smallest = dense - sum(w.rows * w.cols * element_cost(w, budget) for w in layout.weights)
    allowed = int(dense * budget.value) if budget.relative else int(budget.value)
    if allowed < smallest:
        raise SensibertError(
            f"budget: {budget} of the {budget.scope} is {allowed:,} {budget.kind}, but {smallest:,} cannot be trimmed; "
            f"the smallest reachable budget is {smallest}{budget.kind} ({math.ceil(1e4 * smallest / dense) / 100:g} %)"
        )
    return allowed
