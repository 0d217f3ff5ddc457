"""Allocation with scores written by hand: never over the budget, the best units per cost, ties by index."""

import contextlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensibert.allocation.allocate import allocate, default_width_multiple
from sensibert.core.artifacts import Plan, Sensitivity
from sensibert.core.budget import Budget
from sensibert.core.cost import counts_of, flops, limit, params, spent, unit_cost
from sensibert.core.errors import SensibertError
from sensibert.core.layout import Flops, Layout, Member, Site

REST = 10  # parameters and FLOPs no site owns


def make_site(number: int, kind: str, units: int, cost: int, minimum: int = 0) -> Site:
    member = Member(f"{number}.weight", 1)
    name = f"layer.{number}.{kind}"
    return Site(name, kind, number, units, (member,), member, cost, Flops(2 * cost, 1), min(minimum, units))


def make(*sites: tuple, scores: list[list[float]], statistic: str = "fisher", hidden: int = 32) -> Sensitivity:
    """sites: (kind, units, parameters a unit[, minimum])."""
    actual = tuple(make_site(number, *site) for number, site in enumerate(sites))
    whole = REST + sum(site.units * site.params for site in actual)
    layout = Layout("bert", "", actual, hidden, whole, whole + 1000, Flops(REST), Flops(REST, sequence=5))
    return Sensitivity(layout, {s.name: torch.tensor(v) for s, v in zip(actual, scores, strict=True)}, statistic)


def kept(plan: Plan) -> list[list[int]]:
    return [plan.kept(site.name).tolist() for site in plan.layout.sites]


def room_left(plan: Plan) -> int:
    return limit(plan.layout, plan.budget) - spent(plan.layout, counts_of(plan.layout, plan.keep), plan.budget)


def next_steps(plan: Plan, step: int) -> list[int]:
    """What each possible enlargement would cost: a head, or neurons up to the next multiple of step."""
    costs = []
    for site in plan.layout.sites:
        count = int(plan.keep[site.name].sum())
        size = min(1 if site.kind == "head" else step - count % step, site.units - count)
        if size:
            costs.append(size * unit_cost(site, plan.budget))
    return costs


numbers = st.floats(0, 100, width=32) | st.sampled_from([0.0, 1.0, math.nan, math.inf])


@st.composite
def problems(draw) -> tuple[Sensitivity, Budget, int]:
    sites, scores = [], []
    for _ in range(draw(st.integers(1, 4))):
        units = draw(st.integers(0, 12))
        kind = draw(st.sampled_from(["head", "ffn"]))
        sites.append((kind, units, draw(st.integers(1, 40)), draw(st.integers(0, 1))))
        drawn = st.lists(numbers, min_size=units, max_size=units)
        scores.append(draw(drawn.filter(lambda values: not values or not all(map(math.isnan, values)))))
    statistic = draw(st.sampled_from(["fisher", "random"]))
    sensitivity = make(*sites, scores=scores, statistic=statistic)
    what = draw(st.sampled_from(["params", "flops"]))
    text = draw(st.integers(1, 100).map(lambda n: f"{n}%{what}") | st.integers(1, 2000).map(lambda n: f"{n}{what}"))
    return sensitivity, Budget.parse(text, draw(st.sampled_from(["encoder", "model"])), 4), draw(st.integers(1, 5))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(problem=problems(), allocation=st.sampled_from(["global", "uniform"]))
