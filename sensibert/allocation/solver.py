"""Budgets with several levels per group: dynamic programming over buckets of cost (a multiple-choice knapsack).

For value curves that are not concave and costs with steps, where one multiplier does not find the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..core.errors import SensibertError

Groups = Sequence[Sequence[float]]  # [group][level]


def solve_budget(costs: Groups, values: Groups, capacity: float, buckets: int = 8192) -> list[int]:
    """One level per group, so that the sum of costs[g][level] is at most capacity and that of values[g][level] is
    largest.

    Costs are rounded up to a multiple of capacity / buckets, so capacity is never exceeded. The capacity that rounding
    leaves unused is spent on the largest gains that fit. Integer costs with capacity <= buckets are exact. Ties go to
    the lower cost and the lower level. SensibertError if no choice fits; ValueError for arguments that do not."""
    _check(costs, values, capacity, buckets)
    exact = capacity <= buckets and all(float(c).is_integer() for group in costs for c in group)
    limit = int(capacity) if exact else buckets
    unit = 1.0 if exact or capacity == 0 else capacity / buckets

    def rounded(cost: float) -> int:  # limit + 1 for every cost above capacity
        return min(math.ceil(cost / unit), limit) if cost <= capacity else limit + 1

    levels = _solve_levels(
        [[rounded(c) for c in group] for group in costs], [[float(v) for v in g] for g in values], limit
    )
    if len(levels) != len(costs):
        least = sum(min(group) for group in costs)
        raise SensibertError(
            f"budget: the capacity is {capacity:g}, want at least {least:g}, the sum of the lowest costs"
        )
    return _raise_what_fits(costs, values, capacity, list(levels))


def _solve_levels(costs: list[list[int]], values: list[list[float]], capacity: int) -> list[int]:
    """One level per group for integer costs, [] if none fits: best[c] = the largest value at total cost exactly c."""
    best = np.full(capacity + 1, -np.inf)
    best[0] = 0.0
    chosen = np.full((len(costs), capacity + 1), -1, dtype=np.int32)
    for g, (group_costs, group_values) in enumerate(zip(costs, values)):
        raised = np.full(capacity + 1, -np.inf)
        for level, (cost, value) in enumerate(zip(group_costs, group_values)):
            if cost > capacity:
                continue
            candidate = best[: capacity + 1 - cost] + value
            better = candidate > raised[cost:]
            raised[cost:][better] = candidate[better]
            chosen[g, cost:][better] = level
        best = raised
    at = int(best.argmax())
    if best[at] == -np.inf:
        return []
    levels = [0] * len(costs)
    for g in reversed(range(len(costs))):
        levels[g] = int(chosen[g, at])
        at -= costs[g][levels[g]]
    return levels


def _raise_what_fits(costs: Groups, values: Groups, capacity: float, levels: list[int]) -> list[int]:
    """Spend what rounding left over: take the largest gain that fits until none does."""
    while True:
        left = capacity - sum(group[level] for group, level in zip(costs, levels))
        gains = [
            (values[g][other] - values[g][level], -g, -other)
            for g, level in enumerate(levels)
            for other in range(len(costs[g]))
            if values[g][other] > values[g][level] and costs[g][other] - costs[g][level] <= left
        ]
        if not gains:
            return levels
        _, g, other = max(gains)
        levels[-g] = -other


def _check(costs: Groups, values: Groups, capacity: float, buckets: int) -> None:
    if len(costs) != len(values):
        raise ValueError(f"solve_budget: values has {len(values)} groups, want {len(costs)} as costs")
    for g, (group_costs, group_values) in enumerate(zip(costs, values)):
        if not len(group_costs) or len(group_costs) != len(group_values):
            sizes = f"{len(group_costs)} costs and {len(group_values)} values"
            raise ValueError(f"solve_budget: group {g} has {sizes}, want as many of one as of the other, at least one")
        if not all(math.isfinite(x) for x in [*group_costs, *group_values]) or min(group_costs) < 0:
            raise ValueError(f"solve_budget: group {g} holds a value that is not finite or a cost below 0")
    if not (math.isfinite(capacity) and capacity >= 0) or buckets < 1:
        raise ValueError(f"solve_budget: capacity is {capacity}, buckets {buckets}; want >= 0 and >= 1")
