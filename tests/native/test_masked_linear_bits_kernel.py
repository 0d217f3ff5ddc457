"""The Hopper kernel with W in registers, run on a CPU that plays wgmma, TMA and barriers: fragments, bits, ring, edges.

The fibers of the machine make order visible: forward and backward, one block or more than there are tiles."""

import pytest
import torch

from sensibert.ops.masked_linear.bits import pack
from tests.helpers import assert_no_worse, dtype_id
from tests.native.runner import KernelFailed

CODE = {torch.bfloat16: 1, torch.float16: 2}
SHAPES = [
    pytest.param(1, 8, 8, id="one"),
    pytest.param(300, 200, 72, id="ragged"),
    pytest.param(40, 136, 648, id="longer-than-the-ring"),
]


def run(kernel, x, w, bias, kept, tile_cols=0, by_columns=False, build="plain", pad=0, pad_bits=0, **env):
    """y [M, N] as the kernel writes it into NaN; w, kept [N, K]. Rows of x, w and y lie `pad` elements further apart
    than they need, and those of the bits `pad_bits` bytes."""
    M, K, N = *x.shape, len(w)
    spread = [pad_rows(t, pad) for t in (x, w.T if by_columns else w, x.new_full((M, N), float("nan")))]
    bits = torch.nn.functional.pad(pack(kept), (0, -(-K // 128) * 16 - K // 8 + pad_bits), value=255)
    strides = [spread[0].shape[1], spread[1].shape[1], bits.shape[1], spread[2].shape[1]]
    sizes = torch.tensor([M, N, K, *strides, by_columns, CODE[x.dtype], tile_cols])
    arrays = [sizes, spread[0], spread[1], x.new_empty(0) if bias is None else bias, bits, spread[2]]
    y = kernel("masked_linear_bits", build)(*arrays, **{k: str(v) for k, v in env.items()})[5]
    assert y[:, N:].isnan().all()
    return y[:, :N]


def pad_rows(t, pad):
    return torch.nn.functional.pad(t, (0, pad), value=float("nan")).contiguous()


def make_inputs(M, N, K, dtype=torch.bfloat16, density=0.5):
    x, w, bias = torch.randn(M, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N).to(dtype)
    return x, w, bias, torch.rand(N, K) < density


def check(got, x, w, bias, kept):
    args = x, w.masked_fill(~kept, 0), bias
    exact = torch.nn.functional.linear(*(None if t is None else t.double() for t in args))
    plain = torch.nn.functional.linear(*(None if t is None else t.float() for t in args)).to(x.dtype)
    assert_no_worse(got, plain, exact, factor=2, label="y")


@pytest.mark.parametrize("dtype", CODE, ids=dtype_id)
@pytest.mark.parametrize("tile_cols", [192, 256])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("M,N,K", SHAPES)
def test_values(kernel, M, N, K, by_columns, tile_cols, dtype):
    args = make_inputs(M, N, K, dtype)
    check(run(kernel, *args, tile_cols, by_columns), *args)


@pytest.mark.parametrize("by_columns", [False, True])
def test_every_bit_reaches_its_weight_and_no_other(kernel, by_columns):
    x = torch.eye(136).bfloat16()  # y is (W * keep)^T itself: exact
    w, kept = torch.randn(136, 136).bfloat16(), torch.rand(136, 136) < 0.5
    assert torch.equal(run(kernel, x, w, None, kept, 192, by_columns), w.masked_fill(~kept, 0).T)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.02, 1.1])
def test_densities(kernel, density, by_columns):
    x, w, bias, kept = make_inputs(70, 136, 200, density=density)
    y = run(kernel, x, w, bias, kept, 192, by_columns)
    check(y, x, w, bias, kept)
    assert density or torch.equal(y, bias.expand(70, 136))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("by_columns", [False, True])
def test_poison_under_a_0_bit_stays_there(kernel, by_columns, poison):
    x, w, bias, kept = make_inputs(70, 136, 200)
    want = run(kernel, x, w, bias, kept, 192, by_columns)
    assert torch.equal(run(kernel, x, w.masked_fill(~kept, poison), bias, kept, 192, by_columns), want)


@pytest.mark.parametrize("by_columns", [False, True])
def test_neither_order_nor_strides_nor_blocks_nor_width_change_a_bit(kernel, by_columns):
    args = make_inputs(280, 264, 328)  # the last tiles leave an odd number of boxes to store
    want = run(kernel, *args, 192, by_columns)
    changes = [{"CUDA_ON_CPU_BACKWARD": 1}, {"CUDA_ON_CPU_BLOCKS": 1}, {"pad": 8}, {"pad_bits": 16}, {"tile_cols": 256}]
    for change in changes:
        change = {"tile_cols": 192, "by_columns": by_columns, **change}
        assert torch.equal(run(kernel, *args, **change), want), change


# One block: a round of 256 takes less time than two of 192. Three: a round of either, and 192 takes less.
@pytest.mark.parametrize("M,blocks", [(200, 1), (300, 3)])
def test_the_width_is_chosen_if_none_is_given(kernel, M, blocks):
    args = make_inputs(M, 72, 64)
    check(run(kernel, *args, CUDA_ON_CPU_BLOCKS=blocks), *args)


@pytest.mark.parametrize("build", ["asan", "tsan"])
@pytest.mark.parametrize("by_columns", [False, True])
def test_sanitizers_find_nothing(kernel, build, by_columns):
    args = make_inputs(40, 136, 328)  # two tiles of more steps than the ring has stages
    check(run(kernel, *args, 192, by_columns, build=build, CUDA_ON_CPU_BLOCKS=1), *args)


@pytest.mark.parametrize("change", [{"pad": 4}, {"pad_bits": 8}, {"tile_cols": 128}])
def test_what_it_cannot_run_is_refused(kernel, change):
    with pytest.raises(KernelFailed, match="launch failed with error 1"):
        run(kernel, *make_inputs(8, 64, 64), **change)
