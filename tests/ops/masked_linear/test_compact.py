"""masked_linear with a CompactWeight: used for the very weight and masks it was written for, and only then."""

import pytest
import torch

from sensibert.core.grid import Grid
from sensibert.ops.masked_linear.kept_index import CompactWeight, kept_index
from sensibert.ops.masked_linear.op import masked_linear

OPS = torch.ops.sensibert


def make(grid=Grid.row(), value=None, dtype=torch.float32, device="cpu"):
    """weight [4, 6], keep and the CompactWeight of both, filled with `value`: not what the weight holds, so the result
    shows which of the two was read."""
    weight, keep = torch.randn(4, 6, device=device), torch.ones(grid.shape(4, 6), dtype=torch.bool, device=device)
    keep[0, 0] = False
    rows, cols, bits, *_ = kept_index(keep, grid, 4, 6)
    matrix = weight.masked_fill(~grid.expand(keep, 4, 6), 0)
    matrix = matrix if rows is None else matrix[rows]
    matrix = (matrix if cols is None else matrix[:, cols]).to(dtype)
    matrix = matrix if value is None else torch.full_like(matrix, value)
    return weight, keep, CompactWeight(matrix, torch.tensor([weight._version, keep._version]), weight, keep)


@pytest.mark.parametrize("grid", [Grid.row(), Grid.column(), Grid.block(2, 3), Grid.element()], ids=str)
def test_it_changes_no_result(grid):
    weight, keep, compact = make(grid)
    x = torch.randn(5, 6, requires_grad=True)
    results = []
    for given in (None, compact):
        y = masked_linear(x, weight, None, keep, grid, given)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert all(map(torch.equal, *results))


def test_forward_and_both_gradients_of_x_read_it():
    weight, keep, compact = make(value=7)
    x = torch.eye(6, requires_grad=True)
    y = masked_linear(x, weight, None, keep, Grid.row(), compact)
    assert (y[:, 1:] == 7).all() and not y[:, 0].any()
    dy = torch.ones_like(y, requires_grad=True)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    assert (dx == 21).all()
    (ddy,) = torch.autograd.grad(dx.sum(), dy)
    assert (ddy[:, 1:] == 42).all()


def test_the_gradient_of_the_weight_does_not():
    weight, keep, compact = make(value=7)
    weight.requires_grad_()
    x = torch.randn(5, 6)
    grads = [
        torch.autograd.grad(masked_linear(x, weight, None, keep, Grid.row(), given).sum(), weight)[0]
        for given in (None, compact)
    ]
    assert torch.equal(*grads)


@pytest.mark.parametrize("changed", [None, "weight", "keep"])
def test_the_op_checks_the_versions_when_it_runs(changed):
    """The public function has passed it on; what changes until then, as in a compiled program, is noticed."""
    weight, keep, compact = make(value=7)
    if changed:
        tensor = {"weight": weight, "keep": keep}[changed]
        tensor.copy_(tensor.clone())
    x, dy = torch.randn(5, 6), torch.randn(5, 4)
    y, plain_y = (OPS.masked_linear(x, weight, None, keep, 1, 0, *given) for given in (compact[:2], ()))
    dx, plain_dx = (OPS.masked_linear_dx(dy, weight, keep, 1, 0, *given) for given in (compact[:2], ()))
    assert torch.equal(y, plain_y) == torch.equal(dx, plain_dx) == bool(changed)


def test_of_another_weight_or_keep_it_is_not_used():
    weight, keep, compact = make(value=7)
    x = torch.randn(5, 6)
    for other in ((weight.clone(), keep), (weight, keep.clone())):
        given = compact._replace(versions=torch.tensor([t._version for t in other]))
        plain = masked_linear(x, other[0], None, other[1], Grid.row())
        assert torch.equal(masked_linear(x, other[0], None, other[1], Grid.row(), given), plain)


def test_in_another_dtype_it_is_not_used():
    weight, keep, compact = make(value=7, dtype=torch.bfloat16)
    x = torch.randn(5, 6)
    plain = masked_linear(x, weight, None, keep, Grid.row())
    assert torch.equal(masked_linear(x, weight, None, keep, Grid.row(), compact), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(masked_linear(x, weight, None, keep, Grid.row(), compact), plain)


def test_in_inference_mode_it_is_not_used():
    with torch.inference_mode():
        weight, keep = torch.randn(4, 6), torch.ones(4, 1, dtype=torch.bool)
        compact = CompactWeight(torch.full((4, 6), 7.0), torch.zeros(2, dtype=torch.int64), weight, keep)
        x = torch.randn(5, 6)
        assert torch.equal(masked_linear(x, weight, None, keep, Grid.row(), compact), x @ weight.T)


@pytest.mark.parametrize("grid", [Grid.row(), Grid.block(2, 3)], ids=str)
def test_registration(grid, device):
    weight, keep, compact = make(grid, device=device)
    x, dy = torch.randn(2, 3, 6, device=device), torch.randn(2, 3, 4, device=device)
    rest = (keep, grid.block_rows, grid.block_cols, *compact[:2])
    weight.requires_grad_()
    torch.library.opcheck(OPS.masked_linear.default, (x.requires_grad_(), weight, None, *rest))
    torch.library.opcheck(OPS.masked_linear_dx.default, (dy.requires_grad_(), weight, *rest))
