"""Sensitivity and budget -> plan. Pure: no model, no GPU; ties break by (site, unit).

Keep a unit while its score per cost is above one global multiplier, i.e. take units in falling score / cost until
the budget is spent. Then round to what hardware likes: FFN widths to a multiple of `step` (heads are whole anyway), and
fill what that freed with the best of the dropped, one head or one step of neurons at a time, never above the budget.
`exact` solves the same with the rounding in it, by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..core.artifacts import Plan, Sensitivity, UnitPlan
from ..core.budget import Budget
from ..core.cost import limit, spent, unit_cost
from ..core.errors import SensibertError
from ..core.layout import Layout, Site
from .blocks import allocate_blocks
from .solver import solve_budget

# A gate value, or a coin, says nothing about cost: these compare units of different size as they are.
RANKED_BY_SCORE = ("paper", "random")
POLICIES = ("global", "uniform", "exact")
BEYOND_ALL = 1e100  # an infinite score, where scores are added
# (site, count, size) -> how much the next `size` units of a site that keeps its best `count` are wanted
Worth = Callable[[Site, int, int], float]


def default_width_multiple(hidden: int) -> int:
    """FFN widths are rounded to this: tensor cores like 64, small models lose too much by it."""
    return 64 if hidden >= 768 else 32


def _order(scores: Tensor) -> Tensor:
    """Unit numbers, best first; NaN last, ties by index."""
    return torch.argsort(scores.nan_to_num(nan=-torch.inf), descending=True, stable=True)


def _threshold(layout: Layout, ranks: dict[str, Tensor], budget: Budget, room: int) -> dict[str, int]:
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
    """The same share of every site, the largest that fits."""
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        counts = {s.name: max(s.minimum, int(share * s.units)) for s in layout.sites}
        low, high = (share, high) if spent(layout, counts, budget) <= allowed else (low, share)
    return {s.name: max(s.minimum, int(low * s.units)) for s in layout.sites}


def _exact(layout: Layout, ranks: Mapping[str, Tensor], budget: Budget, allowed: int, step: int) -> dict[str, int]:
    """The rounded counts whose kept scores sum to the most, up to the resolution of `solve_budget`."""
    none = spent(layout, {site.name: 0 for site in layout.sites}, budget)
    levels, costs, values = [], [], []
    for site in layout.sites:
        price = unit_cost(site, budget)
        best = ranks[site.name][_order(ranks[site.name])].nan_to_num(nan=0.0, posinf=BEYOND_ALL, neginf=0.0) * price
        counts = range(site.units + 1) if site.kind == "head" else (*range(0, site.units, step), site.units)
        levels.append([count for count in counts if count >= site.minimum])
        costs.append([count * price for count in levels[-1]])
        values.append([float(best[:count].sum()) for count in levels[-1]])
    chosen = solve_budget(costs, values, allowed - none)
    return {site.name: counts[level] for site, counts, level in zip(layout.sites, levels, chosen, strict=True)}


def _step(site: Site, step: int, count: int) -> int:
    """Units that the next enlargement of a site adds: one head, or neurons up to the next multiple of step."""
    size = 1 if site.kind == "head" else step - count % step
    return min(size, site.units - count)


def _fill(
    layout: Layout, worth: Worth, budget: Budget, allowed: int, counts: Mapping[str, int], step: int
) -> dict[str, int]:
    """Enlarge sites by one head or step of neurons while anything fits; what is worth most goes first."""
    counts, room = dict(counts), allowed - spent(layout, counts, budget)
    while True:
        options = []
        for number, site in enumerate(layout.sites):
            count = counts[site.name]
            size = _step(site, step, count)
            if size and size * unit_cost(site, budget) <= room:
                options.append((worth(site, count, size), -number, size))
        if not options:
            return counts
        _, number, size = max(options)
        site = layout.sites[-number]
        counts[site.name] += size
        room -= size * unit_cost(site, budget)


def allocate(sensitivity: Sensitivity, budget: Budget | str, step: int | None = None, policy: str = "global") -> Plan:
    """Choose the units that survive.

    budget: an upper bound, also as text ("50%params"); the plan is below it by less than the cheapest head or rounding
    step that was left.
    step: FFN widths become multiples of it (1 = no rounding; default by `default_width_multiple`).
    policy: `global` (one threshold for all sites), `uniform` (the same share everywhere; scores rank inside a site) or
    `exact` (the largest sum of kept scores at widths that are rounded already).
    A sensitivity of blocks of a grid gives a plan of blocks (`allocate_blocks`), which no step rounds.
    SensibertError if the budget is below what cannot be trimmed."""
    layout, budget = sensitivity.layout, Budget.parse(budget) if isinstance(budget, str) else budget
    if policy not in POLICIES:
        raise SensibertError(f"allocate: policy is {policy!r}, want one of {', '.join(POLICIES)}")
    if sensitivity.grid is not None:
        if policy == "exact":
            raise SensibertError("allocate: policy is 'exact', which means whole units, and the scores are of a grid")
        if step is not None:
            raise SensibertError(f"allocate: step is {step}, want None: it rounds widths, which a grid leaves whole")
        return allocate_blocks(sensitivity, sensitivity.grid, budget, policy)
    step = default_width_multiple(layout.hidden) if step is None else step
    if step < 1:
        raise SensibertError(f"allocate: step is {step}, want at least 1")
    allowed = limit(layout, budget)
    ranks = {}
    for site in layout.sites:
        score = sensitivity.scores.get(site.name, torch.empty(0)).double()
        if score.shape != (site.units,):
            raise SensibertError(f"allocate: scores of {site.name} are {tuple(score.shape)}, want ({site.units},)")
        ranks[site.name] = score if sensitivity.statistic in RANKED_BY_SCORE else score / unit_cost(site, budget)
    if policy == "uniform":
        counts = _uniform(layout, budget, allowed)
        worth: Worth = lambda site, count, size: -count / site.units  # noqa: E731
    else:
        ordered = {name: rank[_order(rank)].nan_to_num(nan=-torch.inf) for name, rank in ranks.items()}
        worth = lambda site, count, size: float(ordered[site.name][count : count + size].mean())  # noqa: E731
        smallest = {site.name: site.minimum for site in layout.sites}
        counts = _threshold(layout, ranks, budget, allowed - spent(layout, smallest, budget))
    if policy == "exact":
        counts = _exact(layout, ranks, budget, allowed, step)
    for site in layout.sites:
        if site.kind == "ffn" and counts[site.name] < site.units and policy != "exact":
            counts[site.name] = max(site.minimum, counts[site.name] // step * step)
    counts = _fill(layout, worth, budget, allowed, counts, step)
    keep = {}
    for site in layout.sites:
        keep[site.name] = torch.zeros(site.units, dtype=torch.bool)
        keep[site.name][_order(ranks[site.name])[: counts[site.name]]] = True
    return UnitPlan(layout, keep, budget, sensitivity.statistic)
