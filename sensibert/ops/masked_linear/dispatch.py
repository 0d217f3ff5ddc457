"""The path of a masked matmul: a pure function of the problem that returns the path and the reason.

All paths give the same result up to rounding. They differ in what they multiply:
  dense      W itself; only if nothing is dropped
  compact    the rows and columns that still hold a kept block, gathered into a smaller matrix
  masked     a masked copy of W in the compute dtype; the result (y, dx or dW) has full size
  reference  the formula: a masked copy of W and of x
  tiles      W as stored in memory, empty tiles are not loaded (own kernel, sm_90)
  bits       W as stored in memory, one bit per weight is applied after loading (own kernel, sm_90)
On a GPU the path with the lowest estimated time is chosen. A compact product is smaller, but its result has to be
spread over the full width; for a narrow layer that costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch

from ...core.grid import Grid

PATHS = ("compact", "masked", "bits", "tiles", "dense", "reference")
# Own kernels that `choose` may select, because bench rows show where they are faster. Others need force().
MEASURED: frozenset[str] = frozenset({"tiles", "bits"})
# path -> the op whose CUDA kernel it needs
KERNELS = {"tiles": "sensibert::masked_linear_tiles", "bits": "sensibert::masked_linear_bits"}
TILE = 64  # the k-step and the smallest skipped tile of the kernels
HALF = (torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """y [M, N] = x [M, K] (W [N, K] * keep)^T, and its gradients."""

    num_tokens: int  # M
    num_rows: int  # N
    num_cols: int  # K
    dtype: torch.dtype
    grid: Grid
    density: float  # kept weights / (N * K)
    share: float  # fraction of N * K without empty rows and columns; density <= share <= 1
    architecture: str  # "cpu", or "sm_80", "sm_90", "sm_100", ...
    part: str = "fwd"  # or "dx", "dw"
    row_share: float = 1.0  # fraction of the N rows that are not empty
    ready: bool = False  # a valid compact matrix was given (CompactWeight)


class Choice(NamedTuple):
    path: str
    reason: str


@cache
def built() -> frozenset[str]:
    """The paths whose kernel is in this installation."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(path for path, op in KERNELS.items() if has_kernel(op, "CUDA"))


# Measured on one H200 in bf16 by bench_masked_linear. Only their ratios matter; they are similar on other GPUs.
FLOP_PER_US, BYTES_PER_US, LAUNCH_US = 620e6, 3.4e6, 2.5
TAKE_US = 4.5  # a launch of take_columns, which loads its index first


def estimate(path: str, problem: Problem) -> float:
    """Estimated microseconds on a GPU. For `dense`: those of the plain matmul, even if weights are dropped."""
    M, N, K, size = *problem[:3], problem.dtype.itemsize
    dense = 2 * M * N * K / FLOP_PER_US + LAUNCH_US
    if path == "bits":
        return 1.03 * dense
    if path == "tiles" and problem.part == "dw":  # its partial sums over tokens cost the same at any density
        return (0.17 + 1.1 * problem.density) * dense + 18
    if path == "tiles":  # a product of 64 columns has half the throughput of one of 192
        return (0.5 + 1.05 * problem.density) * dense + LAUNCH_US
    if path == "dense":
        return dense

    def moved(*rows_cols: tuple[float, float]) -> float:
        return LAUNCH_US + size * sum(rows * cols for rows, cols in rows_cols) / BYTES_PER_US

    def taken(full: float, few: float) -> float:
        return TAKE_US + size * M * (full + few) / BYTES_PER_US if few < full else 0.0

    n, k = problem.row_share * N, problem.share / problem.row_share * K if problem.row_share else 0.0
    if problem.part == "dw" and path == "masked":
        return dense + moved((N, K), (N, K), (N, K))
    if problem.part == "dw":
        return problem.share * dense + taken(N, n) + taken(K, k) + LAUNCH_US + moved((N, K), (n, k))
    read, written = ((K, k), (N, n)) if problem.part == "fwd" else ((N, n), (K, k))
    spread = path == "compact"  # the results of the other paths have full size
    share = read[1] / read[0] * (written[1] / written[0] if spread else 1.0)
    total = share * dense + taken(*read) + (taken(*written) if spread else 0.0)
    ready = problem.ready and (spread or problem.share == 1)
    return total + (0.0 if ready else moved((N, K), (n, k), (n, k)))


def choose(problem: Problem, measured: frozenset[str] = MEASURED, built: frozenset[str] = frozenset()) -> Choice:
    """The default path. `measured`: own kernels that may be chosen; `built`: those this installation has."""
    if problem.density == 1:
        return Choice("dense", "nothing is dropped: the plain matmul, with no work for a mask")
    if problem.architecture == "cpu" or problem.share == 0:
        if problem.share < 1:
            return Choice("compact", f"empty rows and columns are left out: {problem.share:.0%} of the work remains")
        return Choice("masked", "no row or column is empty: the plain matmul at full size on a masked copy of W")
    able = {"masked", *measured} | ({"compact"} if problem.share < 1 else set())
    if problem.part == "dw" or problem.share < 1:  # it has no dW kernel, and it reads all columns of x
        able.discard("bits")
    times = {path: estimate(path, problem) for path in PATHS if path in able and refusal(path, problem, built) is None}
    best = min(times, key=times.__getitem__)
    others = ", ".join(f"{path} {time:.0f}" for path, time in times.items() if path != best)
    return Choice(best, f"about {times[best]:.0f} us for {problem.part}" + (f"; {others}" if others else ""))


def refusal(path: str, problem: Problem, built: frozenset[str] = frozenset()) -> str | None:
    """The reason why this path cannot run this problem, or None if it can."""
    if path not in PATHS:
        return f"unknown, want one of {', '.join(PATHS)}"
    if path == "dense" and problem.density < 1:
        return f"multiplies every weight, but {1 - problem.density:.0%} are dropped"
    if path not in ("tiles", "bits"):
        return None
    if path not in built:
        return "needs a kernel that this installation does not have"
    if problem.architecture != "sm_90":
        return f"needs wgmma, which only sm_90 has; this is {problem.architecture}"
    if problem.dtype not in HALF:
        return f"needs bfloat16 or float16; this is {problem.dtype}"
    if problem.num_rows % 8 or problem.num_cols % 8:
        return f"needs sizes that are multiples of 8 (TMA strides); W is ({problem.num_rows}, {problem.num_cols})"
    if path == "tiles" and (problem.grid.block_rows % TILE or problem.grid.block_cols % TILE):
        return f"needs blocks that are multiples of {TILE}; the grid is {problem.grid}"
    return None


_forced: str | None = None


@contextmanager
def force(path: str | None) -> Iterator[None]:
    """A context in which every masked_linear of the process, backward too, takes this path (None: the default).

    For benches and tests. ValueError if the path is unknown, or at the call if it cannot run that problem."""
    global _forced  # not a context variable: autograd runs backward on its own threads
    if path is not None and path not in PATHS:
        raise ValueError(f"force: path is {path!r}, want one of {', '.join(PATHS)}")
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before


def resolve(problem: Problem) -> Choice:
    """choose(), unless force() is in effect; ValueError if the forced path cannot run this problem."""
    if _forced is None:
        return choose(problem, MEASURED, built())
    why_not = refusal(_forced, problem, built())
    if why_not is not None:
        raise ValueError(f"masked_linear: path {_forced!r} was forced, but it {why_not}")
    return Choice(_forced, "forced")


def architecture(device: torch.device) -> str:
    """ "sm_<major><minor>" for a CUDA device, else "cpu"."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