def test_the_budget_is_met_from_below_by_less_than_the_cheapest_step(problem, allocation):
    sensitivity, budget, step = problem
    layout = sensitivity.layout
    smallest = spent(layout, {site.name: site.minimum for site in layout.sites}, budget)
    whole = spent(layout, counts_of(layout), budget)
    if (whole * budget.value if budget.relative else budget.value) < smallest:
        with pytest.raises(SensibertError, match=f"smallest reachable budget is {smallest}{budget.kind} "):
            allocate(sensitivity, budget, step, allocation)
        return
    plan = allocate(sensitivity, budget, step, allocation)
    assert room_left(plan) >= 0
    assert all(room_left(plan) < cost for cost in next_steps(plan, step))
    counts = counts_of(layout, plan.keep)
    assert plan.params == params(layout, counts, budget.scope)
    assert plan.flops == flops(layout, counts, budget.scope, 1, budget.length)
    for site in layout.sites:
        keep, score = plan.keep[site.name], sensitivity.scores[site.name].nan_to_num(nan=-1.0)
        assert counts[site.name] >= site.minimum
        if keep.any() and not keep.all():  # the kept are the best, the first of equals
            worst = min((float(score[i]), -i) for i in range(site.units) if keep[i])
            assert all((float(score[i]), -i) < worst for i in range(site.units) if not keep[i])


def test_units_are_taken_by_score_per_cost():
    sensitivity = make(("head", 3, 10), ("ffn", 4, 1), scores=[[50.0, 20.0, 31.0], [4.0, 1.0, 3.0, 2.5]])
    # per parameter: heads 5, 2, 3.1; neurons 4, 1, 3, 2.5
    assert kept(allocate(sensitivity, Budget.parse(f"{REST + 10 + 1 + 10}params"), width_multiple=1)) == [[0, 2], [0]]
    assert kept(allocate(sensitivity, Budget.parse(f"{REST + 23}params"), width_multiple=1)) == [[0, 2], [0, 2, 3]]
    assert kept(allocate(sensitivity, Budget.parse(f"{REST + 34}params"), width_multiple=1)) == [
        [0, 1, 2],
        [0, 1, 2, 3],
    ]


def test_budget_that_the_next_best_unit_exceeds_is_spent_on_smaller_ones():
    sensitivity = make(("head", 2, 10), ("ffn", 3, 1), scores=[[90.0, 80.0], [1.0, 2.0, 3.0]])
    assert kept(allocate(sensitivity, Budget.parse(f"{REST + 12}params"), width_multiple=1)) == [[0], [1, 2]]


@pytest.mark.parametrize("statistic", ["random", "soft_gates"])
def test_some_statistics_say_nothing_about_cost(statistic):
    sensitivity = make(("head", 2, 10), ("ffn", 2, 1), scores=[[3.0, 1.0], [2.0, 0.5]], statistic=statistic)
    assert kept(allocate(sensitivity, Budget.parse(f"{REST + 11}params"), width_multiple=1)) == [[0], [0]]
    assert kept(allocate(sensitivity, Budget.parse(f"{REST + 21}params"), width_multiple=1)) == [[0, 1], [0]]


def test_ties_go_to_the_first_site_and_the_first_unit():
    sensitivity = make(("ffn", 3, 1), ("ffn", 3, 1), scores=[[1.0] * 3, [1.0] * 3])
    assert kept(allocate(sensitivity, Budget.parse(f"{REST + 4}params"), width_multiple=1)) == [[0, 1, 2], [0]]


def test_nan_is_worth_less_than_anything():
    nan = float("nan")
    sensitivity = make(("ffn", 4, 1), ("ffn", 2, 1), scores=[[nan, -5.0, nan, -math.inf], [nan, 0.0]])
    assert kept(allocate(sensitivity, Budget.parse(f"{REST + 3}params"), width_multiple=1)) == [[1, 3], [1]]
    assert kept(allocate(sensitivity, Budget.parse(f"{REST + 4}params"), width_multiple=1)) == [[0, 1, 3], [1]]


@pytest.mark.parametrize("allocation", ["global", "uniform", "exact"])
def test_a_site_whose_scores_are_all_nan_gives_no_plan(allocation):
    sensitivity = make(("ffn", 2, 1), ("ffn", 2, 1), scores=[[1.0, math.nan], [math.nan] * 2], statistic="taylor")
    with pytest.raises(
        SensibertError, match="all scores of layer.1.ffn are NaN in this sensitivity of method 'taylor'"
    ):
        allocate(sensitivity, "90%params", allocation=allocation)


