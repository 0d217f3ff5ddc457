"""The budget solver against trying everything."""

import itertools

import numpy as np
import pytest

from sensibert.allocation.solver import solve_budget
from sensibert.core.errors import SensibertError


def total(table, levels):
    return sum(group[level] for group, level in zip(table, levels))


def best_by_trying(costs, values, capacity):
    choices = itertools.product(*(range(len(group)) for group in costs))
    return max(total(values, c) for c in choices if total(costs, c) <= capacity)


def problem(seed, groups=4, levels=5, most=20):
    rng = np.random.default_rng(seed)
    costs = [[0, *rng.integers(0, most, rng.integers(0, levels)).tolist()] for _ in range(groups)]
    return costs, [rng.integers(-3, 30, len(group)).astype(float).tolist() for group in costs]


@pytest.mark.parametrize("seed", range(30))
def test_integer_costs_are_solved_exactly(seed):
    costs, values = problem(seed)
    levels = solve_budget(costs, values, 25)
    assert total(costs, levels) <= 25
    assert total(values, levels) == best_by_trying(costs, values, 25)


@pytest.mark.parametrize("seed", range(10))
def test_measured_costs_never_exceed_the_budget_and_come_close(seed):
    costs, values = problem(seed)
    costs = [[c * 0.3137 for c in group] for group in costs]
    levels = solve_budget(costs, values, 7.77, buckets=2000)
    assert total(costs, levels) <= 7.77
    # 4 groups round up by less than a bucket each, so what fits into 4 buckets less is reached
    assert total(values, levels) >= best_by_trying(costs, values, 7.77 * (1 - 4 / 2000))


def test_what_rounding_left_over_is_spent():
    assert solve_budget([[0.0, 1.01], [0.0, 0.99]], [[0.0, 5.0], [0.0, 4.0]], 2.0, buckets=2) == [1, 1]


def test_ties_go_to_the_lower_cost_and_level():
    assert solve_budget([[0, 3, 3], [0, 2]], [[0.0, 1.0, 1.0], [0.0, 0.0]], 9) == [1, 0]


def test_a_level_that_costs_more_than_the_capacity_is_not_taken():
    assert solve_budget([[1, 10**12]], [[0.0, 9.0]], 5) == [0]


def test_no_groups_and_no_capacity():
    assert solve_budget([], [], 3) == []
    assert solve_budget([[0, 1]], [[0.0, 1.0]], 0) == [0]
    assert solve_budget([[0.0, 0.5]], [[0.0, 1.0]], 0.0) == [0]


def test_the_error_for_an_impossible_budget_names_a_possible_one():
    with pytest.raises(SensibertError, match=r"the capacity is 4, want at least 5, the sum of the lowest costs"):
        solve_budget([[2, 3], [3, 9]], [[0.0, 1.0], [0.0, 1.0]], 4)


@pytest.mark.parametrize(
    "costs, values, capacity, message",
    [
        ([[1]], [], 1, "values has 0 groups, want 1 as costs"),
        ([[]], [[]], 1, "group 0 has 0 costs and 0 values"),
        ([[1], [1, 2]], [[1.0], [1.0]], 1, "group 1 has 2 costs and 1 values"),
        ([[1]], [[float("nan")]], 1, "group 0 holds a value that is not finite"),
        ([[-1]], [[1.0]], 1, "group 0 holds .* a cost below 0"),
        ([[1]], [[1.0]], -1, "capacity is -1"),
    ],
)
def test_a_bad_argument_is_named(costs, values, capacity, message):
    with pytest.raises(ValueError, match=f"solve_budget: .*{message}|solve_budget: {message}"):
        solve_budget(costs, values, capacity)
