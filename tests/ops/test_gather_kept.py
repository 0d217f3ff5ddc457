"""gather_kept copies what indexing would, rounds once, and lets nothing of a hole through."""

import pytest
import torch

from sensibert.core.grid import Grid
from sensibert.ops import gather_kept
from sensibert.ops.masked_linear.kept_index import kept_index
from tests.helpers import DTYPES, dtype_id

pytestmark = pytest.mark.usefixtures("poisoned_empty")
SHAPES = [(35, 52), (6, 1), (1, 7), (64, 64), (0, 4), (4, 0)]
ALL = [*DTYPES, torch.float64]


def index(size: int, share: float, device="cpu") -> torch.Tensor:
    return (torch.rand(size) < share).nonzero()[:, 0].to(device)


def bits_of(n: int, k: int, device="cpu") -> torch.Tensor:
    return (torch.rand(n, k) < 0.6).to(device, torch.int8).neg_()


def entry(shape, rows: bool, cols: bool, bits: bool, dtype=torch.float32, device="cpu"):
    """(weight, rows, cols, bits) for one tensor."""
    r = index(shape[0], 0.6, device) if rows else None
    c = index(shape[1], 0.6, device) if cols else None
    n, k = shape[0] if r is None else len(r), shape[1] if c is None else len(c)
    return torch.randn(shape).to(device, dtype), r, c, bits_of(n, k, device) if bits else None


def expected(weight, rows, cols, bits, dtype):
    """By plain indexing, in the weight's dtype, then one rounding."""
    w = weight if rows is None else weight[rows]
    w = (w if cols is None else w[:, cols]).to(dtype)
    return w if bits is None else torch.where(bits == 0, torch.zeros_like(w), w)


def entries(dtype, device, shapes=SHAPES):
    kinds = [(r, c, b) for r in (False, True) for c in (False, True) for b in (False, True)]
    return [entry(shape, *kind, dtype, device) for shape in shapes for kind in kinds]


@pytest.mark.parametrize("to", ALL, ids=dtype_id)
@pytest.mark.parametrize("dtype", ALL, ids=dtype_id)
def test_every_combination_is_what_indexing_gives(dtype, to, device):
    some = entries(dtype, device)
    for ours, given in zip(gather_kept(*zip(*some), dtype=to), some, strict=True):
        want = expected(*given, to)
        assert ours.dtype == to and ours.is_contiguous() and torch.equal(ours, want)


def test_weights_of_many_dtypes_in_one_call_keep_theirs(device):
    some = [entry((35, 52), True, True, True, dtype, device) for dtype in DTYPES]
    for ours, given in zip(gather_kept(*zip(*some)), some, strict=True):
        assert torch.equal(ours, expected(*given, given[0].dtype))


@pytest.mark.parametrize("grid", [Grid.row(), Grid.columns(4), Grid.block(16, 16), Grid.element()], ids=str)
def test_it_takes_what_a_keep_grid_leaves(grid, device):
    weight, keep = torch.randn(35, 52, device=device), (torch.rand(grid.shape(35, 52)) < 0.4).to(device)
    kept, wide = kept_index(keep, grid, 35, 52), grid.expand(keep, 35, 52)
    (ours,) = gather_kept([weight], [kept.rows], [kept.cols], [kept.bits])
    assert torch.equal(ours, (weight * wide)[wide.any(1)][:, wide.any(0)])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_a_hole_or_a_dropped_row_held_does_not_matter(poison, device):
    weight, rows, cols, bits = entry((35, 52), True, True, True, device=device)
    want = expected(weight, rows, cols, bits, torch.bfloat16)
    holes = torch.ones_like(weight, dtype=torch.bool)
    holes[rows[:, None], cols] = bits == 0
    (ours,) = gather_kept([weight.masked_fill(holes, poison)], [rows], [cols], [bits], dtype=torch.bfloat16)
    assert torch.equal(ours, want)


