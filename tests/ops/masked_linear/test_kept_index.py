"""What a keep grid leaves: rows, columns, holes, shares; cached until keep changes or dies."""

import gc

import pytest
import torch

from sensibert.core.grid import Grid
from sensibert.ops.masked_linear import kept_index as module
from sensibert.ops.masked_linear.kept_index import kept_index
from sensibert.ops.masked_linear.op import masked_linear
from tests.helpers import DTYPES, dtype_id


def bools(*rows):
    return torch.tensor([[cell == "x" for cell in row] for row in rows])


@pytest.mark.parametrize(
    "keep,grid,rows,cols,holes,density,share",
    [
        (bools("xx", "xx"), Grid.element(), None, None, None, 1, 1),
        (bools("x.", "xx"), Grid.element(), None, None, bools(".x", ".."), 3 / 4, 1),
        (bools("x.", "x."), Grid.element(), None, [0], None, 1 / 2, 1 / 2),
        (bools("x.x", "...", "xxx"), Grid.element(), [0, 2], None, bools(".x.", "..."), 5 / 9, 2 / 3),
        (bools(".", "x", "."), Grid.row(), [1], None, None, 1 / 3, 1 / 3),
        (bools("x", "."), Grid.rows(2), [0, 1], None, None, 2 / 3, 2 / 3),  # the last band is short
        (bools(".xx"), Grid.column(), None, [1, 2], None, 2 / 3, 2 / 3),
        (bools(".x"), Grid.columns(2), None, [2], None, 1 / 3, 1 / 3),
        (bools("x.", ".x"), Grid.block(2, 2), None, None, bools("..x", "..x", "xx."), 5 / 9, 1),
        (bools("."), Grid.tensor(), [], [], None, 0, 0),
    ],
)
def test_what_is_left(keep, grid, rows, cols, holes, density, share):
    N, K = (3, 3) if grid != Grid.element() else keep.shape
    index = kept_index(keep, grid, N, K)
    assert (index.rows if rows is None else index.rows.tolist()) == rows
    assert (index.cols if cols is None else index.cols.tolist()) == cols
    assert (index.bits is None) == (holes is None)
    assert holes is None or torch.equal(index.bits, torch.where(holes, 0, -1).to(torch.int8))
    assert (index.density, index.share) == pytest.approx((density, share))


def test_an_empty_weight_leaves_everything():
    assert kept_index(torch.ones(0, 1, dtype=torch.bool), Grid.row(), 0, 4) == (None, None, None, 1, 1)


def test_it_agrees_with_the_expanded_mask():
    for grid in (Grid.element(), Grid.block(3, 5), Grid.rows(4), Grid.column()):
        keep = torch.rand(grid.shape(300, 11)) < 0.1
        wide, index = grid.expand(keep, 300, 11), kept_index(keep, grid, 300, 11)
        again = torch.zeros(300, 11, dtype=torch.bool)
        rows = torch.arange(300) if index.rows is None else index.rows
        cols = torch.arange(11) if index.cols is None else index.cols
        again[rows[:, None], cols] = True if index.bits is None else index.bits == -1
        assert torch.equal(again, wide)
        assert index.density == pytest.approx(wide.double().mean().item())


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=dtype_id)
def test_blank_clears_the_holes_whatever_they_hold(dtype):
    t = torch.tensor([[1.5, -2.0, float("nan")], [float("-inf"), -0.0, 3.0]], dtype=dtype)
    bits = torch.tensor([[-1, 0, 0], [0, -1, -1]], dtype=torch.int8)
    want = torch.tensor([[1.5, 0, 0], [0, 0, 3]], dtype=dtype)
    before = t.clone()
    assert module.blank(t, None) is t and torch.equal(module.blank(t, bits), want)
    assert torch.equal(t.nan_to_num(7), before.nan_to_num(7))
    assert torch.equal(module.blank(t, bits, in_place=True), want) and torch.equal(t, want)


def test_it_is_computed_once_until_keep_changes():
    keep = torch.ones(4, 1, dtype=torch.bool)
    first = kept_index(keep, Grid.row(), 4, 6)
    assert kept_index(keep, Grid.row(), 4, 6) is first
    assert kept_index(keep, Grid.rows(1), 4, 8) is not first
    keep[1] = False
    assert kept_index(keep, Grid.row(), 4, 6).rows.tolist() == [0, 2, 3]


def test_the_cache_ends_with_keep():
    gc.collect()
    before = len(module._cache)
    keep = torch.ones(4, 1, dtype=torch.bool)
    kept_index(keep, Grid.row(), 4, 6)
    assert len(module._cache) == before + 1
    del keep
    gc.collect()
    assert len(module._cache) == before


def test_the_op_computes_it_once_for_forward_and_backward(monkeypatch):
    calls, compute = [], module._kept_index
    monkeypatch.setattr(module, "_kept_index", lambda *args: calls.append(args) or compute(*args))
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    keep = torch.tensor([[True], [False], [True], [True]])
    for _ in range(2):
        masked_linear(x, weight, None, keep, Grid.row()).sum().backward()
    assert len(calls) == 1
