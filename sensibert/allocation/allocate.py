"""Sensitivity and budget -> plan. Pure: no model, no GPU; ties break by (site, unit).

Keep a unit while its score per cost is above one global multiplier: take units in descending order of score / cost
until the budget is spent. Then round FFN widths down to a multiple of `width_multiple`, and spend the freed budget on
the best dropped units, one head or one multiple of neurons at a time. `exact` includes the rounding, by dynamic
programming; so are budgets of measured costs met, which do not grow evenly with the units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..core.arguments import checked, one_of
from ..core.artifacts import Plan, Sensitivity, UnitPlan
from ..core.budget import Budget
from ..core.config import ALLOCATIONS
from ..core.cost import limit, spent, unit_cost, units_cost
from ..core.errors import SensibertError
from ..core.layout import Layout, Site
from .blocks import allocate_blocks
from .solver import solve_budget

# These scores are not divided by cost: gate values and random numbers do not depend on it.
RANKED_BY_SCORE = ("soft_gates", "random")
BEYOND_ALL = 1e100  # stands for an infinite score in sums of scores
# (site, count, size) -> priority of the next `size` units of a site that keeps its best `count`
Worth = Callable[[Site, int, int], float]


def default_width_multiple(hidden: int) -> int:
    """The default of width_multiple: 64 suits tensor cores, but is too coarse below a hidden size of 768."""
    return 64 if hidden >= 768 else 32


def _order(scores: Tensor) -> Tensor:
    """Unit numbers, best first; NaN last, ties by index."""
    return torch.argsort(scores.nan_to_num(nan=-torch.inf), descending=True, stable=True)


def threshold_counts(layout: Layout, ranks: dict[str, Tensor], budget: Budget, room: int) -> dict[str, int]:
    """Units kept per site when the best ranks of all sites are taken until `room` is spent (exact to one unit)."""
    value, cost, owner = [], [], []
    for number, site in enumerate(layout.sites):
        best = ranks[site.name][_order(ranks[site.name])][site.minimum :]
        value.append(best)
        cost.append(torch.full((len(best),), unit_cost(site, budget), dtype=torch.int64))
        owner.append(torch.full((len(best),), number))
    order = _order(torch.cat(value))
    taken = (torch.cat(cost)[order].cumsum(0) <= room).sum()
    per_site = torch.bincount(torch.cat(owner)[order[:taken]], minlength=len(layout.sites))
    return {site.name: site.minimum + int(per_site[number]) for number, site in enumerate(layout.sites)}


def _uniform(layout: Layout, budget: Budget, allowed: int) -> dict[str, int]:
    """The largest fraction of units, the same for every site, that fits the budget."""
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        counts = {s.name: max(s.minimum, int(share * s.units)) for s in layout.sites}
        low, high = (share, high) if spent(layout, counts, budget) <= allowed else (low, share)
    return {s.name: max(s.minimum, int(low * s.units)) for s in layout.sites}


def _exact(layout: Layout, ranks: Mapping[str, Tensor], budget: Budget, allowed: int, multiple: int) -> dict[str, int]:
    """The rounded counts with the largest sum of kept scores, up to the resolution of `solve_budget`."""
    none = spent(layout, {site.name: 0 for site in layout.sites}, budget)
    levels, costs, values = [], [], []
    for site in layout.sites:
        price = unit_cost(site, budget)
        best = ranks[site.name][_order(ranks[site.name])].nan_to_num(nan=0.0, posinf=BEYOND_ALL, neginf=0.0) * price
        counts = range(site.units + 1) if site.kind == "head" else (*range(0, site.units, multiple), site.units)
        levels.append([count for count in counts if count >= site.minimum])
        costs.append([units_cost(site, count, budget) for count in levels[-1]])
        values.append([float(best[:count].sum()) for count in levels[-1]])
    chosen = solve_budget(costs, values, allowed - none)
    return {site.name: counts[level] for site, counts, level in zip(layout.sites, levels, chosen, strict=True)}


def _enlargement(site: Site, multiple: int, count: int) -> int:
    """Units that the next enlargement of a site adds: one head, or neurons up to the next multiple."""
    size = 1 if site.kind == "head" else multiple - count % multiple
    return min(size, site.units - count)


def _price(site: Site, count: int, size: int, budget: Budget) -> int:
    """Cost of `size` units beyond `count`."""
    return units_cost(site, count + size, budget) - units_cost(site, count, budget)


def _fill(
    layout: Layout, worth: Worth, budget: Budget, allowed: int, counts: Mapping[str, int], multiple: int
) -> dict[str, int]:
    """Enlarge sites by one head or up to the next multiple of neurons while anything fits, the most valuable first."""
    counts, room = dict(counts), allowed - spent(layout, counts, budget)
    while True:
        options = []
        for number, site in enumerate(layout.sites):
            count = counts[site.name]
            size = _enlargement(site, multiple, count)
            if size and _price(site, count, size, budget) <= room:
                options.append((worth(site, count, size), -number, size))
        if not options:
            return counts
        _, number, size = max(options)
        site = layout.sites[-number]
        room -= _price(site, counts[site.name], size, budget)
        counts[site.name] += size


def ranks_of(sensitivity: Sensitivity, budget: Budget) -> dict[str, Tensor]:
    """Site -> fp64 [units] on the CPU: score per cost, by which units are compared."""
    ranks = {}
    for site in sensitivity.layout.sites:
        score = sensitivity.scores.get(site.name, torch.empty(0)).to("cpu", torch.float64)  # a few thousand numbers
        if score.shape != (site.units,):
            raise SensibertError(f"allocate: scores of {site.name} are {tuple(score.shape)}, want ({site.units},)")
        ranks[site.name] = score if sensitivity.statistic in RANKED_BY_SCORE else score / unit_cost(site, budget)
    return ranks


def _want_numbers(sensitivity: Sensitivity) -> None:
    """SensibertError if all scores of a site or weight are NaN: what is kept there would mean nothing."""
    named = [(name, scores) for name, scores in sensitivity.scores.items() if scores.numel()]
    bad = torch.stack([scores.isnan().all() for _, scores in named]).tolist() if named else []  # one transfer
    if any(bad):
        name = named[bad.index(True)][0]
        raise SensibertError(
            f"allocate: all scores of {name} are NaN in this sensitivity of method {sensitivity.statistic!r}, "
            "want numbers: analyze again, with --precision fp32 or another method"
        )


@checked
def allocate(
    sensitivity: Sensitivity, budget: Budget | str, width_multiple: int | None = None, allocation: str = "global"
) -> Plan:
    """Choose the units that survive a budget.

    budget: an upper bound, also as text ("50%params"). The plan is below it by less than the lowest cost of a dropped
    head or multiple of neurons. width_multiple: FFN widths become multiples of it; 1: no rounding; None: 64, or 32
    below a hidden size of 768. allocation: `global` (one threshold for all sites), `uniform` (the same fraction of
    every site, units are compared within a site) or `exact` (the largest sum of kept scores among rounded widths; with
    measured costs also in place of `global`). A sensitivity of blocks gives a plan of blocks, without rounding.
    SensibertError for a budget below the cost of what cannot be trimmed, or for an argument that does not fit."""
    layout, budget = sensitivity.layout, Budget.parse(budget) if isinstance(budget, str) else budget
    if allocation not in ALLOCATIONS:
        raise SensibertError(f"allocate: allocation is {allocation!r}, {one_of(allocation, ALLOCATIONS)}")
    _want_numbers(sensitivity)
    if sensitivity.grid is not None:
        if allocation == "exact":
            raise SensibertError("allocate: allocation is 'exact', which needs whole units; want global or uniform")
        if width_multiple is not None:
            raise SensibertError(f"allocate: width_multiple is {width_multiple}, want None: a grid keeps all widths")
        return allocate_blocks(sensitivity, sensitivity.grid, budget, allocation)
    multiple = default_width_multiple(layout.hidden) if width_multiple is None else width_multiple
    if multiple < 1:
        raise SensibertError(f"allocate: width_multiple is {multiple}, want at least 1")
    if budget.table is not None:
        budget.table.want_fit(layout)
    if budget.measured and allocation == "global":
        allocation = "exact"
    allowed, ranks = limit(layout, budget), ranks_of(sensitivity, budget)
    if allocation == "uniform":
        counts = _uniform(layout, budget, allowed)
        worth: Worth = lambda site, count, size: -count / site.units  # noqa: E731
    else:
        ordered = {name: rank[_order(rank)].nan_to_num(nan=-torch.inf) for name, rank in ranks.items()}
        worth = lambda site, count, size: float(ordered[site.name][count : count + size].mean())  # noqa: E731
    if allocation == "global":
        smallest = {site.name: site.minimum for site in layout.sites}
        counts = threshold_counts(layout, ranks, budget, allowed - spent(layout, smallest, budget))
    elif allocation == "exact":
        counts = _exact(layout, ranks, budget, allowed, multiple)
    for site in layout.sites:
        if site.kind == "ffn" and counts[site.name] < site.units and allocation != "exact":
            counts[site.name] = max(site.minimum, counts[site.name] // multiple * multiple)
    counts = _fill(layout, worth, budget, allowed, counts, multiple)
    keep = {}
    for site in layout.sites:
        keep[site.name] = torch.zeros(site.units, dtype=torch.bool)
        keep[site.name][_order(ranks[site.name])[: counts[site.name]]] = True
    return UnitPlan(layout, keep, budget, sensitivity.statistic)