def test_a_complete_sublayer_can_be_removed():
    sensitivity = make(("head", 4, 10), ("ffn", 8, 5), scores=[[0.0] * 4, [1.0] * 8])
    assert kept(allocate(sensitivity, Budget.parse(f"{REST + 40}params"), width_multiple=1)) == [[], list(range(8))]


def test_a_family_keeps_its_minimum_and_its_best_unit():
    sensitivity = make(("head", 3, 10, 1), ("ffn", 8, 5), scores=[[0.0, 0.2, 0.1], [1.0] * 8])
    assert kept(allocate(sensitivity, Budget.parse(f"{REST + 50}params"), width_multiple=1)) == [[1], list(range(8))]


def test_widths_become_multiples_of_width_multiple_and_full_layers_are_not_rounded():
    sensitivity = make(("ffn", 10, 1), ("ffn", 10, 1), scores=[[9.0] * 10, [8.0 - i for i in range(10)]])
    widths = [len(units) for units in kept(allocate(sensitivity, Budget.parse(f"{REST + 17}params"), width_multiple=4))]
    assert widths == [10, 4]
    widths = [len(units) for units in kept(allocate(sensitivity, Budget.parse(f"{REST + 9}params"), width_multiple=4))]
    assert widths == [8, 0]


def test_the_step_follows_the_hidden_size():
    assert (
        default_width_multiple(384),
        default_width_multiple(767),
        default_width_multiple(768),
        default_width_multiple(1024),
    ) == (32, 32, 64, 64)
    sensitivity = make(("ffn", 256, 1), scores=[[1.0] * 256], hidden=768)
    assert len(kept(allocate(sensitivity, Budget.parse(f"{REST + 200}params")))[0]) == 192


def test_flops_and_parameters_can_choose_differently():
    """At length 4 a unit of cost c has 4 * 2c + 16 FLOPs: what is dear in parameters is cheaper in FLOPs."""
    sensitivity = make(("head", 1, 16), ("ffn", 1, 2), scores=[[10.0], [2.0]])
    assert kept(allocate(sensitivity, Budget.parse(f"{REST + 17}params"), width_multiple=1)) == [[], [0]]
    assert kept(allocate(sensitivity, Budget.parse(f"{4 * REST + 150}flops", length=4), width_multiple=1)) == [[0], []]


def test_the_scope_decides_what_is_counted():
    sensitivity = make(("ffn", 10, 10), scores=[[1.0] * 10])
    assert allocate(sensitivity, Budget.parse("60params"), width_multiple=1).params == 60
    plan = allocate(sensitivity, Budget.parse("1060params", "model"), width_multiple=1)
    assert plan.params == 1060 and len(kept(plan)[0]) == 5
    half = allocate(sensitivity, Budget.parse("95%params", "model"), width_multiple=1)
    assert half.params <= 0.95 * 1110 and len(kept(half)[0]) == 4


@pytest.mark.parametrize("text", ["5%params", "1params", "2%flops", "30flops"])
@pytest.mark.parametrize("scope", ["encoder", "model"])
def test_the_smallest_reachable_budget_is_named_and_can_be_had(text, scope):
    sensitivity = make(("head", 3, 30, 1), ("ffn", 40, 2), scores=[[1.0] * 3, [1.0] * 40])
    with pytest.raises(SensibertError, match="smallest reachable budget is") as caught:
        allocate(sensitivity, Budget.parse(text, scope, 4))
    absolute, _, percent = str(caught.value).rpartition("budget is ")[2].partition(" ")
    kind = "params" if text.endswith("params") else "flops"
    for reachable in (absolute, percent.strip("()").replace(" ", "") + kind):
        plan = allocate(sensitivity, Budget.parse(reachable, scope, 4))
        assert [len(units) for units in kept(plan)] == [1, 0]


