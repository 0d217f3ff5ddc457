"""y = x (W * keep)^T + b: values and gradients against float64, poison in what is dropped, registration, messages."""

import sys

import pytest
import torch
import torch.nn.functional as F

from sensibert.core.grid import Grid
from sensibert.ops.masked_linear.op import force, masked_linear, reference
from tests.helpers import DTYPES, assert_no_worse, dtype_id

pytestmark = pytest.mark.usefixtures("poisoned_empty")
module = sys.modules["sensibert.ops.masked_linear.op"]  # as an attribute of its package that name is the function
OPS = torch.ops.sensibert
GRIDS = [Grid.element(), Grid.row(), Grid.column(), Grid.rows(8), Grid.columns(8), Grid.block(16, 8), Grid.tensor()]
SHAPES = [
    pytest.param((0,), 16, 24, id="no-tokens"),
    pytest.param((), 16, 24, id="vector"),
    pytest.param((1,), 1, 1, id="one"),
    pytest.param((3, 7), 37, 41, id="ragged"),
    pytest.param((5,), 0, 8, id="no-input-width"),
    pytest.param((5,), 8, 0, id="no-output-width"),
    pytest.param((2, 48), 96, 192, id="ffn"),
]


def make_inputs(lead, K, N, grid, dtype=torch.float32, device="cpu", kept=0.6):
    """x [*lead, K], weight [N, K], bias [N], keep, grid; about `kept` of the blocks survive."""
    x, weight, bias = torch.randn(*lead, K), torch.randn(N, K) / max(K, 1) ** 0.5, torch.randn(N)
    keep = torch.rand(grid.shape(N, K)) < kept
    return *(t.to(device, dtype) for t in (x, weight, bias)), keep.to(device), grid


def run(function, x, weight, bias, keep, grid):
    """y and the three gradients for a dy that depends on the shapes alone."""
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
    y = function(x, weight, bias, keep, grid)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    return {"y": y.detach(), "dx": dx, "dweight": dweight, "dbias": dbias}


def formula(x, weight, bias, keep, grid):
    return F.linear(x, weight * grid.expand(keep, *weight.shape), bias)


def f64(args):
    return *(t.double() for t in args[:3]), *args[3:]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("lead,K,N", SHAPES)
def test_values_and_gradients(lead, K, N, grid, dtype, device):
    args = make_inputs(lead, K, N, grid, dtype, device)
    exact, plain, ours = run(formula, *f64(args)), run(formula, *args), run(masked_linear, *args)
    for name in exact:
        assert_no_worse(ours[name], plain[name], exact[name], factor=2, label=name)
    assert not ours["dweight"][~grid.expand(args[3], N, K)].any()


@pytest.mark.parametrize("grid", [Grid.element(), Grid.row(), Grid.columns(8), Grid.block(8, 8)], ids=str)
@pytest.mark.parametrize("path", ["compact", "reference", "masked", "dense"])
def test_every_path_gives_the_same(path, grid, device):
    kept = {"dense": 1.1}.get(path, 0.05 if grid == Grid.element() else 0.4)
    args = make_inputs((9,), 24, 40, grid, device=device, kept=kept)
    exact, plain = run(formula, *f64(args)), run(formula, *args)
    with force(path):
        ours = run(masked_linear, *args)
    for name in exact:
        assert_no_worse(ours[name], plain[name], exact[name], factor=2, label=name)


@pytest.mark.parametrize("path", ["compact", "masked"])
@pytest.mark.parametrize("grid", [Grid.row(), Grid.column(), Grid.rows(4), Grid.element(), Grid.tensor()], ids=str)
def test_columns_are_taken_by_the_op_and_padded_to_a_multiple_of_8(grid, path, monkeypatch):
    """As on a GPU: what take_columns fills up with 0 changes nothing, and NaN in what is dropped stays there."""
    args = make_inputs((9,), 26, 42, grid, kept=0.05 if grid == Grid.element() else 0.4)
    exact, plain = run(formula, *f64(args)), run(formula, *args)
    called, take = [], OPS.take_columns
    monkeypatch.setattr(module, "_takes", lambda device_type, dtype: True)
    monkeypatch.setattr(OPS, "take_columns", lambda *given: called.append(given[1]) or take(*given))
    x, weight, bias, keep, _ = args
    with force(path):
        ours = run(masked_linear, x, weight.masked_fill(~grid.expand(keep, 42, 26), torch.nan), bias, keep, grid)
    for name in exact:
        assert_no_worse(ours[name], plain[name], exact[name], factor=2, label=name)
    assert called and all(len(index) % 8 == 0 or len(index) in (26, 42) for index in called)


