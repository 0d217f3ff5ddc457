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


def run(kernel, *args, **named):
    return run_both(kernel, *args, **named)[0]


def run_both(kernel, x, w, bias, keep, grid, tile_cols, by_columns=False, build="plain", pad=0, pre=None, **env):
    """y [M, N] as the kernel writes it into NaN, and pre. Rows of x, w, y and pre lie `pad` elements further apart than
    they need. pre: none; "gelu": of the epilogue with a GELU, into NaN; a tensor: of that with its slope."""
    M, K, N = *x.shape, len(w)
    tiles = tile_list(keep, grid, N, K, tile_cols)
    spread = [pad_rows(t, pad) for t in (x, w.T if by_columns else w, x.new_full((M, N), float("nan")))]
    strides = [t.shape[1] for t in spread]
    epilogue = 0 if pre is None else 1 if isinstance(pre, str) else 2
    if epilogue < 2:
        pre = spread[2].clone() if epilogue else x.new_empty(0)
    else:
        pre = pad_rows(pre, pad)
    sizes = torch.tensor([M, N, K, *strides, by_columns, CODE[x.dtype], tile_cols, epilogue])
    arrays = [sizes, spread[0], spread[1], x.new_empty(0) if bias is None else bias, spread[2], *tiles[:3], pre]
    done = kernel("masked_linear_tiles", build)(*arrays, **{k: str(v) for k, v in env.items()})
    y, pre = done[4], done[8]
    assert y[:, N:].isnan().all() and (not epilogue or pre[:, N:].isnan().all())
    return y[:, :N], pre[:, :N] if epilogue else None


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


@pytest.mark.parametrize("dtype", CODE, ids=dtype_id)
@pytest.mark.parametrize("tile_cols", [192, 256])
@pytest.mark.parametrize("M,N,K", SHAPES[:2])
def test_gelu_and_what_went_into_it(kernel, M, N, K, tile_cols, dtype):
    args = make_inputs(M, N, K, Grid.block(64, 64), dtype, kept=0.8)
    y, pre = run_both(kernel, *args, tile_cols, pre="gelu")
    check(pre, *args)
    gelu = torch.nn.functional.gelu
    assert_no_worse(y, gelu(pre.float()).to(dtype), gelu(pre.double()), factor=2, label="gelu")


@pytest.mark.parametrize("dtype", CODE, ids=dtype_id)
@pytest.mark.parametrize("tile_cols", [192, 256])
@pytest.mark.parametrize("M,N,K", SHAPES[:2])
def test_the_slope_of_gelu(kernel, M, N, K, tile_cols, dtype):
    x, w, _, keep, grid = make_inputs(M, N, K, Grid.block(64, 64), dtype, kept=0.8)
    pre = (2 * torch.randn(M, N)).to(dtype)
    dropped = w.masked_fill(~grid.expand(keep, *w.shape), 0)
    slope = torch.ops.aten.gelu_backward
    exact = slope(x.double() @ dropped.double().T, pre.double())
    plain = slope((x.float() @ dropped.float().T).to(dtype), pre)
    got = run(kernel, x, w, None, keep, grid, tile_cols, by_columns=True, pre=pre, pad=8)
    assert_no_worse(got, plain, exact, factor=2, label="dgelu")


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
    both = run_both(kernel, *args, tile_cols, pre="gelu")
    assert torch.equal(both[1], want)
    for change in ({"CUDA_ON_CPU_BACKWARD": 1}, {"CUDA_ON_CPU_BLOCKS": 1}, {"pad": 8}):
        assert torch.equal(run(kernel, *args, tile_cols, **change), want), change
        got = run_both(kernel, *args, tile_cols, pre="gelu", **change)
        assert torch.equal(got[0], both[0]) and torch.equal(got[1], want), change


@pytest.mark.parametrize("build", ["asan", "tsan"])
@pytest.mark.parametrize("tile_cols", [192, 256])
def test_sanitizers_have_nothing_to_say(kernel, build, tile_cols):
    args = make_inputs(66, 200, 456, Grid.block(64, 64), torch.bfloat16, kept=0.8)
    y, pre = run_both(kernel, *args, tile_cols, build=build, pre="gelu")
    check(pre, *args)
    run(kernel, *args, tile_cols, by_columns=True, build=build, pre=y)


@pytest.mark.parametrize("change", [{"pad": 4}, {"tile_cols": 128}, {"pre": "gelu", "by_columns": True}])
def test_what_it_cannot_run_is_refused(kernel, change):
    args = make_inputs(8, 64, 64, Grid.block(64, 64), torch.bfloat16)
    with pytest.raises(KernelFailed, match="launch failed with error 1"):
        run(kernel, *args, **{"tile_cols": 192, **change})
