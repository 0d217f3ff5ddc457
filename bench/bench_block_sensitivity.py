"""All sensitivities of BERT in one call, against a loop over the tensors, torch._foreach, torch.compile and a copy.

python -m pytest bench/bench_block_sensitivity.py --benchmark-only -o python_files='bench_*.py'
"""

from __future__ import annotations

import pytest
import torch
from _harness import DEVICE, copy_us, host_us, measure, record, timed
from problems import MODELS, random_like

from sensibert.ops import block_sensitivity

BENCH = "bench_block_sensitivity"


def block_sums(x, grid):
    """[N, K] -> one sum a block, where the grid divides the tensor: what a user writes in torch."""
    x = x.reshape(len(x), -1)
    rows, cols = grid.block_size(*x.shape)
    return x.view(len(x) // rows, rows, -1, cols).sum((1, 3))


def eager_loop(weights, grads, grids, out):
    for w, g, grid, total in zip(weights, grads, grids, out):
        total += block_sums(w * g, grid).square()


def foreach(weights, grads, grids, out):
    products = torch._foreach_mul(weights, grads)
    torch._foreach_add_(out, torch._foreach_pow([block_sums(x, grid) for x, grid in zip(products, grids)], 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32] if DEVICE == "cuda" else [torch.float32], ids=str)
@pytest.mark.parametrize("model", list(reversed(MODELS)) if DEVICE == "cuda" else ["bert-base"])
@torch.no_grad()
def test_fisher_of_every_tensor(model, dtype, benchmark):
    parameters = MODELS[model]
    grids = [p.grid for p in parameters]
    weights = random_like(parameters, DEVICE, dtype)
    grads = random_like(parameters, DEVICE, dtype, seed=1)
    out = block_sensitivity(weights, grads, grids, "signed", "square")
    want = [torch.zeros_like(o, dtype=torch.float64) for o in out]
    eager_loop([w.double() for w in weights], [g.double() for g in grads], grids, want)
    for mine, exact in zip(out, want):
        torch.testing.assert_close(mine.double(), exact, rtol=2e-3, atol=float(exact.mean()) * 1e-3)

    case = model if dtype == torch.float32 else f"{model} bf16"
    arguments = (weights, grads, grids, out)

    def call(weights, grads, grids, out):
        return block_sensitivity(weights, grads, grids, "signed", "square", out)

    ours = timed(benchmark, call, [arguments])  # the model itself is many times L2
    record(BENCH, case, "us", ours.median, "us", "eager loop", measure(eager_loop, [arguments]).median)
    record(BENCH, case, "us", ours.median, "us", "torch._foreach", measure(foreach, [arguments]).median)
    moved = sum(t.numel() * t.element_size() for t in [*weights, *grads]) + 2 * sum(4 * o.numel() for o in out)
    copy = copy_us(moved)
    record(BENCH, case, "copy_share", copy / ours.median, "1", "copy of the same bytes", 1.0)
    if DEVICE == "cuda":
        record(BENCH, case, "host_us", host_us(call, arguments), "us")
    if DEVICE == "cuda" and case == "bert-base":  # a minute of compilation, so once and last
        compiled = measure(torch.compile(eager_loop), [arguments])
        record(BENCH, case, "us", ours.median, "us", "torch.compile", compiled.median)
