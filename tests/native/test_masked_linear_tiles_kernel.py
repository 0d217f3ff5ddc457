"""The Hopper kernel, run on a CPU that plays wgmma, TMA and barriers: tiles, ring, swizzle, fragments, ragged edges.

The fibers of the machine make order visible: forward and backward, one block or more than there are tiles."""

import pytest
import torch

from sensibert.core.grid import Grid
from sensibert.ops.masked_linear.tiles import tile_list
from tests.helpers import assert_no_worse, dtype_id
from tests.native.runner import KernelFailed

CODE = {torch.bfloat16: 1, torch.float16: 2}
SHAPES = [
    pytest.param(1, 8, 8, id="one"),
    pytest.param(130, 200, 72, id="ragged"),
    pytest.param(64, 448, 640, id="longer-than-the-ring"),
]


def run(kernel, x, w, bias, keep, grid, tile_cols, by_columns=False, build="plain", pad=0, **env):
    """y [M, N] as the kernel writes it into NaN. Rows of x, w and y lie `pad` elements further apart than they need."""
    M, K, N = *x.shape, len(w)
    tiles = tile_list(keep, grid, N, K, tile_cols)
    spread = [pad_rows(t, pad) for t in (x, w.T if by_columns else w, x.new_full((M, N), float("nan")))]
    strides = [t.shape[1] for t in spread]
    sizes = torch.tensor([M, N, K, *strides, by_columns, CODE[x.dtype], tile_cols])
    arrays = [sizes, spread[0], spread[1], x.new_empty(0) if bias is None else bias, spread[2], *tiles[:3]]
    y = kernel("masked_linear_tiles", build)(*arrays, **{k: str(v) for k, v in env.items()})[4]
    assert y[:, N:].isnan().all()
    return y[:, :N]


def pad_rows(t, pad):
    return torch.nn.functional.pad(t, (0, pad), value=float("nan")).contiguous()


def make_inputs(M, N, K, grid, dtype, kept=0.5):
    x, w, bias = torch.randn(M, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N).to(dtype)
    return x, w, bias, torch.rand(grid.shape(N, K)) < kept, grid


def check(got, x, w, bias, keep, grid):
    wide = grid.expand(keep, *w.shape)
    args = x, w.masked_fill(~wide, 0), bias
    exact = torch.nn.functional.linear(*(None if t is None else t.double() for t in args))
    plain = torch.nn.functional.linear(*(None if t is None else t.float() for t in args)).to(x.dtype)
    assert_no_worse(got, plain, exact, factor=2, label="y")


@pytest.mark.parametrize("dtype", CODE, ids=dtype_id)
@pytest.mark.parametrize("tile_cols", [192, 256])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("M,N,K", SHAPES)
def test_values(kernel, M, N, K, by_columns, tile_cols, dtype):
    args = make_inputs(M, N, K, Grid.block(64, 64), dtype, kept=0.8)  # wide and narrow steps
    check(run(kernel, *args, tile_cols, by_columns), *args)


@pytest.mark.parametrize("tile_cols", [192, 256])
@pytest.mark.parametrize("kept", [0.0, 0.3, 1.1])
@pytest.mark.parametrize("grid", [Grid.block(128, 64), Grid.rows(64), Grid.columns(64), Grid.tensor()], ids=str)
def test_grids_and_densities(kernel, grid, kept, tile_cols):
    x, w, _, keep, _ = make_inputs(70, 264, 136, grid, torch.bfloat16, kept)
    check(run(kernel, x, w, None, keep, grid, tile_cols), x, w, None, keep, grid)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("tile_cols", [192, 256])
def test_poison_in_dropped_blocks_stays_there(kernel, tile_cols, by_columns):
    x, w, bias, keep, grid = make_inputs(70, 264, 136, Grid.block(64, 64), torch.bfloat16)
    want = run(kernel, x, w, bias, keep, grid, tile_cols, by_columns)
    w = w.masked_fill(~grid.expand(keep, *w.shape), float("nan"))
    assert torch.equal(run(kernel, x, w, bias, keep, grid, tile_cols, by_columns), want)


@pytest.mark.parametrize("tile_cols", [192, 256])
def test_neither_order_nor_strides_nor_blocks_change_a_bit(kernel, tile_cols):
    args = make_inputs(130, 264, 392, Grid.block(64, 64), torch.bfloat16)  # 264: a tile that ends after one band
    want = run(kernel, *args, tile_cols)
    for change in ({"CUDA_ON_CPU_BACKWARD": 1}, {"CUDA_ON_CPU_BLOCKS": 1}, {"pad": 8}):
        assert torch.equal(run(kernel, *args, tile_cols, **change), want), change


@pytest.mark.parametrize("build", ["asan", "tsan"])
@pytest.mark.parametrize("tile_cols", [192, 256])
def test_sanitizers_find_nothing(kernel, build, tile_cols):
    args = make_inputs(66, 200, 456, Grid.block(64, 64), torch.bfloat16, kept=0.8)
    for by_columns in (False, True):
        check(run(kernel, *args, tile_cols, by_columns, build=build), *args)


@pytest.mark.parametrize("change", [{"pad": 4}, {"tile_cols": 128}])
def test_what_it_cannot_run_is_refused(kernel, change):
    args = make_inputs(8, 64, 64, Grid.block(64, 64), torch.bfloat16)
    with pytest.raises(KernelFailed, match="launch failed with error 1"):
        run(kernel, *args, **{"tile_cols": 192, **change})
