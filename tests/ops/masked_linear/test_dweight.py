"""The block list says exactly what is kept, in tiles as even as they can be; the references read it back."""

import pytest
import torch

from sensibert.core.grid import Grid
from sensibert.ops import masked_linear
from sensibert.ops.masked_linear import dispatch as paths
from sensibert.ops.masked_linear.dweight import TILE_BANDS, block_list, reference
from tests.helpers import assert_no_worse, dtype_id, needs_hopper
from tests.ops.masked_linear.test_tiles import bools

BLOCKS = Grid.block(64, 64)
DWEIGHT = torch.ops.sensibert.masked_linear_tiles_dweight.default


def words(tiles):
    return [row[: 5 + sum(row[2:5])] for row in tiles.tolist()]


def test_a_list_by_hand():
    keep = bools(".x.x.", ".....", "xxx..")
    tiles, dropped = block_list(keep, BLOCKS, 192, 320)
    assert words(tiles) == [[2, 0, 2, 1, 1, 0, 2, 1, 3]]  # the longer row first, what both keep in the middle
    assert dropped.tolist() == [0, 2, 4, 5, 6, 7, 8, 9, 13, 14]


def test_rows_that_share_most_are_paired_and_the_longest_tile_comes_first():
    keep = bools("x..x....", ".xx.xx..", "xx.x....", ".xx.xx..")
    tiles = block_list(keep, BLOCKS, 256, 512).tiles
    assert words(tiles) == [[1, 3, 0, 4, 0, 1, 2, 4, 5], [2, 0, 1, 2, 0, 1, 0, 3]]


@pytest.mark.parametrize("num_kept,want", [(0, []), (1, [(1, 0)]), (8, [(4, 4)]), (9, [(2, 2), (3, 2)][::-1])])
def test_a_row_of_its_own_is_shared_out_evenly(num_kept, want):
    tiles = block_list(torch.arange(16)[None] < num_kept, BLOCKS, 64, 1024).tiles
    assert [(row[2], row[4]) for row in tiles.tolist()] == want and tiles.shape[1] == 5 + 2 * TILE_BANDS


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_each_kept_block_is_in_one_tile_and_no_row_of_a_tile_is_too_long(density):
    keep = torch.rand(7, 11) < density
    tiles, dropped = block_list(keep, BLOCKS, 448, 704)
    calls = torch.zeros(7, 11, dtype=torch.int64)
    for i, j, only_i, both, only_j, *cols in tiles.tolist():
        assert max(only_i, only_j) + both <= TILE_BANDS and (i != j or both == 0)
        for row, of_row in ((i, cols[: only_i + both]), (j, cols[only_i : only_i + both + only_j])):
            calls[row, of_row] += 1
    assert torch.equal(calls, keep.long()) and torch.equal(dropped.long(), (~keep).flatten().nonzero()[:, 0])


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.1])
@pytest.mark.parametrize("grid", [Grid.block(64, 128), Grid.rows(64), Grid.columns(128), Grid.tensor()], ids=str)
def test_the_reference_reads_it_back(grid, kept):
    dy, x = torch.randn(2, 3, 328), torch.randn(2, 3, 200)
    keep = torch.rand(grid.shape(328, 200)) < kept
    blocks = block_list(keep, grid, 328, 200)
    want = torch.einsum("bsn,bsk->nk", dy, x) * grid.expand(keep, 328, 200)
    torch.testing.assert_close(reference(dy, x, *blocks), want)


def test_the_op_is_registered():
    dy, x = torch.randn(2, 3, 72), torch.randn(2, 3, 136)
    torch.library.opcheck(DWEIGHT, (dy, x, *block_list(bools("x.x", ".x."), BLOCKS, 72, 136)))


def test_the_forced_path_takes_the_op(monkeypatch):
    monkeypatch.setattr(paths, "resolve", lambda problem: paths.Choice("tiles", "as if on sm_90"))
    called = []
    monkeypatch.setattr(
        torch.ops.sensibert, "masked_linear_tiles_dweight", lambda *args: called.append(1) or DWEIGHT(*args)
    )
    x, weight = torch.randn(5, 128, dtype=torch.float64), torch.randn(192, 128, dtype=torch.float64, requires_grad=True)
    keep = bools("x.", ".x", "x.")
    masked_linear(x, weight, None, keep, BLOCKS).square().sum().backward()
    wide = BLOCKS.expand(keep, 192, 128)
    want = torch.autograd.grad((x @ (weight * wide).T).square().sum(), weight)[0]
    torch.testing.assert_close(weight.grad, want)
    assert called


@pytest.mark.gpu
@needs_hopper("tiles")
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("kept", [0.0, 0.25, 0.8, 1.1])
@pytest.mark.parametrize("M,N,K", [(1, 8, 8), (130, 200, 72), (4096, 3072, 768), (777, 1000, 4096), (16384, 768, 3072)])
def test_the_kernel_computes_the_blocks_of_the_list(M, N, K, kept, dtype):
    dy, x = torch.randn(M, N).to("cuda", dtype), (torch.randn(M, K) / M**0.5).to("cuda", dtype)
    keep = (torch.rand(BLOCKS.shape(N, K)) < kept).cuda()
    blocks = block_list(keep, BLOCKS, N, K)
    dropped = ~BLOCKS.expand(keep, N, K)
    exact = (dy.double().T @ x.double()).masked_fill(dropped, 0)
    plain = (dy.T @ x).masked_fill(dropped, 0)
    ours = DWEIGHT(dy, x, *blocks)
    assert_no_worse(ours, plain, exact, factor=2, label="dweight")
    assert not ours[dropped].any()
    assert torch.equal(DWEIGHT(dy, x, *blocks), ours)


@pytest.mark.gpu
@needs_hopper("tiles")
def test_the_backward_of_the_forced_path_reaches_the_kernel():
    x, weight = torch.randn(300, 768, device="cuda").bfloat16(), torch.randn(768, 768, device="cuda").bfloat16()
    keep = (torch.rand(12, 12) < 0.5).cuda()
    with paths.force("tiles"), torch.profiler.profile() as profile:
        masked_linear(x, weight.requires_grad_(), None, keep, BLOCKS).sum().backward()
        torch.cuda.synchronize()
    assert any("masked_linear_dweight_kernel" in event.key for event in profile.key_averages())