@pytest.mark.parametrize("grid", [Grid.element(), Grid.row(), Grid.column(), Grid.block(2, 3)], ids=str)
def test_gradients_by_finite_differences(grid):
    x, weight, bias, keep, _ = f64(make_inputs((3,), 6, 4, grid))
    args = (*(t.requires_grad_() for t in (x, weight, bias)), keep, grid)
    assert torch.autograd.gradcheck(masked_linear, args)
    assert torch.autograd.gradgradcheck(masked_linear, args)


@pytest.mark.parametrize("kept", [0.0, 0.6, 1.1], ids=["none", "some", "all"])
@pytest.mark.parametrize("grid", [Grid.element(), Grid.row(), Grid.columns(4)], ids=str)
def test_registration(grid, kept, device):
    x, weight, bias, keep, _ = make_inputs((2, 3), 8, 12, grid, device=device, kept=kept)
    blocks = (grid.block_rows, grid.block_cols)
    dy = torch.randn(2, 3, 12, device=device)
    for op, first, second in ((OPS.masked_linear_dx, dy, weight), (OPS.masked_linear_dweight, dy, x)):
        torch.library.opcheck(op.default, (first.requires_grad_(), second.requires_grad_(), keep, *blocks))
    torch.library.opcheck(OPS.masked_linear.default, (x, weight, bias.requires_grad_(), keep, *blocks))
    torch.library.opcheck(OPS.masked_linear.default, (x.transpose(0, 1).detach(), weight.detach(), None, keep, *blocks))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_poison_in_dropped_weights_reaches_nothing(grid, poison, device):
    x, weight, bias, keep, _ = make_inputs((5,), 40, 48, grid, device=device)
    clean = run(masked_linear, x, weight, bias, keep, grid)
    weight = weight.masked_fill(~grid.expand(keep, *weight.shape), poison)
    for name, value in run(masked_linear, x, weight, bias, keep, grid).items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("path", [None, "reference", "masked"])
def test_a_column_of_x_that_no_weight_keeps_is_not_read(path):
    x, weight, bias, keep, grid = make_inputs((5,), 6, 4, Grid.element(), kept=1.1)
    keep[:, 2] = False
    clean = masked_linear(x, weight, bias, keep, grid)
    x[:, 2] = float("nan")
    with force(path):
        grads = run(masked_linear, x, weight, bias, keep, grid)
    torch.testing.assert_close(grads["y"], clean)
    assert not grads["dx"][:, 2].any() and not grads["dweight"][:, 2].any()


@pytest.mark.parametrize("path", [None, "masked"])
def test_a_dropped_row_still_has_its_bias_and_hides_its_dy(path):
    x, weight, bias, _, grid = make_inputs((5,), 6, 4, Grid.row())
    keep = torch.tensor([[True], [False], [True], [True]])
    x.requires_grad_(), weight.requires_grad_()
    with force(path):
        y = masked_linear(x, weight, bias, keep, grid)
        assert torch.equal(y[:, 1], bias[1].expand(5))
        dy = torch.ones_like(y)
        dy[:, 1] = float("nan")
        dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    assert dx.isfinite().all() and dweight.isfinite().all() and not dweight[1].any()


def test_no_bias_means_zero_in_dropped_rows():
    x, weight, _, _, grid = make_inputs((5,), 6, 4, Grid.row())
    keep = torch.tensor([[True], [False], [True], [False]])
    y = masked_linear(x, weight, None, keep, grid)
    assert not y[:, [1, 3]].any() and y[:, [0, 2]].all()


def test_strided_inputs_give_what_contiguous_ones_give(device):
    x, weight, bias, keep, grid = make_inputs((6, 4), 10, 8, Grid.block(4, 5), device=device)
    want = run(masked_linear, x, weight, bias, keep, grid)
    strided = (x.transpose(0, 1).contiguous().transpose(0, 1), weight.T.contiguous().T, bias, keep.T.contiguous().T)
    for name, value in run(masked_linear, *strided, grid).items():
        torch.testing.assert_close(value, want[name], msg=name)


