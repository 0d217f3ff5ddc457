"""The CUDA source of select_threshold, run on the CPU: bit for bit the reference, on every path it can take."""

import math

import pytest
import torch

from sensibert.ops.select_threshold import select_threshold
from tests.helpers import DTYPES, dtype_id
from tests.native.runner import BUILDS, KernelFailed

CHUNK = 16384
SMALL = [(3, 9), (5, 1), (0, 4), (2, 0), (16, 8), (1, 65)]


def run(kernel, build, scores, k, skip=0, **env):
    """keep, threshold, num_nan as the kernel writes them into poisoned memory."""
    code = {dtype: i for i, dtype in enumerate(DTYPES)}
    shapes = torch.tensor([[s.numel(), code[s.dtype]] for s in scores], dtype=torch.int64).reshape(-1, 2)
    arrays = [torch.tensor([k, skip]), shapes, torch.full((1,), 77.0), torch.full((1,), 77)]
    for s in scores:
        arrays += [torch.cat([s.new_full((skip,), 9.0), s.flatten()]), torch.full(s.shape, 255, dtype=torch.uint8)]
    out = kernel("select_threshold", build)(*arrays, **{key: str(value) for key, value in env.items()})
    return out[5::2], out[2][0], out[3][0]


def assert_same(kernel, build, scores, k, **more):
    keep, threshold, num_nan = run(kernel, build, scores, k, **more)
    want = select_threshold(scores, k)
    for t, m in enumerate(want.keep):
        assert torch.equal(keep[t], m.to(torch.uint8)), f"keep[{t}]: {int((keep[t] != m).sum())} wrong"
    assert threshold == want.threshold or threshold.isnan() and want.threshold.isnan()
    assert math.copysign(1, threshold) == math.copysign(1, want.threshold) or threshold.isnan()
    assert num_nan == want.num_nan


def awkward(shapes, dtype=torch.float32):
    """Quarters, so that many tie, and every value that a comparison might get wrong."""
    values = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, 5.9e-8, -5.9e-8]
    scores = [(torch.randn(shape) * 4).round().div(4) for shape in shapes]
    for s in scores:
        spots = torch.rand(s.shape) < 0.2
        s[spots] = torch.tensor(values)[torch.randint(len(values), (int(spots.sum()),))]
    return [s.to(dtype) for s in scores]


@pytest.mark.parametrize("build", BUILDS)
def test_small_lists_of_mixed_dtypes(kernel, build):
    scores = [s.to(DTYPES[i % 3]) for i, s in enumerate(awkward(SMALL))]
    total = sum(s.numel() for s in scores)
    for k in range(0, total + 1, total // 2) if build != "plain" else (0, 1, 40, 90, 150, total - 1, total):
        assert_same(kernel, build, scores, k)


@pytest.mark.parametrize("build, blocks", [("plain", 1), ("plain", 2), ("plain", 7), ("asan", 2), ("tsan", 2)])
def test_many_chunks_and_any_number_of_blocks_give_the_same_bits(kernel, build, blocks):
    scores = [torch.randn(3, CHUNK).exp(), torch.randn(70, 129), torch.randn(1, CHUNK + 5).bfloat16()]
    for k in (100, sum(s.numel() for s in scores) // 3):
        assert_same(kernel, build, scores, k, CUDA_ON_CPU_BLOCKS=blocks)


def test_minus_zero_ties_with_zero_in_every_dtype(kernel):
    scores = [torch.tensor([[-0.0, 0.0, -0.0, 1.0, -1.0, 0.0]], dtype=dtype) for dtype in DTYPES]
    for k in (4, 5, 7, 10, 14):
        assert_same(kernel, "plain", scores, k)


def test_blocks_and_threads_in_the_reverse_order_give_the_same_bits(kernel):
    scores = awkward([(40, 1000), (7, 11)])
    assert_same(kernel, "plain", scores, 9999, CUDA_ON_CPU_BACKWARD=1)


def crowd(values):
    """Three chunks, one a block: the values stand in the first, below them nearly all, above them a few hundred."""
    scores = torch.rand(3, CHUNK) * 0.6 + 0.001
    scores[0, 100 : 100 + len(values)] = values
    scores[:, -200:] = 2
    return scores


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    "name, scores",
    [
        ("constant: no bin fits the list", [torch.full((4, CHUNK), 2.5)]),
        ("half zeros, the cut among them", [torch.randn(4, CHUNK).relu()]),
        ("one narrow bin", [1 + torch.rand(4, CHUNK) * 1e-3]),
        ("sorted: one block holds the whole bin", [torch.linspace(-1, 9, 8 * CHUNK).view(8, -1)]),
        ("crowd: the list of its block overflows", [crowd(1.025 + torch.rand(4000) * 0.0125)]),
        ("crowd of equals", [crowd(torch.ones(4000))]),
        ("all NaN", [torch.full((2, CHUNK), math.nan)]),
    ],
    ids=lambda v: v.split(":")[0].replace(" ", "-") if isinstance(v, str) else "",
)
def test_scores_that_defeat_the_list_are_still_exact(kernel, build, name, scores):
    total = scores[0].numel()
    for k in (2600 if name.startswith("crowd") else round(0.7 * total), 1, total)[: 3 if build == "plain" else 1]:
        assert_same(kernel, build, scores, k)


def test_a_misleading_sample_changes_no_bit(kernel):
    # Tensors far shorter than a stratum: the hash finds few of them, and the largest sit where it does not look.
    scores = [torch.randn(1, 3) + i % 7 for i in range(900)]
    for k in (1, 500, 2699):
        assert_same(kernel, "plain", scores, k)


@pytest.mark.parametrize("skip", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_scores_that_start_at_an_odd_address(kernel, dtype, skip):  # UBSan names a misaligned quad
    assert_same(kernel, "asan", awkward([(9, 31), (4, 64)], dtype), 200, skip=skip)


def test_more_tensors_than_one_launch_carries(kernel):
    assert_same(kernel, "asan", [torch.randn(2, 3) for _ in range(401)] + [torch.empty(0, 3)] * 9, 1200)


def test_nothing_at_all(kernel):
    keep, threshold, num_nan = run(kernel, "asan", [], 0)
    assert keep == [] and threshold == math.inf and num_nan == 0
    assert_same(kernel, "asan", [torch.empty(0, 7)], 0)


@pytest.mark.parametrize("k", [-1, 28])
def test_a_k_out_of_range_is_refused(kernel, k):
    with pytest.raises(KernelFailed, match="launch failed with error 1"):
        run(kernel, "plain", [torch.zeros(3, 9)], k)
