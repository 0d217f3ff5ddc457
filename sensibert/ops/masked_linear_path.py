"""Which way a masked matmul is computed: a pure function of the problem, every answer with its reason.

All paths give the same result up to rounding. They differ in what is multiplied:
  dense      W itself; only where nothing is dropped
  compact    the rows and columns that still hold a kept block, gathered into a smaller matrix
  shadow     a masked copy of W in the compute dtype, at full size, where no row or column is empty
  reference  the formula: a masked copy of W and of x
  tiles      W as it lies in memory, empty tiles never loaded (own kernel, sm_90)
  bits       W as it lies in memory, one bit a weight applied on the way (own kernel, sm_90)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch

from ..artifacts import Grid

PATHS = ("compact", "shadow", "bits", "tiles", "dense", "reference")
# Kernels of our own become a default only when a bench row on that card shows that they win; until then: force().
MEASURED: frozenset[str] = frozenset()
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
    share: float  # what is left of N * K once empty rows and columns are gone; density <= share <= 1
    architecture: str  # "cpu", or "sm_80", "sm_90", "sm_100", ...


class Choice(NamedTuple):
    path: str
    reason: str


@cache
def built() -> frozenset[str]:
    """The paths whose kernel this installation has."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(path for path, op in KERNELS.items() if has_kernel(op, "CUDA"))


def choose(problem: Problem, measured: frozenset[str] = MEASURED, built: frozenset[str] = frozenset()) -> Choice:
    """The default path. `measured`: own kernels that have proved to win; `built`: those this installation has."""
    own = [path for path in ("tiles", "bits") if path in measured and refusal(path, problem, built) is None]
    if problem.density == 1:
        return Choice("dense", "nothing is dropped: the plain matmul, with no work for a mask")
    if "tiles" in own and problem.density < problem.share:
        return Choice("tiles", f"{1 - problem.density:.0%} of W are empty tiles: neither loaded nor multiplied")
    if problem.share < 1:
        return Choice("compact", f"empty rows and columns are left out: {problem.share:.0%} of the work remains")
    if "bits" in own:
        return Choice("bits", "no row or column is empty: one bit a weight on the way, no masked copy in memory")
    return Choice("shadow", "no row or column is empty: the plain matmul at full size on a masked copy of W")


def refusal(path: str, problem: Problem, built: frozenset[str] = frozenset()) -> str | None:
    """Why this path cannot run this problem; None if it can."""
    if path not in PATHS:
        return f"unknown, want one of {', '.join(PATHS)}"
    if path == "dense" and problem.density < 1:
        return f"multiplies every weight, but {1 - problem.density:.0%} are dropped"
    if path == "shadow" and problem.share < 1:
        return f"is for weights without empty rows or columns; here they leave {problem.share:.0%}: compact"
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
    """Within the block every masked_linear of the process, backward too, takes this path (None: the default).

    For benches and tests. ValueError if the path is unknown, or at the call if it cannot run that problem."""
    global _forced  # not a context variable: autograd runs backward on threads of its own
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
    """ "cpu" for everything without CUDA cores of its own, else "sm_<major><minor>"."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
