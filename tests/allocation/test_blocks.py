"""Allocation of blocks with scores by hand: exactly as many as the budget pays for, ties by index."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from sensibert.allocation.allocate import allocate
from sensibert.core.artifacts import BlockPlan, Plan, Sensitivity
from sensibert.core.budget import Budget
from sensibert.core.cost import cost_of_blocks, cost_of_units, element_cost, kept_elements, limit
from sensibert.core.errors import SensibertError
from sensibert.core.grid import Grid
from sensibert.core.layout import Flops, Layout, Weight

REST = 10  # encoder parameters outside the weights


def make(*shapes: tuple[int, ...], grid: Grid, scores=None, statistic: str = "fisher") -> Sensitivity:
    """shapes: (rows, cols[, FLOPs of an element and token])."""
    weights = tuple(Weight(f"{n}.weight", n, *shape[:2], (*shape, 2)[2]) for n, shape in enumerate(shapes))
    whole = REST + sum(w.rows * w.cols for w in weights)
    token = sum(w.rows * w.cols * w.flops for w in weights)
    layout = Layout("bert", "", (), 32, whole, whole + 1000, Flops(token + 6), Flops(token + 7, 5), weights)
    values = {}
    for number, w in enumerate(weights):
        shape = grid.shape(w.rows, w.cols)
        given_ = None if scores is None else torch.tensor(scores[number], dtype=torch.float32).view(shape)
        values[w.parameter] = torch.rand(shape) if given_ is None else given_
    return Sensitivity(layout, values, statistic, grid=grid)


def kept(plan: BlockPlan) -> list[list[int]]:
    return [plan.keep[w.parameter].flatten().nonzero().flatten().tolist() for w in plan.layout.weights]


def test_exactly_the_blocks_that_the_budget_allows_are_kept():
    scored = make((4, 8), (6, 3), grid=Grid.element())
    plan = allocate(scored, Budget.parse("50%params"))  # 30 of 60, of which 10 cannot be masked
    scores = torch.cat([score.flatten() for score in scored.scores.values()])
    keep = torch.cat([plan.keep[name].flatten() for name in scored.scores])
    assert int(keep.sum()) == 20 == plan.params - REST
    assert scores[keep].min() > scores[~keep].max()
    assert type(plan) is BlockPlan and plan.grid == Grid.element()
    assert plan.flops == cost_of_units(plan.layout)[1]  # no kernel skips single elements


def test_ties_keep_the_first_and_nan_is_dropped_first():
    scored = make((2, 2), (2, 2), grid=Grid.element(), scores=[[1, math.nan, 1, 1], [1, 1, 2, math.nan]])
    assert kept(allocate(scored, Budget.parse("13params"))) == [[0, 2], [2]]
    assert kept(allocate(scored, Budget.parse("17params"))) == [[0, 1, 2, 3], [0, 1, 2]]


def test_nan_is_dropped_first_in_every_weight():
    scored = make((2, 2), (2, 2), grid=Grid.element(), scores=[[1, math.nan, 1, 1], [math.nan, -2, -3, math.inf]])
    assert kept(allocate(scored, Budget.parse("16params"), allocation="uniform")) == [[0, 2, 3], [1, 2, 3]]


def test_short_blocks_are_priced_by_their_elements():
    """5 x 3 in blocks of 2: 4, 2 / 4, 2 / 2, 1 elements."""
    grid, score = Grid(2, 2), [4.0, 3.0, 3.0, 1.0, 1.0, 1.0]  # per element: 1, 1.5, 0.75, 0.5, 0.5, 1
    plans = [kept(allocate(make((5, 3), grid=grid, scores=[score]), Budget.parse(f"{REST + n}params"))) for n in (2, 6)]
    assert plans == [[[1]], [[0, 1]]]
    assert kept_elements(Weight("", 0, 5, 3, 2), torch.ones(3, 2, dtype=torch.bool), grid) == 15


def test_uniform_gives_every_weight_the_same_share():
    scored = make((4, 10), (8, 10), grid=Grid.element(), scores=[list(range(40)), [0.0] * 80])
    plan = allocate(scored, Budget.parse(f"{REST + 60}params"), allocation="uniform")
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
    scored = make(*shapes, grid=grid)
    layout, flops = scored.layout, kind == "flops"
    if flops and grid == Grid.element():
        return
    whole = cost_of_units(layout)[flops]
    smallest = whole - sum(w.rows * w.cols * (w.flops * 128 if flops else 1) for w in layout.weights)
    budget = Budget(float(smallest + int(share * (whole - smallest))), kind, False)
    plan = allocate(scored, budget, allocation=policy)
    spent = (plan.flops if flops else plan.params, cost_of_blocks(layout, plan.keep, grid)[flops])
    dearest = max((block[0] * block[1] * element_cost(w, budget) for w in layout.weights), default=0)
    assert spent[0] == spent[1] <= limit(layout, budget, grid)
    assert all(bool(kept.all()) for kept in plan.keep.values()) or limit(layout, budget, grid) - spent[0] < dearest


def test_flops_count_what_a_kernel_can_skip():
    scored = make((4, 4), (4, 4, 0), (4, 4, 6), grid=Grid(2, 2), scores=[[1, 2, 3, 4], [0] * 4, [0] * 4])
    plan = allocate(scored, Budget.parse("30%flops"))
    assert plan.keep["1.weight"].all()  # costs no FLOPs per token, so masking it saves nothing
    assert plan.flops <= 0.3 * cost_of_units(scored.layout)[1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"budget": Budget.parse("30%flops")}, "30%flops, but no kernel skips single elements"),
        ({"budget": Budget.parse("5params")}, "5 params, but 10 cannot be trimmed"),
        ({"width_multiple": 4}, "width_multiple is 4, want None: a grid keeps all widths"),
        ({"allocation": "best"}, "allocation is 'best', want one of global, uniform"),
    ],
)
def test_arguments_that_a_grid_excludes_are_named(change, message):
    with pytest.raises(SensibertError, match=message):
        allocate(make((4, 4), grid=Grid.element()), **({"budget": Budget.parse("50%params")} | change))


def test_scores_of_another_shape_are_named():
    scored = make((4, 4), grid=Grid.element())
    scored.scores["0.weight"] = torch.rand(2, 2)
    with pytest.raises(SensibertError, match=r"scores of 0.weight are \(2, 2\), want \(4, 4\) \(grid element\)"):
        allocate(scored, Budget.parse("50%params"))


def test_scores_and_plan_load_as_they_were_saved(tmp_path):
    scored = make((5, 7), (3, 2), grid=Grid(2, 3))
    plan = allocate(scored, Budget.parse("60%params"))
    scored.save(tmp_path / "scores.safetensors")
    plan.save(tmp_path / "plan.safetensors")
    assert Sensitivity.load(tmp_path / "scores.safetensors") == scored
    assert Plan.load(tmp_path / "plan.safetensors") == plan


class OneDevice(TorchFunctionMode):
    """Fails where a tensor is made on the default device, or copied to the host, as only a GPU would notice."""

    MAKERS = (torch.arange, torch.empty, torch.ones, torch.tensor, torch.zeros)
    COPIES = (torch.Tensor.cpu, torch.Tensor.numpy)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func not in self.COPIES, f"{func} copies to the host"
        assert func not in self.MAKERS or "device" in kwargs, f"{func} makes a tensor on the default device"
        return func(*args, **kwargs)


@pytest.mark.parametrize("policy", ["global", "uniform"])
def test_blocks_are_chosen_on_the_device_of_their_scores(policy, tmp_path):
    scored, budget = make((5, 8), (6, 3, 4), grid=Grid(2, 2)), Budget.parse("50%flops")
    expected = allocate(scored, budget, allocation=policy)
    with OneDevice():
        plan = allocate(scored, budget, allocation=policy)
        sizes = plan.params, plan.flops
        assert plan == expected
    assert sizes == (expected.params, expected.flops)
    with pytest.raises(AssertionError, match="copies to the host"), OneDevice():
        plan.save(tmp_path / "file")


def test_every_device_chooses_the_same_blocks_and_keeps_them_until_they_are_saved(device, tmp_path):
    scored, budget = make((50, 80), (60, 30, 4), grid=Grid(4, 8)), Budget.parse("50%flops")
    there = replace(scored, scores={name: score.to(device) for name, score in scored.scores.items()})
    plan = allocate(there, budget)
    assert {kept.device.type for kept in plan.keep.values()} == {device.type}
    assert there == scored and plan == allocate(scored, budget)
    there.save(tmp_path / "scores")
    plan.save(tmp_path / "plan")
    assert Sensitivity.load(tmp_path / "scores") == scored and Plan.load(tmp_path / "plan") == plan


def test_a_weight_whose_scores_are_all_nan_gives_no_plan():
    scored = make((2, 2), (2, 2), grid=Grid.element(), scores=[[1, 1, 1, 1], [math.nan] * 4])
    with pytest.raises(SensibertError, match="all scores of .* are NaN in this sensitivity of method 'fisher'"):
        allocate(scored, "50%params")
