"""What a keep grid leaves: rows, columns, holes, shares; remembered as long as it is true and no longer."""

import gc
import weakref

import pytest
import torch

from sensibert.core.grid import Grid
from sensibert.ops.masked_linear import kept_index as module
from sensibert.ops.masked_linear.kept_index import live, publish, published
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
    found = live(keep, grid, N, K)
    assert (found.rows if rows is None else found.rows.tolist()) == rows
    assert (found.cols if cols is None else found.cols.tolist()) == cols
    assert (found.bits is None) == (holes is None)
    assert holes is None or torch.equal(found.bits, torch.where(holes, 0, -1).to(torch.int8))
    assert (found.density, found.share) == pytest.approx((density, share))


def test_an_empty_weight_leaves_everything():
    assert live(torch.ones(0, 1, dtype=torch.bool), Grid.row(), 0, 4) == (None, None, None, 1, 1)


def test_it_agrees_with_the_expanded_mask():
    for grid in (Grid.element(), Grid.block(3, 5), Grid.rows(4), Grid.column()):
        keep = torch.rand(grid.shape(300, 11)) < 0.1
        wide, found = grid.expand(keep, 300, 11), live(keep, grid, 300, 11)
        again = torch.zeros(300, 11, dtype=torch.bool)
        rows = torch.arange(300) if found.rows is None else found.rows
        cols = torch.arange(11) if found.cols is None else found.cols
        again[rows[:, None], cols] = True if found.bits is None else found.bits == -1
        assert torch.equal(again, wide)
        assert found.density == pytest.approx(wide.double().mean().item())


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=dtype_id)
def test_blank_clears_the_holes_whatever_they_hold(dtype):
    t = torch.tensor([[1.5, -2.0, float("nan")], [float("-inf"), -0.0, 3.0]], dtype=dtype)
    bits = torch.tensor([[-1, 0, 0], [0, -1, -1]], dtype=torch.int8)
    want = torch.tensor([[1.5, 0, 0], [0, 0, 3]], dtype=dtype)
    before = t.clone()
    assert module.blank(t, None) is t and torch.equal(module.blank(t, bits), want)
    assert torch.equal(t.nan_to_num(7), before.nan_to_num(7))
    assert torch.equal(module.blank(t, bits, in_place=True), want) and torch.equal(t, want)


def test_it_is_found_once_until_keep_changes():
    keep = torch.ones(4, 1, dtype=torch.bool)
    first = live(keep, Grid.row(), 4, 6)
    assert live(keep, Grid.row(), 4, 6) is first
    assert live(keep, Grid.rows(1), 4, 8) is not first
    keep[1] = False
    assert live(keep, Grid.row(), 4, 6).rows.tolist() == [0, 2, 3]


def test_it_is_forgotten_with_keep():
    gc.collect()
    before = len(module._known)
    keep = torch.ones(4, 1, dtype=torch.bool)
    live(keep, Grid.row(), 4, 6)
    assert len(module._known) == before + 1
    del keep
    gc.collect()
    assert len(module._known) == before


def test_the_op_finds_it_once_for_forward_and_backward(monkeypatch):
    calls, find = [], module._find
    monkeypatch.setattr(module, "_find", lambda *args: calls.append(args) or find(*args))
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    keep = torch.tensor([[True], [False], [True], [True]])
    for _ in range(2):
        masked_linear(x, weight, None, keep, Grid.row()).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("grid", [Grid.element(), Grid.column()], ids=str)
def test_a_published_copy_is_used_until_weight_or_keep_changes(grid):
    x, weight = torch.eye(3), torch.ones(2, 3)
    keep = torch.tensor([[True, False, True]]).expand(grid.shape(2, 3)).clone()
    compact = torch.full((2, 2), 7.0)  # not what W holds: so we see who was asked
    publish(weight, keep, grid, compact)
    assert masked_linear(x, weight, None, keep, grid)[:, 0].tolist() == [7, 0, 7]
    assert published(weight, keep, grid, torch.bfloat16) is None
    assert published(weight, keep, Grid.block(2, 1), torch.float32) is None
    assert published(weight, keep.clone(), grid, torch.float32) is None  # another layer's masks on a tied weight
    weight.mul_(1)
    assert masked_linear(x, weight, None, keep, grid)[:, 0].tolist() == [1, 0, 1]
    publish(weight, keep, grid, compact)
    keep.copy_(keep.clone())
    assert published(weight, keep, grid, torch.float32) is None


def test_a_published_matrix_serves_forward_and_both_ways_of_the_gradient():
    x, weight, keep = torch.eye(3, requires_grad=True), torch.ones(2, 3), torch.tensor([[True], [False]])
    publish(weight, keep, Grid.row(), torch.full((1, 3), 7.0))
    y = masked_linear(x, weight, None, keep, Grid.row())
    assert y.tolist() == [[7, 0]] * 3
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[7] * 3] * 3


class Publisher:
    calls = 0

    def renew(self):
        self.calls += 1


def test_whoever_published_is_asked_once_keep_has_changed_and_not_held():
    weight, keep, publisher = torch.ones(2, 3), torch.tensor([[True], [False]]), Publisher()
    publish(weight, keep, Grid.row(), torch.ones(1, 3), weakref.WeakMethod(publisher.renew))
    keep[1] = True
    assert published(weight, keep, Grid.row(), torch.bfloat16) is None and publisher.calls == 0
    assert published(weight, keep, Grid.row(), torch.float32) is None and publisher.calls == 1
    del publisher
    assert published(weight, keep, Grid.row(), torch.float32) is None


def test_a_withdrawn_matrix_is_let_go():
    weight, keep, compact = torch.ones(2, 3), torch.tensor([[True], [False]]), torch.ones(1, 3)
    publish(weight, keep, Grid.row(), compact)
    gone = weakref.ref(compact)
    del compact
    module.withdraw(weight), module.withdraw(weight), gc.collect()
    assert gone() is None and published(weight, keep, Grid.row(), torch.float32) is None
