"""The masked matmul on the layers of BERT, each pass, by grid and density: against dense and against the ideal.

    python -m pytest bench/bench_masked_linear.py --benchmark-only -o python_files='bench_*.py' [-k '16384 and step']
    python bench/_rows.py                    then keeps medians over layers and numbers of tokens

Rivals: the dense matmul (what there is today), the matmul on a weight masked beforehand (cuBLAS at its best; not the
mask, not the gather), F.linear(x, W * M) (what torch.nn.utils.prune does), compiled too on a GPU, 2:4 of torch where it
runs, and the ideal: a layer compacted beforehand, or for scattered blocks the dense time times the kept share.
`following` is the same layer after a step of an optimizer that follows it: the compact weight is there already.
On a GPU the times are those of the GPU alone (replayed graphs), the usual numbers of tokens first: stopped early, the
table lacks its tail. On a CPU: fewer cases, fp32.
"""

from __future__ import annotations

import statistics
from functools import partial

import _harness
import pytest
import torch
import torch.nn.functional as F
from _harness import DEVICE, captured_us, host_us, record

from sensibert.core.grid import Grid
from sensibert.ops import gather_kept
from sensibert.ops.masked_linear.dispatch import built
from sensibert.ops.masked_linear.kept_index import CompactWeight, kept_index
from sensibert.ops.masked_linear.op import force, masked_linear

BENCH = "bench_masked_linear"
ON_GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SIZES = {"bert-base": (768, 3072), "bert-large": (1024, 4096)}
MODELS = list(SIZES) if ON_GPU else ["bert-base"]
LAYERS = {"attention": (0, 0), "up": (1, 0), "down": (0, 1)}  # (N, K) as positions in SIZES
TOKENS = [16384, 4096, 32768, 8192] if ON_GPU else [512]
DENSITIES = [1.0, 0.75, 0.5, 0.25, 0.1] if ON_GPU else [1.0, 0.5, 0.25]
GRIDS = [Grid.row(), Grid.column(), Grid.rows(64), Grid.columns(64), Grid.element(), Grid.block(64, 64)]
PASSES = ["step", "fwd", "dX", "dW"] if ON_GPU else ["step", "fwd"]
if not ON_GPU:
    GRIDS, LAYERS = [GRIDS[0], GRIDS[1], GRIDS[4], GRIDS[5]], {name: LAYERS[name] for name in ("up", "down")}


def keep_of(grid: Grid, N: int, K: int, density: float) -> torch.Tensor:
    """A keep mask with exactly this fraction of blocks, at random positions."""
    shape = grid.shape(N, K)
    count = shape[0] * shape[1]
    ranks = torch.rand(count, device=DEVICE).argsort().argsort()
    return (ranks < round(density * count)).view(shape)


def linear(x, w, b):
    return F.linear(x, w, b)


def naive(x, w, b, mask):
    return F.linear(x, w * mask, b)


def run(function, part, x, w, b, dy, *rest):
    """One pass of y = function(x, w, b, *rest): forward alone, a gradient alone, or all of it."""
    if part == "fwd":
        return function(x, w, b, *rest)
    x, w, b = x.requires_grad_(part != "dW"), w.requires_grad_(part != "dX"), b.requires_grad_(part == "step")
    y = function(x, w, b, *rest)
    return torch.autograd.grad(y, [t for t in (x, w, b) if t.requires_grad], dy)


def inputs(M, N, K):
    x, w, b, dy = (torch.randn(shape, device=DEVICE).to(DTYPE) for shape in ((M, K), (N, K), (N,), (M, N)))
    return x, w.mul_(K**-0.5), b, dy


def alone(part, x, w, b, dy, keep, grid, compact=None):
    """The pass of the ops, without autograd around a single gradient."""
    blocks = (grid.block_rows, grid.block_cols)
    if part == "dX":
        return torch.ops.sensibert.masked_linear_dx(dy, w, keep, *blocks, *(compact[:2] if compact else ()))
    if part == "dW":
        return torch.ops.sensibert.masked_linear_dweight(dy, x, keep, *blocks)
    return run(masked_linear, part, x, w, b, dy, keep, grid, compact)


def plain(part, x, w, b, dy):
    """The same pass of a dense layer."""
    if part == "dX":
        return dy @ w
    if part == "dW":
        return dy.T @ x
    return run(linear, part, x, w, b, dy)


def compacted(x, w, b, dy, kept):
    """The layer and its data without empty rows and columns."""
    rows = torch.arange(len(w), device=DEVICE) if kept.rows is None else kept.rows
    cols = torch.arange(w.shape[1], device=DEVICE) if kept.cols is None else kept.cols
    return x[:, cols], w[rows][:, cols], b[rows], dy[:, rows]


