"""Allocation of blocks with scores written by hand: exactly as many as the budget pays for, ties by index."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensibert.allocation.allocate import allocate
from sensibert.core.artifacts import Plan, Sensitivity
from sensibert.core.budget import Budget
from sensibert.core.cost import element_cost, kept_elements, left, limit
from sensibert.core.errors import SensibertError
from sensibert.core.grid import Grid
from sensibert.core.layout import Flops, Layout, Weight

REST = 10  # parameters of the encoder no weight owns


def make(*shapes: tuple[int, ...], grid: Grid, scores=None, statistic: str = "fisher") -> Sensitivity:
    """shapes: (rows, cols[, FLOPs of an element and token])."""
    weights = tuple(Weight(f"{n}.weight", n, *shape[:2], (*shape, 2)[2]) for n, shape in enumerate(shapes))
    whole = REST + sum(w.rows * w.cols for w in weights)
    token = sum(w.rows * w.cols * w.flops for w in weights)
    layout = Layout("bert", "", (), 32, whole, whole + 1000, Flops(token + 6), Flops(token + 7, 5), weights)
    found = {}
    for number, w in enumerate(weights):
        shape = grid.shape(w.rows, w.cols)
        given_ = None if scores is None else torch.tensor(scores[number], dtype=torch.float32).view(shape)
        found[w.parameter] = torch.rand(shape) if given_ is None else given_
    return Sensitivity(layout, found, statistic, grid=grid)


def kept(plan: Plan) -> list[list[int]]:
    return [plan.keep[w.parameter].flatten().nonzero().flatten().tolist() for w in plan.layout.weights]


def test_exactly_what_the_budget_pays_for_stays():
    found = make((4, 8), (6, 3), grid=Grid.element())
    plan = allocate(found, Budget.parse("50%params"))  # 30 of 60, of which 10 cannot be masked
    scores = torch.cat([score.flatten() for score in found.scores.values()])
    keep = torch.cat([plan.keep[name].flatten() for name in found.scores])
    assert int(keep.sum()) == 20 == plan.params - REST
    assert scores[keep].min() > scores[~keep].max()
    assert plan.grid == Grid.element() and plan.flops == left(plan.layout, None, None)[1]  # nothing skips an element


def test_ties_go_to_the_first_and_nan_goes_first_of_all():
    found = make((2, 2), (2, 2), grid=Grid.element(), scores=[[1, math.nan, 1, 1], [1, 1, 2, math.nan]])
    assert kept(allocate(found, Budget.parse("13params"))) == [[0, 2], [2]]
    assert kept(allocate(found, Budget.parse("17params"))) == [[0, 1, 2, 3], [0, 1, 2]]


def test_short_blocks_are_priced_by_their_elements():
    """5 x 3 in blocks of 2: 4, 2 / 4, 2 / 2, 1 elements."""
    grid, score = Grid(2, 2), [4.0, 3.0, 3.0, 1.0, 1.0, 1.0]  # per element: 1, 1.5, 0.75, 0.5, 0.5, 1
    plans = [kept(allocate(make((5, 3), grid=grid, scores=[score]), Budget.parse(f"{REST + n}params"))) for n in (2, 6)]
    assert plans == [[[1]], [[0, 1]]]
    assert kept_elements(Weight("", 0, 5, 3, 2), torch.ones(3, 2, dtype=torch.bool), grid) == 15


def test_uniform_gives_every_weight_the_same_share():
    found = make((4, 10), (8, 10), grid=Grid.element(), scores=[list(range(40)), [0.0] * 80])
    plan = allocate(found, Budget.parse(f"{REST + 60}params"), policy="uniform")
    assert kept(plan) == [list(range(20, 40)), list(range(40))]


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 2, 4])), min_size=1, max_size=3
    ),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    share=st.floats(0, 1),
    kind=st.sampled_from(["params", "flops"]),
    policy=st.sampled_from(["global", "uniform"]),
    seed=st.integers(0, 99),
)
def test_a_plan_is_below_its_budget_by_less_than_a_block(shapes, block, share, kind, policy, seed):
    torch.manual_seed(seed)
    grid = Grid(*block)
    found = make(*shapes, grid=grid)
    layout, flops = found.layout, kind == "flops"
    if flops and grid == Grid.element():
        return
    dense = left(layout, None, None)[flops]
    smallest = dense - sum(w.rows * w.cols * (w.flops * 128 if flops else 1) for w in layout.weights)
    budget = Budget(float(smallest + int(share * (dense - smallest))), kind, False)
    plan = allocate(found, budget, policy=policy)
    spent = (plan.flops if flops else plan.params, left(layout, plan.keep, grid)[flops])
    dearest = max((block[0] * block[1] * element_cost(w, budget) for w in layout.weights), default=0)
    assert spent[0] == spent[1] <= limit(layout, budget, grid)
    whole = all(bool(kept.all()) for kept in plan.keep.values())
    assert whole or limit(layout, budget, grid) - spent[0] < dearest


def test_flops_count_what_a_kernel_can_skip():
    found = make((4, 4), (4, 4, 0), (4, 4, 6), grid=Grid(2, 2), scores=[[1, 2, 3, 4], [0] * 4, [0] * 4])
    plan = allocate(found, Budget.parse("30%flops"))
    assert plan.keep["1.weight"].all()  # costs no FLOPs a token: nothing is won by masking it
    assert plan.flops <= 0.3 * left(found.layout, None, None)[1]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"budget": Budget.parse("30%flops")}, "30%flops, but no kernel skips single elements"),
        ({"budget": Budget.parse("5params")}, "5 params, but 10 cannot be trimmed"),
        ({"budget": Budget.parse("8ms")}, "latency needs a measured table"),
        ({"step": 4}, "step is 4, want None: it rounds widths, which a grid leaves whole"),
        ({"policy": "best"}, "policy is 'best', want one of global, uniform"),
    ],
)
def test_what_a_grid_cannot_do_is_said(change, said):
    with pytest.raises(SensibertError, match=said):
        allocate(make((4, 4), grid=Grid.element()), **({"budget": Budget.parse("50%params")} | change))


def test_scores_of_another_shape_are_named():
    found = make((4, 4), grid=Grid.element())
    found.scores["0.weight"] = torch.rand(2, 2)
    with pytest.raises(SensibertError, match=r"scores of 0.weight are \(2, 2\), want \(4, 4\) \(grid element\)"):
        allocate(found, Budget.parse("50%params"))


def test_both_artifacts_read_back_exactly(tmp_path):
    found = make((5, 7), (3, 2), grid=Grid(2, 3))
    plan = allocate(found, Budget.parse("60%params"))
    found.save(tmp_path / "scores.safetensors")
    plan.save(tmp_path / "plan.safetensors")
    assert Sensitivity.load(tmp_path / "scores.safetensors") == found
    assert Plan.load(tmp_path / "plan.safetensors") == plan
