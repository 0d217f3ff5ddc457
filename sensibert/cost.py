"""What a plan costs, in closed form: parameters and FLOPs. Pure arithmetic on a layout.

Parameters count every tensor once. FLOPs are 2 per multiply-add of the matrix products of one forward pass; for a head
at sequence length s that is 2 * (projections) * s + 4 * head_dim * s^2 (scores and weighted sum). `torch.utils.
flop_counter` with eager attention counts the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from .artifacts import Budget, Flops, Layout, Site
from .errors import SensibertError


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


def unit_cost(site: Site, budget: Budget) -> int:
    """Cost of one unit in the budget's currency (FLOPs of one sequence of budget.length tokens)."""
    return site.params if budget.kind == "params" else site.flops.at(1, budget.length)


def spent(layout: Layout, counts: Mapping[str, int], budget: Budget) -> int:
    if budget.kind == "params":
        return params(layout, counts, budget.scope)
    return flops(layout, counts, budget.scope, 1, budget.length)


def limit(layout: Layout, budget: Budget) -> int:
    """The budget in absolute units for this layout; SensibertError if not even the smallest model fits."""
    if budget.kind == "ms":
        raise SensibertError("budget: latency needs a measured table of the target, want params or flops")
    dense = spent(layout, counts_of(layout), budget)
    smallest = spent(layout, {site.name: site.minimum for site in layout.sites}, budget)
    allowed = int(dense * budget.value) if budget.relative else int(budget.value)
    if allowed < smallest:
        raise SensibertError(
            f"budget: {budget} of the {budget.scope} is {allowed:,} {budget.kind}, but {smallest:,} cannot be trimmed; "
            f"the smallest reachable budget is {smallest}{budget.kind} ({math.ceil(1e4 * smallest / dense) / 100:g} %)"
        )
    return allowed
