"""Costs in closed form, against numbers worked out by hand and against what torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sensibert.core import cost
from sensibert.core.budget import Budget
from sensibert.core.errors import SensibertError
from sensibert.core.grid import Grid
from sensibert.core.layout import Weight
from sensibert.models import layout_of
from tests.helpers import tiny_batch, tiny_model
from tests.plans import random_plan


@pytest.fixture(scope="module")
def model():
    return tiny_model(attn_implementation="eager", num_labels=3)


@pytest.fixture(scope="module")
def layout(model):
    return layout_of(model)


def test_a_bert_by_hand(layout):
    """Hidden 32, 2 layers, 4 heads of 8, FFN 64."""
    for length in (1, 7, 128):
        layer = length * 2 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 32 * length**2
        whole = cost.counts_of(layout)
        assert cost.flops(layout, whole, "encoder", 1, length) == 2 * layer
        assert cost.flops(layout, whole, "model", 5, length) == 5 * (2 * layer + 2 * 32 * 32 + 2 * 32 * 3)
    norms, biases = 2 * 2 * 32, 4 * 32 + 64 + 32
    assert cost.params(layout, whole) == 2 * (4 * 32 * 32 + 2 * 32 * 64 + norms + biases) == layout.encoder_params


def test_removed_units_lower_the_cost(layout):
    counts = cost.counts_of(layout)
    fewer = counts | {"layer.0.head": 3, "layer.1.ffn": 60}
    head, neuron = 8 * (4 * 32 + 3), 2 * 32 + 1
    for scope in ("encoder", "model"):
        assert cost.params(layout, counts, scope) - cost.params(layout, fewer, scope) == head + 4 * neuron
        saved = cost.flops(layout, counts, scope, 2, 7) - cost.flops(layout, fewer, scope, 2, 7)
        assert saved == 2 * (7 * 2 * 4 * 8 * 32 + 4 * 8 * 49 + 4 * 7 * 2 * 2 * 32)


@pytest.mark.parametrize("batch, tokens", [(1, 1), (3, 7), (2, 16)])
def test_torch_counts_the_same_inside_the_encoder_and_out(model, layout, batch, tokens):
    with FlopCounterMode(display=False) as counter:
        model(**tiny_batch(batch, tokens))
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    counts = cost.counts_of(layout)
    assert cost.flops(layout, counts, "model", batch, tokens) == by_module["Global"]
    encoder = next(flops for name, flops in by_module.items() if name.endswith("bert.encoder"))
    assert cost.flops(layout, counts, "encoder", batch, tokens) == encoder


def test_counts_come_from_a_plan_or_are_all(layout):
    plan = random_plan(layout, empty=("layer.0.head",))
    assert cost.counts_of(layout) == {site.name: site.units for site in layout.sites}
    assert cost.counts_of(layout, plan.keep)["layer.0.head"] == 0
    assert cost.counts_of(layout, plan.keep)["layer.1.ffn"] == len(plan.kept("layer.1.ffn"))


def test_the_cost_of_a_unit_is_in_what_the_budget_counts(layout):
    head = layout.site("layer.0.head")
    assert cost.unit_cost(head, Budget.parse("50%params")) == head.params
    assert cost.unit_cost(head, Budget.parse("50%flops", length=16)) == 16 * head.flops.token + 256 * head.flops.pair
    counts = cost.counts_of(layout)
    assert cost.spent(layout, counts, Budget.parse("50%params", "model")) == layout.total_params
    assert cost.spent(layout, counts, Budget.parse("1flops", length=9)) == cost.flops(layout, counts, length=9)


def test_a_budget_is_rounded_down_to_a_whole_number(layout):
    assert cost.limit(layout, Budget.parse("50%params")) == layout.encoder_params // 2
    assert cost.limit(layout, Budget.parse("100%params", "model")) == layout.total_params
    assert cost.limit(layout, Budget.parse("9.9999Kparams")) == 9999


def test_the_remaining_share_of_the_encoder_does_not_depend_on_the_scope(layout):
    rest = layout.total_params - layout.encoder_params
    for share in (0.25, 0.5, 1.0):
        absolute = share * layout.encoder_params
        for budget in (
            Budget(share, "params", True),
            Budget(absolute, "params", False),
            Budget(rest + absolute, "params", False, "model"),
            Budget((rest + absolute) / layout.total_params, "params", True, "model"),
        ):
            assert cost.encoder_left(layout, budget) == pytest.approx(share)
    assert cost.encoder_left(layout, Budget.parse("30%flops")) == pytest.approx(0.3)


def test_a_budget_out_of_reach_names_the_smallest_one(layout):
    rest = layout.encoder_params - sum(site.units * site.params for site in layout.sites)
    with pytest.raises(
        SensibertError, match=rf"1%params of the encoder is [\d,]+ params, .* {rest}params \([\d.]+ %\)"
    ):
        cost.limit(layout, Budget.parse("1%params"))


def test_everything_is_counted_without_touching_data():
    with torch.device("meta"):
        base = tiny_model(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
    layers = sum(p.numel() for p in base.bert.encoder.parameters())
    assert layers == 85_054_464 == 12 * (12 * 196_800 + 3072 * 1_537 + 6 * 768)


def test_a_budget_above_the_whole_model_is_refused(layout):
    assert cost.want_reach(layout, Budget.parse("100%params")) == layout.encoder_params
    with pytest.raises(SensibertError, match=r"1Mparams, and the encoder has [\d,]+ params: nothing would be trimmed"):
        cost.want_reach(layout, Budget.parse("1Mparams"))


@pytest.mark.parametrize("rows, cols", [(8, 12), (7, 5), (1, 1), (4, 13)])
@pytest.mark.parametrize(
    "grid", [Grid.element(), Grid.row(), Grid.tensor(), Grid.block(2, 3), Grid.block(3, 8)], ids=str
)
def test_kept_elements_are_those_of_the_expanded_mask(grid, rows, cols):
    keep = torch.rand(grid.shape(rows, cols)) < 0.5
    assert cost.kept_elements(Weight("", 0, rows, cols, 2), keep, grid) == int(grid.expand(keep, rows, cols).sum())
