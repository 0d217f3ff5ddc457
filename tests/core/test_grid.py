"""A grid is read back from its name, and every element has the value of its block."""

import pytest
import torch

from sensibert.core.grid import Grid

GRIDS = [Grid.element(), Grid.row(), Grid.column(), Grid.tensor(), Grid.rows(8), Grid.columns(3), Grid.block(4, 16)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_grid_is_read_back_from_its_name(grid):
    assert Grid.parse(str(grid)) == grid


@pytest.mark.parametrize("text", ["", "rows", "rows:", "4x", "diagonal", "-1x4", "4 x 4"])
def test_a_text_that_is_no_grid_is_named(text):
    with pytest.raises(ValueError, match=f"text is {text!r}, want element, row"):
        Grid.parse(text)


@pytest.mark.parametrize("rows, cols", [(8, 12), (7, 5), (1, 1), (0, 4), (3, 0)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_expand_gives_every_element_the_value_of_its_block(grid, rows, cols):
    keep = torch.rand(grid.shape(rows, cols)) < 0.5
    wide = grid.expand(keep, rows, cols)
    height, width = grid.block_size(rows, cols)
    assert wide.shape == (rows, cols)
    for i in range(rows):
        for j in range(cols):
            assert wide[i, j] == keep[i // height, j // width]


def test_a_block_has_an_element_where_the_weight_has_none():
    assert Grid.tensor().block_size(0, 0) == Grid.tensor().block_size(1, 1) == (1, 1)
    assert Grid.tensor().block_size(2, 3) == (2, 3) and Grid.block(4, 16).block_size(0, 1) == (4, 16)


def test_a_keep_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"Grid rows:8: keep is \(3, 1\), want \(2, 1\)"):
        Grid.rows(8).expand(torch.ones(3, 1, dtype=torch.bool), 16, 4)
    with pytest.raises(ValueError, match=r"block_rows is -1, want a whole number >= 0"):
        Grid(-1, 0)