@pytest.mark.parametrize("part", PASSES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("model, tokens", [(model, tokens) for tokens in TOKENS for model in MODELS])
def test_layer(model, layer, tokens, grid, density, part, benchmark):
    M, N, K = tokens, SIZES[model][LAYERS[layer][0]], SIZES[model][LAYERS[layer][1]]
    num_bytes = DTYPE.itemsize * (M * K + N * K + 2 * M * N)
    data = [inputs(M, N, K) for _ in range(max(2, 160_000_000 // num_bytes) if ON_GPU else 1)]
    keep = keep_of(grid, N, K, density)
    kept, mask = kept_index(keep, grid, N, K), grid.expand(keep, N, K)

    x, w, b, dy = data[0]
    own = {Grid.block(64, 64): "tiles", Grid.element(): "bits"}.get(grid)
    own = own if own in built() and density < 1 else None
    want = run(naive, "step", x.double(), w.double(), b.double(), dy.double(), mask.double())
    for path in (None, own) if own else (None,):
        with force(path):
            for got, exact in zip(run(masked_linear, "step", x, w, b, dy, keep, grid), want):
                assert (got - exact).abs().max() <= 2e-2 * exact.abs().max(), path  # no number on red
    del want, exact, got
    data = [tuple(t.detach() for t in row) for row in data]

    dense, masked = partial(plain, part), [(x, w.masked_fill(~mask, 0), b, dy) for x, w, b, dy in data]
    calls = {
        "ours": (partial(alone, part), [(*row, keep, grid) for row in data]),
        "dense": (dense, data),
        "masked beforehand": (dense, masked),
    }
    if density < 1 and part != "dW":  # as after a step of an optimizer that follows the layer
        following = [(*row, keep, grid, compact_of(row[1], keep, kept)) for row in data]
        calls["following"] = (partial(alone, part), following)
    if kept.share < 1 and kept.bits is None:
        calls["ideal"] = (dense, [compacted(*row, kept) for row in data])
    if part in ("fwd", "step"):
        typed = [(*row, mask.to(DTYPE)) for row in data]
        calls["F.linear(x, W*M)"] = (partial(run, naive, part), typed)
        if ON_GPU and density == 0.5 and grid == Grid.element() and tokens == TOKENS[0]:
            calls["F.linear(x, W*M) compiled"] = (partial(run, torch.compile(naive), part), typed)
    if ON_GPU and part == "fwd" and density == 0.5 and (sparse := semi_structured(data)):
        calls["2:4 of torch"] = (linear, sparse)
    if own and (own, part) != ("bits", "dW"):  # bits has no dW of its own
        calls[own] = (partial(forced, own, part), calls["ours"][1])
    times = captured_us(calls, least_us=300) if ON_GPU else alternate(calls)
    benchmark.pedantic(calls["ours"][0], args=calls["ours"][1][0], rounds=1)
    if density == 1:
        times["ideal"] = times["dense"]
    elif "ideal" not in times:
        times["ideal"] = times["masked beforehand"] if grid == Grid.element() else times["dense"] * density
    ours, followed, forced_own = (times.pop(name, None) for name in ("ours", "following", own))

    case = f"{grid}:{density:g} {model}.{layer} {tokens} {part}"
    for name, value in times.items():
        record(BENCH, f"default {case}", "us", ours, "us", name, value)
    record(BENCH, f"default {case}", "vs_dense", times["dense"] / ours, "1")
    record(BENCH, f"default {case}", "vs_ideal", times["ideal"] / ours, "1")
    if ON_GPU and part == "fwd" and tokens == 4096 and density == 0.5:  # what a graph or a long queue hides
        spent = {name: host_us(calls[name][0], calls[name][1][0], calls=50) for name in ("ours", "dense")}
        record(BENCH, f"default {case}", "host_us", spent["ours"], "us", "dense", spent["dense"])
    if followed is not None:
        record(BENCH, f"following {case}", "us", followed, "us", "default", ours)
        for name in ("dense", "ideal"):
            record(BENCH, f"following {case}", f"vs_{name}", times[name] / followed, "1")
    if forced_own is not None:
        for name in ("dense", "masked beforehand"):
            record(BENCH, f"{own} {case}", "us", forced_own, "us", name, times[name])
        record(BENCH, f"{own} {case}", "vs_dense", times["dense"] / forced_own, "1")


def alternate(calls: dict) -> dict[str, float]:
    """Median microseconds of each (function, rotation), called in turn: a drift of the machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-3, 9):
        for name, (function, rotation) in calls.items():
            elapsed_us = _harness._one(function, rotation[turn % len(rotation)])
            if turn >= 0:  # the first turns compile, allocate, and warm up
                times[name].append(elapsed_us)
    return {name: statistics.median(values) for name, values in times.items()}


def forced(path: str, *arguments):
    with force(path):
        return alone(*arguments)


def compact_of(w, keep, kept) -> CompactWeight:
    (matrix,) = gather_kept([w], [kept.rows], [kept.cols], [kept.bits])
    return CompactWeight(matrix, torch.tensor([w._version, keep._version]), w, keep)


def semi_structured(data) -> list[tuple] | None:
    """The arguments of F.linear with torch's 2:4 sparse weight; None where this torch or GPU has none."""
    try:
        pattern = torch.tensor([1, 1, 0, 0], device=DEVICE, dtype=DTYPE)
        sparse = [
            (x, torch.sparse.to_sparse_semi_structured(w * pattern.repeat(w.shape[1] // 4)), b) for x, w, b, _ in data
        ]
        linear(*sparse[0])
        return sparse
    except (RuntimeError, ValueError, NotImplementedError, AttributeError):
        return None
