"""Budgets with more than one level a group: dynamic programming over buckets of cost (a multiple-choice knapsack).

For value curves that do not add up, and for measured costs: a latency table has steps no multiplier can follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .. import _native
from ..core.errors import SensibertError


def solve_budget(
    costs: Sequence[Sequence[float]], values: Sequence[Sequence[float]], capacity: float, buckets: int = 8192
) -> list[int]:
    """One level a group: the sum of costs[g][level] at most capacity, the sum of values[g][level] as large as can be.

    Costs are rounded up to capacity / buckets, so the budget is never exceeded; what rounding left over is then spent
    on the best raises that still fit. Integer costs with capacity <= buckets are exact. Ties go to the lower cost and
    the lower level. The C++ solver, where it is built, gives the same levels. SensibertError where no choice fits."""
    _check(costs, values, capacity, buckets)
    exact = capacity <= buckets and all(float(c).is_integer() for group in costs for c in group)
    room = int(capacity) if exact else buckets
    unit = 1.0 if exact or capacity == 0 else capacity / buckets

    def rounded(cost: float) -> int:  # beyond the capacity: one bucket too many, however far beyond
        return min(math.ceil(cost / unit), room) if cost <= capacity else room + 1

    solve = solve_levels if _native.module is None else _native.module.solve_levels
    levels = solve([[rounded(c) for c in group] for group in costs], [[float(v) for v in g] for g in values], room)
    if len(levels) != len(costs):
        least = sum(min(group) for group in costs)
        raise SensibertError(
            f"budget: the capacity is {capacity:g}, want at least {least:g}, the sum of the lowest costs"
        )
    return _raise_what_fits(costs, values, capacity, list(levels))


def solve_levels(costs: list[list[int]], values: list[list[float]], capacity: int) -> list[int]:
    """What csrc/host/solver.cpp does, in numpy: best[c] = the largest value at total cost exactly c."""
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


def _raise_what_fits(costs, values, capacity: float, levels: list[int]) -> list[int]:
    """Spend what rounding left over: the largest gain that fits, again and again."""
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


def _check(costs, values, capacity: float, buckets: int) -> None:
    if len(costs) != len(values):
        raise ValueError(f"solve_budget: values has {len(values)} groups, want {len(costs)} as costs")
    for g, (group_costs, group_values) in enumerate(zip(costs, values)):
        if not len(group_costs) or len(group_costs) != len(group_values):
            said = f"{len(group_costs)} costs and {len(group_values)} values"
            raise ValueError(f"solve_budget: group {g} has {said}, want as many of one as of the other, at least one")
        if not all(math.isfinite(x) for x in [*group_costs, *group_values]) or min(group_costs) < 0:
            raise ValueError(f"solve_budget: group {g} holds a value that is not finite or a cost below 0")
    if not (math.isfinite(capacity) and capacity >= 0) or buckets < 1:
        raise ValueError(f"solve_budget: capacity is {capacity}, buckets {buckets}; want >= 0 and >= 1")
