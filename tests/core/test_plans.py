"""Both kinds of plan count, print, save and load; none of their users has to know which kind it has."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sensibert.core import cost
from sensibert.core.artifacts import BlockPlan, Plan, UnitPlan
from sensibert.core.errors import SensibertError
from sensibert.core.grid import Grid

from .small import GRID, block_plan, layout, unit_plan

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "v0_1"
KINDS = [unit_plan, block_plan]


def test_a_plan_is_of_one_kind_or_the_other():
    with pytest.raises(TypeError, match="abstract class Plan"):
        Plan(layout(), {}, unit_plan().budget, "fisher")
    with pytest.raises(TypeError, match="grid"):
        BlockPlan(layout(), {}, unit_plan().budget, "fisher")


def test_the_cost_of_a_unit_plan_is_that_of_its_counts():
    plan, counts = unit_plan(), {"layer.0.head": 2, "layer.0.ffn": 2, "layer.1.ffn": 0}
    for scope in ("encoder", "model"):
        expected = cost.params(layout(), counts, scope), cost.flops(layout(), counts, scope, 1, 16)
        assert plan.cost(scope, 16) == expected
    assert plan.cost("encoder", 16) == plan.cost(length=16)
    assert (plan.params, plan.flops) == plan.cost("model", 384), "the scope and length of its budget"


def test_the_cost_of_a_block_plan_is_that_of_the_elements_in_its_blocks():
    """up loses 2 x 16 of 6 x 32, out 32 x 16 of 32 x 32."""
    plan, (params, flops) = block_plan(), cost.cost_of_units(layout(), None, "encoder", 16)
    gone = 2 * 16 + 32 * 16
    assert plan.cost("encoder", 16) == (params - gone, flops - gone * 2 * 16)
    assert plan.params == params - gone


def test_single_elements_save_parameters_but_no_flops():
    keep = {w.parameter: torch.rand(w.rows, w.cols) < 0.5 for w in layout().weights}
    plan = BlockPlan(layout(), keep, unit_plan().budget, "fisher", grid=Grid.element())
    params, flops = cost.cost_of_units(layout())
    assert plan.cost() == (params - sum(int((~kept).sum()) for kept in keep.values()), flops)


def test_the_table_of_a_unit_plan_has_heads_and_widths_by_layer():
    plan = unit_plan()
    assert plan.table_rows() == [("layer 0", 2, 4, 2, 6), ("layer 1", 0, 0, 0, 0)]
    assert plan.table().splitlines()[0].split() == ["heads", "of", "ffn", "width", "of"]
    assert plan.table().splitlines()[2].split() == ["layer", "0", "2", "4", "2", "6"]


def test_the_table_of_a_block_plan_has_the_elements_of_every_weight():
    plan = block_plan()
    assert plan.table_rows() == [("up.weight", 160, 192, "83.3 %"), ("out.weight", 512, 1024, "50.0 %")]
    assert [len(row) for row in plan.table_rows()] == [len(plan.table_header)] * 2


def test_kept_units_are_indices():
    plan = unit_plan()
    assert plan.kept("layer.0.head").tolist() == [0, 2] and plan.kept("layer.1.ffn").tolist() == []


@pytest.mark.parametrize("make", KINDS)
def test_a_round_trip_gives_the_same_kind_and_the_same_plan(make, tmp_path):
    written = make()
    written.save(tmp_path / "file")
    read = Plan.load(tmp_path / "file")
    assert type(read) is type(written) and read == written and read is not written
    assert list(read.keep) == list(written.keep), "names keep their order"
    assert (read.params, read.flops, read.method) == (written.params, written.flops, written.method)
    assert type(written).load(tmp_path / "file") == written


def test_a_plan_of_the_other_kind_is_named(tmp_path):
    unit_plan().save(tmp_path / "units")
    block_plan().save(tmp_path / "blocks")
    with pytest.raises(SensibertError, match="units: holds a UnitPlan, want a BlockPlan"):
        BlockPlan.load(tmp_path / "units")
    with pytest.raises(SensibertError, match="blocks: holds a BlockPlan, want a UnitPlan"):
        UnitPlan.load(tmp_path / "blocks")


@pytest.mark.parametrize("make", KINDS)
def test_plans_that_differ_anywhere_are_not_equal(make):
    first, second = make(), make()
    assert first == second and first != "a plan" and unit_plan() != block_plan()
    keep = next(iter(second.keep.values()))
    keep[(0,) * keep.dim()] = False
    assert first != second


def test_a_plan_of_another_grid_is_not_equal():
    plan = block_plan()
    assert plan.grid == GRID
    assert plan != BlockPlan(
        plan.layout, plan.keep, plan.budget, plan.method, grid=Grid.block(4, 17)
    )  # of as many blocks


@pytest.mark.parametrize("folder, kind", [("unit", UnitPlan), ("element", BlockPlan)])
def test_a_file_of_version_0_1_loads_and_is_written_with_the_same_content(folder, kind, tmp_path):
    old, new = FIXTURES / folder / "plan.safetensors", tmp_path / "plan.safetensors"
    plan = Plan.load(old)
    assert type(plan) is kind
    plan.save(new)
    with safe_open(old, "pt") as before, safe_open(new, "pt") as after:
        facts, written = (json.loads(file.metadata()["facts"]) for file in (before, after))
    assert written == {name: value for name, value in facts.items() if name != "notes"}  # which nobody wrote
    assert (plan.params, plan.flops) == (facts["params"], facts["flops"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda keep: keep.pop("layer.0.ffn"), "keep lacks 'layer.0.ffn', want one mask for each of 3 names"),
        (lambda keep: keep.update(x=torch.ones(1) > 0), "keep has 'x', which is not in the layout, want one mask"),
        (lambda keep: keep.update({"layer.0.ffn": torch.ones(6)}), r"keep\['layer.0.ffn'\] is torch.float32 \(6,\)"),
        (lambda keep: keep.update({"layer.0.ffn": torch.ones(5) > 0}), r"is torch.bool \(5,\), want torch.bool \(6,\)"),
    ],
)
def test_masks_that_do_not_fit_the_layout_are_named(change, message):
    plan = unit_plan()
    keep = dict(plan.keep)
    change(keep)
    with pytest.raises(SensibertError, match=f"^UnitPlan: .*{message}|^UnitPlan: {message}"):
        UnitPlan(plan.layout, keep, plan.budget, plan.method)


def test_a_name_that_is_no_site_is_named():
    with pytest.raises(SensibertError, match="^kept: name is 'layer.0.fnn', want one of .*did you mean 'layer.0.ffn'"):
        unit_plan().kept("layer.0.fnn")