def test_rows_may_come_in_any_order_and_twice(device):
    weight, rows = torch.randn(5, 8, device=device), torch.tensor([4, 0, 0, 3], device=device)
    (ours,) = gather_kept([weight], [rows], [None])
    assert torch.equal(ours, weight[rows])


def test_matrices_that_are_there_already_are_written_through_gaps_and_past_autograd(device):
    weight = torch.nn.Parameter(torch.randn(7, 6, device=device).T)
    out = torch.zeros(12, 7, device=device)[::2]
    assert gather_kept([weight], [None], [None], out=[out])[0] is out
    assert torch.equal(out, weight) and not out.requires_grad


def test_no_weights_and_nothing_kept_are_no_work(device):
    assert gather_kept([], [], []) == []
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert gather_kept([torch.ones(3, 4, device=device)], [none], [None])[0].shape == (0, 4)


def op_arguments(device="cpu"):
    first, second = entry((6, 8), True, False, True, device=device), entry((5, 4), False, True, False, device=device)
    out = [torch.zeros(len(first[1]), 8, device=device), torch.zeros(5, len(second[2]), device=device).bfloat16()]
    return out, [first[0], second[0]], [first[1]], [0], [second[2]], [1], [first[3]], [0]


def test_registration(device):
    torch.library.opcheck(torch.ops.sensibert.gather_kept_.default, op_arguments(device))


def test_it_compiles_without_a_graph_break():
    def run(weight, rows, bits):
        return gather_kept([weight], [rows], [None], [bits], dtype=torch.bfloat16)[0]

    weight, rows, _, bits = entry((6, 8), True, False, True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight, rows, bits), run(weight, rows, bits))


def test_an_index_outside_the_weight_is_refused():
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        gather_kept([torch.zeros(3, 4)], [torch.tensor([3])], [None])


W, R, C = torch.zeros(3, 4), torch.tensor([0, 2]), torch.tensor([1])
WRONG = {
    "rows has 0 entries, want 1 as weights": ([W], [], [None]),
    "bits has 2 entries, want 1 as weights": ([W], [R], [C], [None, None]),
    r"weights\[0\] is torch.float32 \(3,\) on cpu, want a float \[N, K\] on cpu": ([W[:, 0]], [None], [None]),
    r"weights\[1\] is torch.int64 \(3, 4\)": ([W, W.long()], [None, None], [None, None]),
    r"rows\[0\] is torch.int32 \(2,\) on cpu, want torch.int64 of one axis": ([W], [R.int()], [None]),
    r"cols\[0\] is torch.int64 \(1, 1\) on cpu": ([W], [None], [C[None]]),
    r"bits\[0\] is torch.int8 \(3, 4\) on cpu, want torch.int8 \(2, 1\)": ([W], [R], [C], [W.to(torch.int8)]),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message):
    with pytest.raises(ValueError, match=f"gather_kept: {message}"):
        gather_kept(*WRONG[message])


@pytest.mark.parametrize(
    "message, options",
    [
        ("out has 0 entries, want 1", {"out": []}),
        (r"out\[0\] is torch.float32 \(3, 4\) on cpu, want a float \(2, 1\)", {"out": [W]}),
        (r"want torch.float16 \(2, 1\)", {"out": [W[:2, :1]], "dtype": torch.float16}),
    ],
)
def test_a_matrix_that_cannot_be_written_is_named(message, options):
    with pytest.raises(ValueError, match=f"gather_kept: .*{message}"):
        gather_kept([W], [R], [C], **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_whole_model_on_the_gpu_is_indexed_right_and_captured():
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    some = [entry(shape, rows, not rows, False, device="cuda") for shape in shapes * 24 for rows in (True, False)]
    out = gather_kept(*zip(*some), dtype=torch.bfloat16)
    assert all(torch.equal(o, expected(*given, torch.bfloat16)) for o, given in zip(out, some, strict=True))
    for weight, *_ in some:
        weight.neg_()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        gather_kept(*zip(*some), out=out)
    graph.replay()
    assert all(torch.equal(o, expected(*given, torch.bfloat16)) for o, given in zip(out, some, strict=True))