def test_uniform_keeps_the_same_share_everywhere():
    scores = [[float(i) for i in range(12)], [float(-i) for i in range(96)], [0.0] * 12, [1e9] * 96]
    sites = [("head", 12, 64), ("ffn", 96, 8)] * 2
    plan = allocate(make(*sites, scores=scores), Budget.parse("50%params"), width_multiple=8, allocation="uniform")
    shares = [len(units) / site.units for units, site in zip(kept(plan), plan.layout.sites, strict=True)]
    assert max(shares) - min(shares) <= 1 / 12
    assert kept(plan)[0] == list(range(6, 12)) and kept(plan)[1] == list(range(len(kept(plan)[1])))


def test_the_whole_model_is_a_budget_too():
    for allocation in ("global", "uniform"):
        sensitivity = make(("head", 3, 7), ("ffn", 10, 3), scores=[[0.0] * 3, [0.0] * 10])
        assert all(
            keep.all() for keep in allocate(sensitivity, Budget.parse("100%params"), 4, allocation).keep.values()
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"allocation": "greedy"}, "allocation is 'greedy', want one of global, uniform, exact"),
        ({"width_multiple": 0}, "width_multiple is 0, want at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    sensitivity = make(("ffn", 4, 1), scores=[[1.0] * 4])
    with pytest.raises(SensibertError, match=message):
        allocate(**({"sensitivity": sensitivity, "budget": Budget.parse("50%params")} | arguments))


@pytest.mark.parametrize("scores", [{}, {"layer.0.ffn": torch.ones(3)}])
def test_scores_that_do_not_fit_the_layout_are_named(scores):
    layout = make(("ffn", 4, 1), scores=[[1.0] * 4]).layout
    with pytest.raises(SensibertError, match=r"scores of layer.0.ffn are \([03],\), want \(4,\)"):
        allocate(Sensitivity(layout, scores, "fisher"), Budget.parse("100%params"))


def worth(plan: Plan, sensitivity: Sensitivity) -> float:
    return sum(float(sensitivity.scores[name][keep].double().sum()) for name, keep in plan.keep.items())


@settings(deadline=None, max_examples=40, derandomize=True)
@given(problem=problems())
def test_exact_never_exceeds_the_budget_whatever_the_scores(problem):
    sensitivity, budget, step = problem
    with contextlib.suppress(SensibertError):
        plan = allocate(sensitivity, budget, step, "exact")
        assert spent(plan.layout, counts_of(plan.layout, plan.keep), budget) <= limit(plan.layout, budget)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(seed=st.integers(0, 10**6), share=st.integers(10, 90), step=st.sampled_from([1, 3, 4]))
def test_exact_keeps_the_largest_sum_that_rounded_widths_allow(seed, share, step):
    generator = torch.Generator().manual_seed(seed)
    sites = (("head", 3, 17), ("ffn", 8, 5), ("ffn", 7, 3))
    scores = [torch.rand(units, generator=generator).tolist() for _, units, _ in sites]
    sensitivity, budget = make(*sites, scores=scores), Budget.parse(f"{share}%params")
    plan = allocate(sensitivity, budget, step, "exact")
    best, allowed = 0.0, limit(plan.layout, budget)
    options = [range(4)] + [sorted({*range(0, units, step), units}) for units in (8, 7)]
    for counts in itertools.product(*options):
        if REST + sum(count * cost for count, (_, _, cost) in zip(counts, sites)) <= allowed:
            best = max(best, sum(sum(sorted(s)[len(s) - c :]) for s, c in zip(scores, counts)))
    assert worth(plan, sensitivity) == pytest.approx(best)
    assert worth(plan, sensitivity) >= worth(allocate(sensitivity, budget, step), sensitivity) - 1e-9