def test_a_mask_changed_in_place_is_seen_by_the_next_call():
    x, weight, bias, keep, grid = make_inputs((5,), 6, 4, Grid.row(), kept=1.1)
    masked_linear(x, weight, bias, keep, grid)
    keep[2] = False
    assert torch.equal(masked_linear(x, weight, bias, keep, grid)[:, 2], bias[2].expand(5))


def test_it_works_in_inference_mode():
    with torch.inference_mode():
        args = make_inputs((5,), 6, 4, Grid.block(2, 2))
        torch.testing.assert_close(masked_linear(*args), formula(*args))


def test_two_runs_are_bitwise_equal(device):
    args = make_inputs((33,), 48, 64, Grid.block(16, 16), device=device)
    first, second = run(masked_linear, *args), run(masked_linear, *args)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("grid", [Grid.element(), Grid.row(), Grid.column()], ids=str)
def test_autocast_computes_as_it_does_for_linear(grid, dtype, device):
    args = make_inputs((7,), 24, 16, grid, device=device)
    exact = run(formula, *f64(args))
    with torch.autocast(device.type, dtype):
        ours, plain = run(masked_linear, *args), run(formula, *args)
        assert masked_linear(*f64(args)).dtype == F.linear(*f64(args)[:3]).dtype == torch.float64
    assert ours["y"].dtype == dtype and ours["dweight"].dtype == torch.float32
    for name in exact:
        assert_no_worse(ours[name], plain[name], exact[name], factor=2, label=name)


def test_only_the_gradients_that_are_wanted_are_made():
    x, weight, bias, keep, grid = make_inputs((5,), 6, 4, Grid.row())
    weight.requires_grad_()
    y = masked_linear(x, weight, bias, keep, grid)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), keep.data_ptr()}
    y.sum().backward()
    assert x.grad is None and bias.grad is None and weight.grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_captured_step_replays_with_new_data(grid):
    x, weight, bias, keep, _ = make_inputs((64,), 96, 192, grid, torch.bfloat16, "cuda")
    run(masked_linear, x, weight, bias, keep, grid)  # what is left of keep is computed once, outside of the capture
    dy = torch.randn(64, 192, device="cuda").bfloat16()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = masked_linear(*leaves, keep, grid)
        grads = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    want = masked_linear(*leaves, keep, grid)
    assert torch.equal(y, want)
    for ours, theirs in zip(grads, torch.autograd.grad(want, leaves, dy)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "change,message",
    [
        *(({name: 3}, f"^masked_linear: {name} is 3, want a tensor") for name in ("x", "weight", "bias", "keep")),
        ({"grid": "row"}, "^masked_linear: grid is 'row', want a Grid"),
        ({"compact": 3}, "^masked_linear: compact is 3, want a CompactWeight or None"),
        ({"weight": torch.ones(4)}, r"weight is \(4,\), want \[N, K\]"),
        ({"x": torch.ones(5, 7)}, r"x is \(5, 7\), want \[..., 6\] for a weight \(4, 6\)"),
        ({"x": torch.tensor(1.0)}, r"x is \(\), want \[..., 6\]"),
        ({"bias": torch.ones(5)}, r"bias is \(5,\), want \(4,\)"),
        (
            {"keep": torch.ones(3, 1, dtype=torch.bool)},
            r"keep is torch.bool \(3, 1\), want torch.bool \(4, 1\) for the",
        ),
        ({"keep": torch.ones(4, 1)}, r"keep is torch.float32 \(4, 1\), want torch.bool \(4, 1\) for the grid row"),
        ({"weight": torch.ones(4, 6).half()}, r"weight is torch.float16, want torch.float32 as x \(or autocast\)"),
        ({"bias": torch.ones(4).double()}, r"bias is torch.float64, want torch.float32 as x"),
        ({"weight": torch.ones(4, 6, device="meta")}, r"weight is on meta, want cpu as x"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    x, weight, bias, keep, grid = make_inputs((5,), 6, 4, Grid.row())
    args = {"x": x, "weight": weight, "bias": bias, "keep": keep, "grid": grid} | change
    with pytest.raises(ValueError, match=message):
        masked_linear(**args)


def test_the_reference_is_the_formula():
    x, weight, bias, keep, grid = make_inputs((5,), 6, 4, Grid.block(2, 3))
    assert torch.equal(reference(x, weight, bias, keep, 2, 3), formula(x, weight, bias, keep, grid))
