"""The dW kernel for Hopper, run on a CPU that plays wgmma, TMA and barriers: tiles, chunks, dropped blocks.

The fibers of the machine make order visible: forward and backward, one block or more than there are tiles."""

import pytest
import torch

from sensibert.core.grid import Grid
from sensibert.ops.masked_linear.dweight import block_list
from tests.helpers import assert_no_worse, dtype_id
from tests.native.runner import KernelFailed

BLOCKS = Grid.block(64, 64)
HALF = [torch.bfloat16, torch.float16]
CODE = {torch.bfloat16: 1, torch.float16: 2}
SHAPES = [
    pytest.param(1, 8, 8, 1, id="one"),
    pytest.param(130, 72, 456, 2, id="ragged"),
    pytest.param(620, 64, 328, 1, id="longer-than-the-ring"),
    pytest.param(620, 64, 328, 5, id="chunks"),
]


def run(kernel, dy, x, keep, grid=BLOCKS, chunks=1, build="plain", pad=0, **env):
    """dW [N, K] as the kernel leaves it, it was NaN; and the number of chunks, 0 lets it choose. Rows of dy and x lie
    `pad` elements further apart than they need."""
    (M, N), K = dy.shape, x.shape[1]
    blocks = block_list(keep, grid, N, K)
    sizes = [M, N, K, N + pad, K + pad, CODE[x.dtype], chunks, *map(len, blocks)]
    spread = [torch.nn.functional.pad(t, (0, pad), value=float("nan")).contiguous() for t in (dy, x)]
    arrays = [torch.tensor(sizes), *spread, x.new_full((N, K), float("nan")), *blocks]
    done = kernel("masked_linear_dweight", build)(*arrays, **{k: str(v) for k, v in env.items()})
    return done[3], int(done[0][6])


def make_inputs(M, N, K, dtype=torch.bfloat16, kept=0.5, grid=BLOCKS):
    return torch.randn(M, N).to(dtype), torch.randn(M, K).to(dtype), torch.rand(grid.shape(N, K)) < kept


def check(got, dy, x, keep, grid=BLOCKS):
    dropped = ~grid.expand(keep, dy.shape[1], x.shape[1])
    exact = (dy.double().T @ x.double()).masked_fill(dropped, 0)
    plain = (dy.float().T @ x.float()).masked_fill(dropped, 0).to(x.dtype)
    assert_no_worse(got, plain, exact, factor=2, label="dw")
    assert not got[dropped].any()


@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("M,N,K,chunks", SHAPES)
def test_values(kernel, M, N, K, chunks, dtype):
    args = make_inputs(M, N, K, dtype, kept=0.8)
    check(run(kernel, *args, chunks=chunks)[0], *args)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("num_kept", range(0, 10, 3))
def test_every_number_of_blocks_in_a_row(kernel, num_kept, rows):
    dy, x, keep = make_inputs(38, 64 * rows, 640, kept=0)
    for row in keep:
        row[torch.randperm(10)[:num_kept]] = True
    check(run(kernel, dy, x, keep)[0], dy, x, keep)


@pytest.mark.parametrize("only_0,both,only_1", [(0, 4, 0), (2, 2, 0), (1, 2, 2), (4, 0, 1), (1, 0, 4), (0, 1, 3)])
def test_two_rows_share_what_both_keep(kernel, only_0, both, only_1):
    dy, x, keep = make_inputs(38, 128, 512, kept=0)
    cols = torch.randperm(8)
    keep[0, cols[: only_0 + both]] = True
    keep[1, cols[only_0 : only_0 + both + only_1]] = True
    check(run(kernel, dy, x, keep)[0], dy, x, keep)


@pytest.mark.parametrize("grid", [Grid.block(128, 64), Grid.rows(64), Grid.columns(64), Grid.tensor()], ids=str)
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.1])
def test_grids_and_densities(kernel, grid, kept):
    dy, x, keep = make_inputs(66, 136, 200, kept=kept, grid=grid)
    check(run(kernel, dy, x, keep, grid)[0], dy, x, keep, grid)


def test_no_tokens_give_zero(kernel):
    dy, x, keep = make_inputs(0, 72, 136, kept=0.6)
    assert not run(kernel, dy, x, keep, chunks=0)[0].any()


@pytest.mark.parametrize("M,want", [(64, 1), (1600, 3)])  # 25 steps of one tile: thirds pay for handing them over
def test_few_tiles_and_many_tokens_are_cut_into_chunks(kernel, M, want):
    args = make_inputs(M, 64, 64, kept=1.1)
    dw, chunks = run(kernel, *args, chunks=0)
    assert chunks == want and torch.equal(dw, run(kernel, *args, chunks=want)[0])
    check(dw, *args)


def test_what_only_dropped_blocks_read_stays_out(kernel):
    """NaN in a feature of dy whose blocks are all dropped, and in one of x."""
    dy, x, keep = make_inputs(70, 136, 200)
    keep[1], keep[:, 2] = False, False
    want = run(kernel, dy, x, keep)[0]
    dy[:, 64:128], x[:, 128:192] = float("nan"), float("nan")
    assert torch.equal(run(kernel, dy, x, keep)[0], want)


@pytest.mark.parametrize("chunks", [1, 4])
def test_neither_order_nor_strides_nor_blocks_change_a_bit(kernel, chunks):
    dy, x, keep = make_inputs(300, 136, 264, kept=0.7)
    want = run(kernel, dy, x, keep, chunks=chunks)[0]
    check(want, dy, x, keep)
    changes = [{"CUDA_ON_CPU_BACKWARD": 1}, {"CUDA_ON_CPU_BLOCKS": 1}, {"CUDA_ON_CPU_BLOCKS": 40}, {"pad": 8}]
    changes.append({"CUDA_ON_CPU_BACKWARD": 1, "CUDA_ON_CPU_BLOCKS": 5})
    for change in changes:
        assert torch.equal(run(kernel, dy, x, keep, chunks=chunks, **change)[0], want), change


@pytest.mark.parametrize("build", ["asan", "tsan"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_sanitizers_find_nothing(kernel, build, chunks):
    dy, x, keep = make_inputs(322, 72, 200, kept=0.7)
    check(run(kernel, dy, x, keep, chunks=chunks, build=build)[0], dy, x, keep)


@pytest.mark.parametrize("change", [{"pad": 4}, {"chunks": 17}])
def test_what_it_cannot_run_is_refused(kernel, change):
    with pytest.raises(KernelFailed, match="launch failed with error 1"):
        run(kernel, *make_inputs(8, 64, 64, kept=1.1), **change)
