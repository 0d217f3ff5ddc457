"""The explanation of a plan: counts, scores on both sides of the cut, and what rounding changed."""

import pytest
import torch

from sensibert.allocation import allocate, explain
from sensibert.allocation.allocate import ranks_of, threshold_counts
from sensibert.core.artifacts import Sensitivity, UnitPlan
from sensibert.core.budget import Budget
from sensibert.core.cost import spent
from sensibert.core.errors import SensibertError
from sensibert.core.grid import Grid
from sensibert.models import layout_of
from tests.helpers import tiny_model


@pytest.fixture(scope="module")
def layout():
    return layout_of(tiny_model())


def scored(layout, statistic="fisher", **more) -> Sensitivity:
    """The best unit of every site is worth its cost, the others less, in even steps."""
    scores = {site.name: (torch.arange(site.units) + 1) / site.units * site.params for site in layout.sites}
    return Sensitivity(layout, scores, statistic, 8, **more)


def line(text: str, start: str) -> str:
    (found,) = [each for each in text.splitlines() if each.startswith(start)]
    return found


def plan_of(layout, counts: list[int]) -> UnitPlan:
    """Keeps the units with the highest numbers."""
    keep = {s.name: torch.arange(s.units) >= s.units - n for s, n in zip(layout.sites, counts, strict=True)}
    return UnitPlan(layout, keep, Budget.parse("50%params"), "fisher")


def counts_of_threshold(layout, scores) -> list[int]:
    allowed = layout.encoder_params // 2 - spent(layout, {s.name: 0 for s in layout.sites}, Budget.parse("50%params"))
    budget = Budget.parse("50%params")
    return list(threshold_counts(layout, ranks_of(scores, budget), budget, allowed).values())


def test_every_layer_has_its_counts_and_the_scores_on_both_sides_of_the_cut(layout):
    scores = scored(layout)
    heads, neurons, *_ = counts = counts_of_threshold(layout, scores)
    assert 0 < heads < 4 and 0 < neurons < 64
    plan = plan_of(layout, counts)
    text = explain(plan, scores)
    title, method, threshold, *layers = text.splitlines()
    whole = f"{plan.params:,} of {layout.encoder_params:,} parameters are left ("
    assert title.startswith(f"50%params of the encoder: {whole}") and len(layers) == 4
    assert method == "Scores are those of fisher, divided by their parameters."
    lowest, dropped = 1 - (neurons - 1) / 64, 1 - neurons / 64
    assert line(text, "layer 1, FFN") == (
        f"layer 1, FFN: {counts[3]} of 64 neurons kept. Lowest score kept {1 - (counts[3] - 1) / 64:.3e}, "
        f"highest dropped {1 - counts[3] / 64:.3e}."
    )
    assert f"Lowest score kept {lowest:.3e}, highest dropped {dropped:.3e}." in line(text, "layer 0, FFN")
    assert (
        threshold
        == f"The threshold that spends this budget, before rounding, is {min(lowest, 1 - (heads - 1) / 4):.3e}."
    )
    text = explain(plan_of(layout, [4, 64, 0, 0]), scores)
    assert line(text, "layer 0, attention").startswith(
        "layer 0, attention: all 4 heads kept. Lowest score kept 2.500e-01."
    )
    assert line(text, "layer 1, attention").startswith(
        "layer 1, attention: none of 4 heads kept. Highest dropped 1.000e+00."
    )


def test_rounding_is_told_in_both_directions(layout):
    scores = scored(layout)
    heads, neurons, *others = counts_of_threshold(layout, scores)
    less, more = neurons - neurons % 8 - 8, neurons - neurons % 8 + 8
    told = line(explain(plan_of(layout, [heads, less, others[0], 64]), scores), "layer 0, FFN")
    assert told.endswith(f"One threshold alone would keep {neurons}, rounded down to a multiple of {less}.")
    told = line(explain(plan_of(layout, [heads, less, others[0], less - 8]), scores), "layer 0, FFN")
    assert told.endswith(f"One threshold alone would keep {neurons}, rounded down to a multiple of 8.")
    told = line(explain(plan_of(layout, [heads, more, *others]), scores), "layer 0, FFN")
    assert told.endswith(
        f"One threshold alone would keep {neurons}; the budget left over paid for {more - neurons} more."
    )
    told = line(explain(plan_of(layout, [heads - 1, neurons, *others]), scores), "layer 0, attention")
    assert told.endswith(f"One threshold alone would keep {heads}.")


def test_with_curves_the_change_of_the_loss_is_told(layout):
    curves = {site.name: [(0, 0.0), (site.units, 0.5)] for site in layout.sites}
    scores = scored(layout, curves=curves)
    text = explain(plan_of(layout, [4, 64, 2, 64]), scores)
    assert line(text, "layer 1, attention").endswith("Alone, this is predicted to change the loss by +2.5e-01.")
    assert "Alone" not in line(text, "layer 0, attention")


def test_scores_that_are_not_divided_by_cost_say_so(layout):
    scores = scored(layout, "random")
    assert "Scores are those of random, whatever they cost." in explain(allocate(scores, "30%flops"), scores)


def test_a_plan_of_blocks_has_a_line_for_every_weight(layout):
    grid = Grid.block(16, 16)
    scores = {w.parameter: torch.rand(grid.shape(w.rows, w.cols)) for w in layout.weights}
    sensitivity = Sensitivity(layout, scores, "fisher", grid=grid)
    plan = allocate(sensitivity, "50%params")
    lines = explain(plan, sensitivity).splitlines()
    assert len(lines) == 2 + len(layout.weights)
    first = layout.weights[0].parameter
    assert lines[2].startswith(f"{first}: {int(plan.keep[first].sum())} of 4 blocks kept.")


def test_the_scores_of_another_model_are_refused(layout):
    plan = allocate(scored(layout), "50%params")
    trained = layout_of(tiny_model(seed=1))  # a run has the sensitivity of its model at the cut
    assert trained.digest != layout.digest and explain(plan, scored(trained)) == explain(plan, scored(layout))
    other = scored(layout_of(tiny_model(intermediate_size=96)))
    with pytest.raises(SensibertError, match="explain: sensitivity is of another model or grid than the plan"):
        explain(plan, other)
