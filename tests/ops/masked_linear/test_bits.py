"""The bits say exactly what is kept; the reference reads them back; the path "bits" of masked_linear gives what the
others give."""

import sys

import pytest
import torch
import torch.nn.functional as F

from sensibert.core.grid import Grid
from sensibert.ops import masked_linear
from sensibert.ops.masked_linear import dispatch as paths
from sensibert.ops.masked_linear.bits import column_bits, pack, reference, row_bits, unpack
from tests.helpers import assert_no_worse, dtype_id, needs_hopper


def test_bits_by_hand():
    kept = torch.zeros(2, 11, dtype=torch.bool)
    kept[0, 0] = kept[0, 9] = kept[1, 7] = kept[1, 8] = True
    assert pack(kept).tolist() == [[1, 2], [128, 1]]


@pytest.mark.parametrize("K", [1, 8, 72, 128, 136, 768])
def test_rows_start_where_the_kernel_can_copy_them_and_come_back(K):
    kept = torch.rand(5, K) < 0.5
    bits = pack(kept)
    assert bits.shape == (5, -(-K // 8)) and bits.dtype == torch.uint8
    assert bits.stride(1) == 1 and bits.stride(0) % 16 == 0
    assert torch.equal(unpack(bits, K), kept)


@pytest.mark.parametrize("grid", [Grid.element(), Grid.block(3, 5), Grid.rows(8), Grid.columns(16)], ids=str)
def test_a_grid_becomes_bits_of_the_weight_and_of_its_transpose(grid):
    keep = torch.rand(grid.shape(24, 40)) < 0.5
    wide = grid.expand(keep, 24, 40)
    assert torch.equal(unpack(row_bits(keep, grid, 24, 40), 40), wide)
    assert torch.equal(unpack(column_bits(keep, grid, 24, 40), 24), wide.T)


def test_the_reference_reads_the_bits_and_drops_nan():
    x, weight, bias, kept = torch.randn(2, 3, 40), torch.randn(24, 40), torch.randn(24), torch.rand(24, 40) < 0.5
    want = F.linear(x, weight * kept, bias)
    weight = weight.masked_fill(~kept, float("nan"))
    assert torch.equal(reference(x, weight, bias, pack(kept), False), want)
    torch.testing.assert_close(reference(x, weight.T, bias, pack(kept), True), want)


@pytest.mark.parametrize("by_columns", [False, True])
def test_the_op_is_registered(by_columns):
    weight, bits = torch.randn(24, 40), pack(torch.rand(24, 40) < 0.5)
    args = torch.randn(2, 3, 40), weight.T.contiguous() if by_columns else weight, torch.randn(24), bits, by_columns
    torch.library.opcheck(torch.ops.sensibert.masked_linear_bits.default, args)


@pytest.fixture
def as_on_hopper(monkeypatch):
    monkeypatch.setattr(paths, "resolve", lambda problem: paths.Choice("bits", "as if on sm_90"))


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("grid", [Grid.element(), Grid.block(3, 5), Grid.row(), Grid.columns(8)], ids=str)
def test_the_path_gives_the_result_of_the_other_paths(as_on_hopper, grid):
    x, weight, bias = double(2, 5, 40), double(24, 40), double(24)
    keep = torch.rand(grid.shape(24, 40)) < 0.5
    y, want = masked_linear(x, weight, bias, keep, grid), F.linear(x, weight * grid.expand(keep, 24, 40), bias)
    torch.testing.assert_close(y, want)
    for ours, theirs in zip(*(torch.autograd.grad(t.square().sum(), (x, weight, bias)) for t in (y, want))):
        torch.testing.assert_close(ours, theirs)


def test_nothing_dropped_is_read(as_on_hopper):
    x, weight = double(3, 16), double(8, 16)
    keep = torch.rand(8, 16) < 0.5
    keep[:, 3] = keep[5] = False
    with torch.no_grad():
        x[:, 3] = float("nan")
        weight[~keep] = float("nan")
    y = masked_linear(x, weight, None, keep, Grid.element())
    dy = torch.randn_like(y)
    dy[:, 5] = float("nan")  # a dropped row of W: its dy meets nothing
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    assert y.isfinite().all() and dx.isfinite().all() and dweight.isfinite().all()


def test_bits_are_made_once_per_value_of_keep(as_on_hopper, monkeypatch):
    made = []
    monkeypatch.setattr(sys.modules[row_bits.__module__], "pack", lambda kept: made.append(kept.shape) or pack(kept))
    x, weight, keep = double(3, 16), double(8, 16), torch.rand(8, 16) < 0.5
    for _ in range(2):
        masked_linear(x, weight, None, keep, Grid.element()).sum().backward()
    assert made == [(8, 16), (16, 8)]
    keep.logical_not_()
    y = masked_linear(x, weight, None, keep, Grid.element())
    assert made[2:] == [(8, 16)]
    torch.testing.assert_close(y, F.linear(x, weight * keep))


@pytest.mark.gpu
@needs_hopper("bits")
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.1])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("M,N,K", [(1, 8, 8), (130, 200, 72), (4096, 3072, 768), (777, 1000, 4096), (16384, 768, 3072)])
def test_the_kernel_computes_what_the_bits_say(M, N, K, by_columns, density, dtype):
    x, weight, bias = torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(N)
    x, weight, bias = (t.to("cuda", dtype) for t in (x, weight, bias))
    kept = (torch.rand(N, K) < density).cuda()
    exact = F.linear(x.double(), weight.double().masked_fill(~kept, 0), bias.double())
    plain = F.linear(x, weight.masked_fill(~kept, 0), bias)
    poisoned = weight.masked_fill(~kept, float("nan"))
    poisoned = poisoned.T.contiguous() if by_columns else poisoned
    ours = torch.ops.sensibert.masked_linear_bits(x, poisoned, bias, pack(kept), by_columns)
    assert_no_worse(ours, plain, exact, factor=2, label="y")
    assert torch.equal(torch.ops.sensibert.masked_linear_bits(x, poisoned, bias, pack(kept), by_columns), ours)


@pytest.mark.gpu
@needs_hopper("bits")
def test_the_forced_path_reaches_the_kernel_both_ways():
    x, weight = (torch.randn(n, 768, device="cuda").bfloat16().requires_grad_() for n in (300, 768))
    keep = (torch.rand(768, 768) < 0.5).cuda()
    with paths.force("bits"), torch.profiler.profile() as profile:
        masked_linear(x, weight, None, keep, Grid.element()).sum().backward()
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if "masked_linear_bits_kernel" in event.key) == 2
