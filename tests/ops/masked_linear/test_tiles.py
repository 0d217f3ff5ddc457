"""The tile list says exactly what is kept, in the order the kernel wants it; the reference reads it back."""

import pytest
import torch
import torch.nn.functional as F

from sensibert.core.grid import Grid
from sensibert.ops import masked_linear
from sensibert.ops.masked_linear import dispatch as paths
from sensibert.ops.masked_linear.tiles import column_tile_list, reference, tile_list
from tests.helpers import assert_no_worse, dtype_id, needs_hopper


def bools(*rows):
    return torch.tensor([[cell == "x" for cell in row] for row in rows])


def test_a_list_by_hand():
    #                    one tile of 192 features     the other, two bands of it
    keep = bools("x.xx", "x.x.", "xxx.", "....", ".x..")
    tiles = tile_list(keep, Grid.block(64, 64), 320, 256, 192)
    assert [(e >> 4, e & 15) for e in tiles.entries.tolist()] == [(0, 7), (2, 7), (1, 4), (3, 1), (1, 2)]
    assert tiles.offsets.tolist() == [0, 2, 4, 4, 5]
    assert tiles.order.tolist() == [0, 1] and tiles.tile_cols == 192


def test_the_longest_tile_comes_first_and_ties_keep_their_order():
    keep = bools("x...", "xx..", "xxxx", "xx..").repeat_interleave(3, 0)
    assert tile_list(keep, Grid.block(64, 64), 768, 256, 192).order.tolist() == [2, 1, 3, 0]


@pytest.mark.parametrize(
    "grid,N,want",
    [
        (Grid.block(64, 64), 768, 192),  # both widths divide it: the one that can skip each block
        (Grid.block(64, 64), 1024, 192),  # blocks of 64 rows differ: 256 would multiply them as zeros
        (Grid.block(256, 64), 1024, 256),
        (Grid.columns(64), 1024, 256),
        (Grid.columns(64), 1000, 192),
    ],
    ids=str,
)
def test_the_width_loses_nothing(grid, N, want):
    assert tile_list(torch.rand(grid.shape(N, 512)) < 0.5, grid, N, 512).tile_cols == want


@pytest.mark.parametrize("tile_cols", [192, 256])
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.1])
@pytest.mark.parametrize("grid", [Grid.block(64, 128), Grid.rows(64), Grid.columns(128), Grid.tensor()], ids=str)
def test_the_reference_reads_it_back(grid, kept, tile_cols):
    x, weight, bias = torch.randn(2, 3, 200), torch.randn(328, 200), torch.randn(328)
    keep = torch.rand(grid.shape(328, 200)) < kept
    tiles = tile_list(keep, grid, 328, 200, tile_cols)
    y = reference(x, weight, bias, *tiles, False)
    torch.testing.assert_close(reference(x, weight.T, bias, *tiles, True), y)
    torch.testing.assert_close(y, F.linear(x, weight * grid.expand(keep, 328, 200), bias))


def test_the_columns_of_a_weight_are_the_rows_of_its_transpose():
    keep = torch.rand(5, 3) < 0.5
    ours = column_tile_list(keep, Grid.block(64, 128), 320, 384)
    want = tile_list(keep.T.contiguous(), Grid.block(128, 64), 384, 320)
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], want[:3])) and ours.tile_cols == want.tile_cols


@pytest.mark.parametrize("by_columns", [False, True])
def test_the_op_is_registered(by_columns):
    grid = Grid.block(64, 64)
    tiles = tile_list(torch.ones(2, 1, dtype=torch.bool), grid, 128, 64)
    weight = torch.randn(64, 128) if by_columns else torch.randn(128, 64)
    args = torch.randn(2, 3, 64), weight, torch.randn(128)
    torch.library.opcheck(torch.ops.sensibert.masked_linear_tiles.default, (*args, *tiles, by_columns))


def test_the_path_gives_the_result_of_the_other_paths(monkeypatch):
    monkeypatch.setattr(paths, "resolve", lambda problem: paths.Choice("tiles", "as if on sm_90"))
    grid = Grid.block(64, 64)
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 128), (192, 128), (192,)))
    keep = bools("x.", ".x", "x.")
    y = masked_linear(x, weight, bias, keep, grid)
    want = F.linear(x, weight * grid.expand(keep, 192, 128), bias)
    torch.testing.assert_close(y, want)
    for ours, theirs in zip(*(torch.autograd.grad(t.square().sum(), (x, weight, bias)) for t in (y, want))):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@needs_hopper("tiles")
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("tile_cols", [192, 256])
@pytest.mark.parametrize("kept", [0.25, 0.8, 1.1])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("M,N,K", [(1, 8, 8), (130, 200, 72), (4096, 3072, 768), (777, 1000, 4096), (16384, 768, 3072)])
def test_the_kernel_computes_the_blocks_of_the_list(M, N, K, by_columns, kept, tile_cols, dtype):
    grid = Grid.block(64, 64)
    x, weight, bias = torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(N)
    x, weight, bias = (t.to("cuda", dtype) for t in (x, weight, bias))
    keep = (torch.rand(grid.shape(N, K)) < kept).cuda()
    tiles = tile_list(keep, grid, N, K, tile_cols)
    dropped = ~grid.expand(keep, N, K)
    exact = F.linear(x.double(), weight.double().masked_fill(dropped, 0), bias.double())
    plain = F.linear(x, weight.masked_fill(dropped, 0), bias)
    poisoned = weight.masked_fill(dropped, float("nan"))
    poisoned = poisoned.T.contiguous() if by_columns else poisoned
    ours = torch.ops.sensibert.masked_linear_tiles(x, poisoned, bias, *tiles, by_columns)
    assert_no_worse(ours, plain, exact, factor=2, label="y")
    assert torch.equal(torch.ops.sensibert.masked_linear_tiles(x, poisoned, bias, *tiles, by_columns), ours)


@pytest.mark.gpu
@needs_hopper("tiles")
def test_the_forced_path_reaches_the_kernel():
    grid = Grid.block(64, 64)
    x, weight = torch.randn(300, 768, device="cuda").bfloat16(), torch.randn(768, 768, device="cuda").bfloat16()
    keep = (torch.rand(12, 12) < 0.5).cuda()
    with paths.force("tiles"), torch.profiler.profile() as profile:
        masked_linear(x, weight, None, keep, grid)
        torch.cuda.synchronize()
    assert any("masked_linear_tiles_kernel" in event.key for event in profile.key_averages())
