"""block_sensitivity: every statistic, grid and dtype against float64; accumulation, registration, named mistakes."""

import itertools

import pytest
import torch

from sensibert.core.grid import Grid
from sensibert.ops import block_sensitivity
from sensibert.ops.block_sensitivity import FINISHES, REDUCES, reference
from tests.helpers import DTYPES, assert_no_worse, dtype_id

GRIDS = [
    *(Grid.element(), Grid.row(), Grid.column(), Grid.tensor(), Grid.rows(4), Grid.columns(5)),
    *(Grid.block(4, 8), Grid.block(3, 64), Grid.block(64, 5), Grid.block(1, 3), Grid.block(100, 100)),
]
SHAPES = [(12, 20), (13, 17), (1, 1), (7,), (40, 1)]


def make_inputs(shapes, dtype=torch.float32, device="cpu"):
    weights = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    return weights, [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def by_hand(w, g, grid, reduce, finish, dtype=torch.float64):
    """One block after the other: independent of the reference."""
    w, g = (x.to(dtype).cpu().reshape(len(x), -1) for x in (w, g))
    product = w * g
    terms = {
        "signed": product,
        "abs": product.abs(),
        "square": product**2,
        "grad_square": g * g,
        "weight_square": w * w,
    }
    terms = terms[reduce]
    rows, cols = grid.shape(*terms.shape)
    bn, bk = grid.block_size(*terms.shape)
    out = torch.zeros(rows, cols, dtype=dtype)
    for i, j in itertools.product(range(rows), range(cols)):
        out[i, j] = terms[i * bn : (i + 1) * bn, j * bk : (j + 1) * bk].sum()
    return {"none": out, "square": out**2, "abs": out.abs()}[finish]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_grid_and_shape(grid, dtype, device, poisoned_empty):
    weights, grads = make_inputs(SHAPES, dtype, device)
    for w, g, out in zip(weights, grads, block_sensitivity(weights, grads, grid, "abs")):
        exact, plain = (by_hand(w, g, grid, "abs", "none", dtype) for dtype in (torch.float64, torch.float32))
        assert_no_worse(out.cpu(), plain, exact, label=f"{tuple(w.shape)}")


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("reduce", REDUCES)
def test_every_statistic(reduce, finish, device, poisoned_empty):
    weights, grads = make_inputs([(9, 10), (6,)], device=device)
    grids = [Grid.block(4, 5), Grid.tensor()]
    for w, g, grid, out in zip(weights, grads, grids, block_sensitivity(weights, grads, grids, reduce, finish)):
        torch.testing.assert_close(out.cpu().double(), by_hand(w, g, grid, reduce, finish), rtol=1e-5, atol=1e-5)


def test_weight_and_gradient_may_differ_in_dtype(device):
    w, g = torch.randn(8, 8, device=device), torch.randn(8, 8, device=device).bfloat16()
    (out,) = block_sensitivity([w], [g], Grid.row(), "signed")
    torch.testing.assert_close(out.cpu().double(), by_hand(w, g, Grid.row(), "signed", "none"), rtol=1e-5, atol=1e-5)


def test_float64_is_summed_in_float64():
    w = torch.tensor([[1e15, 1.0, -1e15]], dtype=torch.float64)
    assert block_sensitivity([w], [torch.ones_like(w)], Grid.row(), "signed")[0].item() == 1.0


def test_fp16_does_not_overflow(device):
    w = torch.full((2, 4), 3e4, dtype=torch.float16, device=device)
    assert block_sensitivity([w], [w], Grid.tensor(), "square")[0].item() == pytest.approx(8 * (9e8) ** 2, rel=1e-3)


@pytest.mark.parametrize("decay, scale", [(1.0, 1.0), (0.9, 0.1), (1.0, 0.0), (0.5, -2.0)])
def test_it_accumulates_in_place(decay, scale, device):
    weights, grads = make_inputs([(6, 4), (5,)], device=device)
    before = [torch.randn(1, 4, device=device), torch.randn(1, 1, device=device)]
    out = [b.clone() for b in before]
    returned = block_sensitivity(weights, grads, Grid.column(), "signed", "square", out, decay, scale)
    assert all(r is o for r, o in zip(returned, out))
    for w, g, old, new in zip(weights, grads, before, out):
        fresh = by_hand(w, g, Grid.column(), "signed", "square")
        torch.testing.assert_close(new.cpu().double(), decay * old.cpu().double() + scale * fresh, rtol=1e-5, atol=1e-5)


def test_with_decay_0_what_was_in_out_is_not_read(device):
    weights, grads = make_inputs([(6, 4)], device=device)
    out = [torch.full((6, 1), torch.nan, device=device)]
    assert block_sensitivity(weights, grads, Grid.row(), out=out, decay=0.0)[0].isfinite().all()


def test_non_contiguous_inputs(device):
    w, g = torch.randn(10, 6, device=device).T, torch.randn(6, 20, device=device)[:, ::2]
    (out,) = block_sensitivity([w], [g], Grid.column(), "signed")
    torch.testing.assert_close(out.cpu().double(), by_hand(w, g, Grid.column(), "signed", "none"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tensors_without_elements(grid, device):
    for shape in [(0,), (0, 5), (5, 0), (0, 0)]:
        empty = torch.empty(shape, device=device)
        (out,) = block_sensitivity([empty], [empty], grid)
        assert out.shape == grid.shape(shape[0], shape[1] if len(shape) == 2 else 1) and not out.any()


def test_no_tensors_at_all():
    assert block_sensitivity([], [], []) == []


def test_weight_square_needs_no_gradient(device):
    w = torch.randn(3, 4, device=device)
    torch.testing.assert_close(
        block_sensitivity([w], [], Grid.row(), "weight_square")[0], w.square().sum(1, keepdim=True)
    )


def test_parameters_that_require_grad_leave_no_trace(device):
    w = torch.randn(3, 4, device=device, requires_grad=True)
    (out,) = block_sensitivity([w], [torch.ones_like(w)], Grid.row())
    assert not out.requires_grad


def test_a_nan_stays_in_its_block(device):
    weights, grads = make_inputs([(6, 4)], device=device)
    grads[0][2, 1] = torch.nan
    assert block_sensitivity(weights, grads, Grid.block(3, 2))[0].isnan().tolist() == [[True, False], [False, False]]


def test_registration(device):
    weights, grads = make_inputs([(6, 4), (5,)], device=device)
    out = [torch.zeros(6, 1, device=device), torch.zeros(5, 1, device=device)]
    args = (out, weights, grads, [1, 0, 1, 1], "signed", "square", 0.9, 0.1)
    torch.library.opcheck(torch.ops.sensibert.block_sensitivity_.default, args)


def test_it_compiles_without_a_graph_break(device):
    weights, grads = make_inputs([(6, 4), (5,)], device=device)
    out = [torch.zeros(1, 4, device=device), torch.zeros(1, 1, device=device)]

    def step(out, weights, grads):
        block_sensitivity(weights, grads, Grid.column(), "signed", "square", out, 0.5)
        return out[0].sum()

    want = [o.clone() for o in out]
    step(want, weights, grads)
    torch.compile(step, fullgraph=True, backend="aot_eager")(out, weights, grads)
    torch.testing.assert_close(out, want)


def test_the_reference_is_what_the_device_runs(device):
    weights, grads = make_inputs([(130, 300), (70, 64), (9,)], device=device)
    for grid, finish in [(Grid.column(), "square"), (Grid.block(64, 64), "none"), (Grid.tensor(), "abs")]:
        ours = block_sensitivity(weights, grads, grid, "signed", finish)
        want = [torch.zeros_like(o) for o in ours]
        reference(want, weights, grads, [grid.block_rows, grid.block_cols] * 3, "signed", finish, 0.0, 1.0)
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-2)


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.mark.gpu
def test_two_runs_agree_bit_for_bit(gpu):
    weights, grads = make_inputs([(3072, 768), (768, 3072), (30522, 64), (768,)], torch.bfloat16, gpu)
    for grid in GRIDS:
        once = block_sensitivity(weights, grads, grid, "signed")
        assert all(map(torch.equal, once, block_sensitivity(weights, grads, grid, "signed"))), str(grid)


@pytest.mark.gpu
def test_more_elements_than_31_bits_count(gpu):
    w = torch.ones(2**31 + 8, dtype=torch.float16, device=gpu)
    assert block_sensitivity([w], [w], Grid.tensor())[0].item() == pytest.approx(2**31 + 8, rel=1e-6)
    tall = w[: 2**31 + 8].view(-1, 8)
    assert (block_sensitivity([tall], [tall], Grid.column())[0] == tall.shape[0]).all()


@pytest.mark.gpu
def test_more_tensors_than_one_launch_holds(gpu):
    weights = [torch.full((3, 4), float(i), device=gpu) for i in range(805)]
    assert torch.cat(block_sensitivity(weights, weights, Grid.tensor())).view(-1).tolist() == [
        12.0 * i * i for i in range(805)
    ]


@pytest.mark.gpu
def test_float64_on_a_gpu_is_named(gpu):
    w = torch.ones(2, 2, dtype=torch.float64, device=gpu)
    with pytest.raises(
        RuntimeError, match=r"block_sensitivity: weights\[0\] is of a dtype the CUDA kernel does not take"
    ):
        block_sensitivity([w], [w], Grid.row())


W, G = torch.zeros(2, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ([W], [G], Grid.row(), "max"),
            r"reduce is 'max', want one of signed, abs, square, grad_square",
        ),
        (([W], [G], Grid.row(), "abs", "root"), r"finish is 'root', want one of none, square, abs"),
        (([W], [G], [Grid.row()] * 2), r"grids are 2, want one for each of 1 weights"),
        (([W], [], Grid.row()), r"grads are 0, want one for each of 1 weights"),
        (([W, W], [G], Grid.row()), r"grads are 1, want one for each of 2 weights"),
        (([W, W], [G], Grid.row(), "weight_square"), r"grads are 1, want one for each of 2 weights"),
        (([W, None], [G, G], Grid.row()), r"weights\[1\] is None, want a tensor"),
        (([W], [None], Grid.row()), r"grads\[0\] is None, want a tensor"),
        (
            ([W.long()], [G], Grid.row()),
            r"weights\[0\] is torch.int64, torch.strided, want dense float32",
        ),
        (([W], [G.to_sparse()], Grid.row()), r"grads\[0\] is torch.float32, torch.sparse_coo, want dense"),
        (([W], [G.to("meta")], Grid.row()), r"grads\[0\] is on meta, want cpu"),
        (([torch.zeros(1, 2, 3)], [G], Grid.row()), r"weights\[0\] is \(1, 2, 3\), want \[N, K\] or \[N\]"),
        (([torch.tensor(1.0)], [G], Grid.row()), r"weights\[0\] is \(\), want \[N, K\] or \[N\]"),
        (([W], [G.T], Grid.row()), r"grads\[0\] is \(3, 2\), want \(2, 3\)"),
        (([W], [G], Grid.row(), "abs", "none", []), r"out has 0 tensors, want 1"),
        (
            ([W], [G], Grid.row(), "abs", "none", [torch.zeros(2)]),
            r"out\[0\] is torch.float32 \(2,\), want .* \(2, 1\)",
        ),
        (
            ([W], [G], Grid.row(), "abs", "none", [torch.zeros(2, 1).half()]),
            r"out\[0\] is torch.float16 \(2, 1\), want",
        ),
        (([W], [G], Grid.element(), "abs", "none", [torch.zeros(3, 2).T]), r"out\[0\] is .* \(2, 3\) with gaps, want"),
        (([W], [G], Grid.row(), "abs", "none", [torch.zeros(2, 1, device="meta")]), r"out\[0\] is on meta, want cpu"),
    ],
)
def test_a_bad_argument_is_named(args, message):
    with pytest.raises(ValueError, match="block_sensitivity: " + message):
        block_sensitivity(*args)
