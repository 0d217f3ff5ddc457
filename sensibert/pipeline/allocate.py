"""Sensitivity and budget -> plan. Pure: no model, no GPU; ties break by (site, unit).

Keep a unit while its score per cost is above one global multiplier, i.e. take units in falling score / cost until
the budget is spent. Then round to what hardware likes: FFN widths to a multiple of `step` (heads are whole anyway), and
fill what that freed with the best of the dropped, one head or one step of neurons at a time, never above the budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..artifacts import Budget, Layout, Plan, Sensitivity, Site
from ..cost import flops, limit, params, spent, unit_cost
from ..errors import SensibertError

# A gate value, or a coin, says nothing about cost: these compare units of different size as they are.
RANKED_BY_SCORE = ("paper", "random")
POLICIES = ("global", "uniform")


def width_step(hidden: int) -> int:
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


def _step(site: Site, step: int, count: int) -> int:
    """Units that the next enlargement of a site adds: one head, or neurons up to the next multiple of step."""
    size = 1 if site.kind == "head" else step - count % step
    return min(size, site.units - count)


def _fill(
    layout: Layout, ranks: dict[str, Tensor], budget: Budget, allowed: int, counts: dict[str, int], step: int
) -> dict[str, int]:
    """Enlarge sites by their best dropped units while anything fits; the best mean rank goes first."""
    counts = dict(counts)
    ordered = {name: rank[_order(rank)].nan_to_num(nan=-torch.inf) for name, rank in ranks.items()}
    room = allowed - spent(layout, counts, budget)
    while True:
        options = []
        for number, site in enumerate(layout.sites):
            count = counts[site.name]
            size = _step(site, step, count)
            if size and size * unit_cost(site, budget) <= room:
                options.append((float(ordered[site.name][count : count + size].mean()), -number, size))
        if not options:
            return counts
        _, number, size = max(options)
        site = layout.sites[-number]
        counts[site.name] += size
        room -= size * unit_cost(site, budget)


def allocate(sensitivity: Sensitivity, budget: Budget, step: int | None = None, policy: str = "global") -> Plan:
    """Choose the units that survive.

    budget: an upper bound; the plan is below it by less than the cheapest head or rounding step that was left.
    step: FFN widths become multiples of it (1 = no rounding; default by `width_step`).
    policy: `global` (one threshold for all sites) or `uniform` (the same share everywhere; scores rank inside a site).
    SensibertError if the budget is below what cannot be trimmed."""
    layout = sensitivity.layout
    if policy not in POLICIES:
        raise SensibertError(f"allocate: policy is {policy!r}, want one of {', '.join(POLICIES)}")
    step = width_step(layout.hidden) if step is None else step
    if step < 1:
        raise SensibertError(f"allocate: step is {step}, want at least 1")
    allowed = limit(layout, budget)
    ranks = {}
    for site in layout.sites:
        score = sensitivity.scores[site.name].double()
        ranks[site.name] = score if sensitivity.statistic in RANKED_BY_SCORE else score / unit_cost(site, budget)
    if policy == "uniform":
        counts = _uniform(layout, budget, allowed)
    else:
        smallest = {site.name: site.minimum for site in layout.sites}
        counts = _threshold(layout, ranks, budget, allowed - spent(layout, smallest, budget))
    for site in layout.sites:
        if site.kind == "ffn" and counts[site.name] < site.units:
            counts[site.name] = max(site.minimum, counts[site.name] // step * step)
    counts = _fill(layout, ranks, budget, allowed, counts, step)
    keep = {}
    for site in layout.sites:
        keep[site.name] = torch.zeros(site.units, dtype=torch.bool)
        keep[site.name][_order(ranks[site.name])[: counts[site.name]]] = True
    return Plan(
        layout,
        keep,
        budget,
        sensitivity.statistic,
        params=params(layout, counts, budget.scope),
        flops=flops(layout, counts, budget.scope, 1, budget.length),
    )
