"""Budgets of latency and size: met by measured costs, which do not grow evenly with the units."""

import itertools

import pytest
import torch

from sensibert.allocation import allocate, explain
from sensibert.core.artifacts import Plan, Sensitivity
from sensibert.core.budget import Budget
from sensibert.core.cost import counts_of, encoder_left, spent
from sensibert.core.cost_table import CostTable
from sensibert.core.errors import SensibertError
from sensibert.core.layout import Flops, Layout, Member, Site

# The second head costs nearly nothing, and neurons beyond 64 are dear.
HEADS, FFN = ((0, 0), (1, 300), (2, 310), (3, 900)), ((0, 0), (32, 100), (64, 200), (128, 1000))
TABLE = CostTable("latency", "torch", 1000, HEADS, FFN, "bert", 32)


def layout() -> Layout:
    member = Member("weight", 0)
    kinds = (("head", 3), ("ffn", 128))
    sites = tuple(
        Site(f"layer.{layer}.{kind}", kind, layer, units, (member,), member, 10, Flops(10))
        for layer in range(2)
        for kind, units in kinds
    )
    return Layout("bert", "0123456789abcdef", sites, 32, 5000, 9000, Flops(7), Flops(8))


def sensitivity(seed: int = 0) -> Sensitivity:
    generator = torch.Generator().manual_seed(seed)
    return Sensitivity(
        layout(), {s.name: torch.rand(s.units, generator=generator) for s in layout().sites}, "fisher", 8
    )


def value(scores: Sensitivity, plan: Plan) -> float:
    return sum(float(scores.scores[name][keep].sum()) for name, keep in plan.keep.items())


@pytest.mark.parametrize("microseconds", [1500, 2345, 3000, 4500])
@pytest.mark.parametrize("seed", range(3))
def test_a_budget_of_latency_is_met_with_the_largest_sum_of_scores(microseconds, seed):
    scores, budget = sensitivity(seed), Budget(microseconds, "latency", table=TABLE)
    plan = allocate(scores, budget)
    assert spent(layout(), counts_of(layout(), plan.keep), budget) <= microseconds
    best = 0.0
    for heads in itertools.product(range(4), repeat=2):
        for widths in itertools.product((0, 32, 64, 96, 128), repeat=2):
            counts = dict(zip((s.name for s in layout().sites), (heads[0], widths[0], heads[1], widths[1])))
            if spent(layout(), counts, budget) <= microseconds:
                kept = (
                    scores.scores[name].sort(descending=True).values[:count].sum() for name, count in counts.items()
                )
                best = max(best, float(sum(kept)))
    assert value(scores, plan) == pytest.approx(best, rel=1e-5)


def test_a_fraction_is_one_of_the_untrimmed_cost():
    whole = spent(layout(), counts_of(layout()), Budget(1.0, "latency", True, table=TABLE))
    assert whole == 1000 + 2 * (900 + 1000)
    half = allocate(sensitivity(), Budget.parse("50%latency").with_table(TABLE))
    assert spent(layout(), counts_of(layout(), half.keep), half.budget) <= whole / 2
    left = encoder_left(layout(), Budget(2900, "latency", table=TABLE))
    assert left == pytest.approx(1900 / 3800)


def test_uniform_allocation_keeps_the_same_fraction_of_every_layer():
    plan = allocate(sensitivity(), Budget(3000, "latency", table=TABLE), 32, "uniform")
    counts = counts_of(layout(), plan.keep)
    assert spent(layout(), counts, plan.budget) <= 3000
    assert abs(counts["layer.0.ffn"] - counts["layer.1.ffn"]) <= 32


def test_a_budget_that_nothing_can_meet_names_the_smallest_and_what_bounds_it():
    with pytest.raises(SensibertError) as caught:
        allocate(sensitivity(), Budget(900, "latency", table=TABLE))
    message = str(caught.value)
    assert (
        "everything but heads and neurons takes 1 ms (one forward pass of 1 x 128 tokens in torch, 1 thread)" in message
    )
    assert "the smallest reachable budget is 1.001ms" in message
    allocate(sensitivity(), Budget.parse("1.001ms").with_table(TABLE))


def test_without_a_table_the_budget_says_what_it_needs():
    with pytest.raises(SensibertError, match="^budget: 8ms needs measured costs, want a table of `sensibert latency`"):
        allocate(sensitivity(), "8ms")


def test_the_table_of_another_kind_is_refused():
    with pytest.raises(SensibertError, match="kind is 'size', and table is of latency"):
        Budget(1e6, "size", table=TABLE)


def test_a_plan_keeps_its_table_in_its_file(tmp_path):
    plan = allocate(sensitivity(), Budget(3000, "latency", table=TABLE))
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors").budget == plan.budget


def test_a_plan_of_measured_costs_is_explained():
    plan = allocate(sensitivity(), Budget(3000, "latency", table=TABLE))
    text = explain(plan, sensitivity())
    cost = spent(layout(), counts_of(layout(), plan.keep), plan.budget)
    assert text.startswith(f"3ms of the model: {cost / 1e3:.4g} ms of 4.8 ms (")
    assert "divided by their mean cost" in text and "Costs are measured" in text and "threshold" not in text
