"""The CUDA source of block_sensitivity, run on the CPU: against float64, under the sanitizers, bit for bit the same
however many blocks run, in whichever order, at any alignment."""

import pytest
import torch

from sensibert.core.grid import Grid
from sensibert.ops.block_sensitivity import FINISHES, REDUCES, reference
from tests.helpers import DTYPES

from .runner import BUILDS, KernelFailed

DTYPE_PAIRS = [(0, 0), (1, 1), (0, 1), (2, 0)]
EPS = torch.finfo(torch.float32).eps
# (N, K, grid): each walk of the kernel, whole and ragged
CASES = [
    (37, 52, Grid.element()),
    (1, 1, Grid.tensor()),
    (21, 48, Grid.row()),
    (3, 4100, Grid.row()),  # longer than a warp's segment
    (9, 130, Grid.rows(4)),
    (130, 131, Grid.tensor()),  # two pieces, unaligned
    (777, 1, Grid.element()),
    (50, 1, Grid.rows(7)),
    (140, 33, Grid.column()),  # two row pieces
    (20, 140, Grid.columns(3)),  # strips of 40 blocks
    (19, 136, Grid.columns(64)),
    (5, 300, Grid.columns(200)),  # two column pieces, the last block short of one
    (70, 150, Grid.block(64, 64)),
    (21, 40, Grid.block(16, 16)),  # a warp a block
    (9, 18, Grid.block(2, 5)),
    (11, 270, Grid.block(3, 260)),
]


def call(kernel, problem, reduce="signed", finish="none", decay=0.0, scale=1.0, build="plain", skip=0, **env):
    weights, grads, grids, outs = problem
    shapes, arrays = [], []
    for w, g, grid, out in zip(weights, grads, grids, outs):
        dtypes = [DTYPES.index(w.dtype), DTYPES.index(g.dtype)]
        shapes.append([*w.shape, grid.block_rows, grid.block_cols, *dtypes, skip, skip])
        arrays += [torch.cat([x.new_full((skip,), torch.nan), x.reshape(-1)]) for x in (w, g)] + [out]
    words = torch.tensor([REDUCES.index(reduce), FINISHES.index(finish)])
    run = kernel("block_sensitivity", build)
    return run(words, torch.tensor([decay, scale]), torch.tensor(shapes), *arrays, **env)[5::3]


def model(dtypes=(torch.float32, torch.float32), cases=CASES):
    weights = [torch.randn(n, k).to(dtypes[0]) for n, k, _ in cases]
    grads = [torch.randn(n, k).to(dtypes[1]) for n, k, _ in cases]
    grids = [grid for _, _, grid in cases]
    return weights, grads, grids, [torch.randn(grid.shape(n, k)) for n, k, grid in cases]


def truth(weights, grads, grids, outs, reduce, finish, decay, scale):
    """The reference summing in float64; only its results are rounded to fp32."""
    outs = [o.clone() for o in outs]
    blocks = [b for grid in grids for b in (grid.block_rows, grid.block_cols)]
    reference(outs, [w.double() for w in weights], [g.double() for g in grads], blocks, reduce, finish, decay, scale)
    return outs


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("w_dtype, g_dtype", DTYPE_PAIRS, ids=["fp32", "bf16", "fp32-bf16", "fp16-fp32"])
def test_every_walk_is_right_and_clean(kernel, build, w_dtype, g_dtype):
    args = model((DTYPES[w_dtype], DTYPES[g_dtype]))
    ours = call(kernel, args, "abs", "none", 0.5, 2.0, build=build)
    for case, mine, want in zip(CASES, ours, truth(*args, "abs", "none", 0.5, 2.0)):
        torch.testing.assert_close(mine, want, rtol=8 * EPS, atol=8 * EPS, msg=lambda m, case=case: f"{case}: {m}")


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("reduce", REDUCES)
def test_every_statistic(kernel, reduce, finish):
    args = model((torch.bfloat16, torch.float32))
    ours = call(kernel, args, reduce, finish, 1.0, 0.25)
    for case, mine, want in zip(CASES, ours, truth(*args, reduce, finish, 1.0, 0.25)):
        torch.testing.assert_close(mine, want, rtol=2e-5, atol=2e-4, msg=lambda m, case=case: f"{case}: {m}")


def test_the_result_is_the_same_for_any_blocks_order_and_alignment(kernel):
    args = model()
    once = call(kernel, args)
    for how in ({"CUDA_ON_CPU_BLOCKS": "1"}, {"CUDA_ON_CPU_BLOCKS": "64"}, {"CUDA_ON_CPU_BACKWARD": "1"}, {"skip": 1}):
        assert all(map(torch.equal, once, call(kernel, args, **how))), how


def test_with_decay_0_what_was_in_out_is_not_read(kernel):
    weights, grads, grids, outs = model()
    outs = [torch.full_like(o, torch.nan) for o in outs]
    assert all(o.isfinite().all() for o in call(kernel, (weights, grads, grids, outs)))


def test_empty_tensors_and_lists(kernel):
    grid = Grid.column()
    assert call(kernel, ([], [], [], [])) == []
    empty, full = torch.zeros(0, 5), torch.ones(2, 3)
    ours = call(kernel, ([empty, full], [empty, full], [grid] * 2, [torch.zeros(0, 5), torch.zeros(1, 3)]))
    assert ours[0].shape == (0, 5) and torch.equal(ours[1], torch.full((1, 3), 2.0))


def test_more_tensors_than_one_launch_holds(kernel):
    weights = [torch.full((1, 4), float(i)) for i in range(805)]
    ours = call(kernel, (weights, weights, [Grid.tensor()] * 805, [torch.zeros(1, 1)] * 805))
    assert torch.cat(ours).view(-1).tolist() == [4.0 * i * i for i in range(805)]


def test_nan_stays_in_its_block(kernel):
    weights, grads, grids, outs = model()
    for w in weights:
        w[-1, -1] = torch.nan
    for case, out in zip(CASES, call(kernel, (weights, grads, grids, outs))):
        assert out.isnan().sum() == 1 and out[-1, -1].isnan(), case


def test_a_tensor_with_too_many_blocks_is_refused(kernel):
    run = kernel("block_sensitivity")
    shapes = torch.tensor([[2**33, 4, 1, 0, 0, 0, 0, 0]])  # refused before anything is read
    one = torch.zeros(1)
    with pytest.raises(KernelFailed, match="launch failed with error 1"):
        run(torch.zeros(2, dtype=torch.long), torch.ones(2), shapes, one, one, one)
