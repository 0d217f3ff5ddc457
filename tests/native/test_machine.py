"""The CPU machine that runs our kernels: right answers, and each kind of mistake is caught."""

import pytest
import torch

from .runner import BUILDS, KernelFailed

ROW_SUM, NO_BARRIER, DIVERGENT, MISALIGNED, OVERRUN, WARP_PASS, NO_SYNCWARP, WORDS, ROUND, NO_GRID = range(10)
BACKWARD = {"CUDA_ON_CPU_BACKWARD": "1"}


@pytest.fixture
def machine(kernel):
    def run(build, what, *arrays, **env):
        return kernel("machine", build)(torch.tensor([what], dtype=torch.int32), *arrays, **env)[1:]

    return run


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("build", BUILDS)
def test_a_row_sum_is_right_and_clean(machine, build, backward):
    rows = torch.randn(5, 301)
    out = machine(
        build, ROW_SUM, rows, torch.full((5,), torch.nan), **({"CUDA_ON_CPU_BACKWARD": "1"} if backward else {})
    )
    torch.testing.assert_close(out[1], rows.double().sum(1).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", [NO_BARRIER, NO_SYNCWARP])
def test_a_missing_barrier_is_a_race(machine, what):
    with pytest.raises(KernelFailed, match="data race"):
        machine("tsan", what, torch.randn(32), torch.zeros(32 if what == NO_SYNCWARP else 1))


@pytest.mark.parametrize("build", BUILDS)
def test_a_warp_may_pass_values_with_syncwarp(machine, build):
    given = torch.randn(32)
    assert torch.equal(machine(build, WARP_PASS, given, torch.zeros(32))[1], given.view(16, 2).flip(1).view(-1))


def test_a_barrier_that_some_threads_miss_is_named(machine):
    with pytest.raises(KernelFailed, match=r"thread 0 waits at __syncthreads number 1[\s\S]*thread 63 has left"):
        machine("plain", DIVERGENT, torch.zeros(64), torch.zeros(64))


@pytest.mark.parametrize("what, message", [(MISALIGNED, "misaligned address"), (OVERRUN, "heap-buffer-overflow")])
def test_a_bad_access_is_caught(machine, what, message):
    with pytest.raises(KernelFailed, match=message):
        machine("asan", what, torch.randn(128), torch.zeros(128))


def test_an_empty_grid_is_refused(machine):
    with pytest.raises(KernelFailed, match="launch failed with error 9"):
        machine("plain", NO_GRID, torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("build", BUILDS)
def test_warp_words_and_atomics(machine, build):
    v = torch.randint(-3, 4, (64,), dtype=torch.int32)
    out = machine(build, WORDS, v, torch.zeros(3 + 6 * 32, dtype=torch.int32))[1].tolist()
    warp = v[:32]
    assert out[:2] == [int(v.sum()), max(0, int(v.max()))]
    assert out[2] & 0xFFFFFFFF == sum(1 << i for i in range(32) if warp[i] > 0)
    scan, same, down, upper, clz, ffs = torch.tensor(out[3:]).view(6, 32)
    assert torch.equal(scan, warp.cumsum(0))
    assert torch.equal(same, (warp[:, None] == warp).sum(1))
    assert torch.equal(down, torch.stack([warp[i + 1 if i % 8 < 7 else i] for i in range(32)]))
    assert torch.equal(upper, torch.tensor([0] * 16 + [int(warp[16:].sum())] * 16))
    unsigned = [int(x) & 0xFFFFFFFF for x in warp]
    assert clz.tolist() == [32 - x.bit_length() for x in unsigned]
    assert ffs.tolist() == [(x & -x).bit_length() for x in unsigned]


def test_16_bit_rounding_is_torchs(machine):
    special = [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 6e-8, 2.9e-8, 1e-40, float("inf"), -float("inf"), 3.4e38]
    v = torch.cat([torch.tensor(special), torch.randn(500), torch.randn(500) * 1e-5, torch.randn(500) * 3e4])
    v = torch.cat([v, torch.arange(4096).mul(0.5).add(1024)])  # ties
    _, bf16, fp16 = machine("plain", ROUND, v, torch.zeros_like(v), torch.zeros_like(v))
    assert torch.equal(bf16, v.bfloat16().float())
    assert torch.equal(fp16, v.half().float())
