"""What plans and sensitivities show of themselves: short, without tensors, and well-formed in notebooks."""

from html.parser import HTMLParser

import pytest
import torch

from sensibert.core.artifacts import Sensitivity
from sensibert.core.grid import Grid
from sensibert.core.views import MOST_ROWS, _few
from sensibert.models import layout_of
from tests.helpers import tiny_model
from tests.report.small import block_plan, ranked, unit_plan


@pytest.fixture(scope="module")
def layout():
    return layout_of(tiny_model())


@pytest.fixture(scope="module")
def deep():
    return layout_of(tiny_model(num_hidden_layers=12))


def by_blocks(layout) -> Sensitivity:
    grid = Grid.block(8, 8)
    return Sensitivity(
        layout, {w.parameter: torch.ones(grid.shape(w.rows, w.cols)) for w in layout.weights}, "fisher", grid=grid
    )


@pytest.mark.parametrize("make", [unit_plan, block_plan, ranked, by_blocks])
def test_a_repr_is_about_ten_lines_without_tensors_however_deep_the_model(deep, make):
    lines = repr(make(deep)).splitlines()
    assert 8 <= len(lines) <= 12 and "tensor(" not in "\n".join(lines) and max(map(len, lines)) <= 120
    assert any(" more" in line for line in lines)


def test_the_repr_of_a_plan_has_sizes_and_layers(layout):
    plan = unit_plan(layout)
    title, left, *table = repr(plan).splitlines()
    assert title == "UnitPlan: bert, 50%params of the encoder by fisher"
    assert left.startswith(f"left: {plan.params:,} of {layout.encoder_params:,} parameters (")
    assert f"{plan.flops:,} of " in left
    assert [line.split() for line in table[2:]] == ["layer 0 2 4 32 64".split(), "layer 1 0 4 32 64".split()]


def test_the_repr_of_a_sensitivity_has_the_range_of_its_scores(layout):
    title, *table = repr(ranked(layout)).splitlines()
    assert title == "Sensitivity: bert by fisher, 64 samples, seed 0; with tensors"
    assert table[2].split() == ["layer", "0", "heads", "4", *["1.00e+00"] * 3]
    assert repr(Sensitivity(layout, {}, "random")).splitlines()[0] == "Sensitivity: bert by random, no data"


def test_the_first_and_the_last_rows_of_many_are_shown_and_the_others_counted():
    rows = [[number] for number in range(MOST_ROWS + 3)]
    half = MOST_ROWS // 2
    assert _few(rows) == [*rows[:half], [f"... {len(rows) - 2 * half} more"], *rows[-half:]] and half > 2
    assert _few(rows[:MOST_ROWS]) == rows[:MOST_ROWS]


def test_a_site_without_units_has_no_range(layout):
    scores = Sensitivity(layout, {"layer.0.head": torch.ones(4), "layer.1.head": torch.ones(0)}, "random")
    assert [row.split()[-3:] for row in repr(scores).splitlines() if "heads" in row][1] == ["-", "-", "-"]


class Table(HTMLParser):
    """Rows of cells; fails where tags are not closed in their order."""

    def __init__(self, source):
        super().__init__()
        self.open, self.rows = [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "tr" in self.open:
            self.rows[-1].append(data)


def test_a_notebook_shows_every_row(deep):
    rows = Table(unit_plan(deep)._repr_html_()).rows
    assert len(rows) == 13 and rows[1] == ["layer 0", "2", "4", "32", "64"]
    assert len(Table(ranked(deep)._repr_html_()).rows) == 25
