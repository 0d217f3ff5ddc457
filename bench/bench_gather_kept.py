"""The kept rows and columns of all layers in one launch, as at a mask change: against a loop over the layers.

python -m pytest bench/bench_gather_kept.py --benchmark-only -o python_files='bench_*.py'

Half of the heads and neurons of every layer are kept; fp32 weights become bf16 matrices. On a CPU: two layers.
"""

from __future__ import annotations

import pytest
import torch
from _harness import DEVICE, copy_us, host_us, measure, record, timed
from problems import MODELS, bert, random_like

from sensibert.ops import gather_kept
from sensibert.ops.masked_linear.kept_index import kept_index

BENCH = "bench_gather_kept"
SCALED = {"bert-base": bert(768, 2, 3072), "bert-large": bert(1024, 2, 4096)}
CASES = MODELS if DEVICE == "cuda" else {f"{name} 2 layers": SCALED[name] for name in MODELS}


def one_by_one(weights, rows, cols, out):
    for weight, r, c, o in zip(weights, rows, cols, out):
        weight = weight if r is None else weight.index_select(0, r)
        o.copy_(weight if c is None else weight.index_select(1, c))


@pytest.mark.parametrize("case", CASES)
def test_a_mask_change(case, benchmark):
    chosen = [p for p in CASES[case] if p.name.startswith("layer.") and len(p.shape) == 2]
    weights = random_like(chosen, DEVICE)  # many times L2
    kept = [kept_index(torch.rand(p.grid.shape(*p.shape), device=DEVICE) < 0.5, p.grid, *p.shape) for p in chosen]
    rows, cols = [k.rows for k in kept], [k.cols for k in kept]
    out = gather_kept(weights, rows, cols, dtype=torch.bfloat16)
    want = [torch.full_like(o, torch.nan) for o in out]
    one_by_one(weights, rows, cols, want)
    assert all(torch.equal(a, b) for a, b in zip(out, want))  # no number on red

    ours = timed(benchmark, lambda: gather_kept(weights, rows, cols, out=out), [()]).median
    loop = measure(one_by_one, [(weights, rows, cols, want)]).median
    record(BENCH, case, "us", ours, "us", "index_select and cast, layer by layer", loop)
    copy = copy_us(6 * sum(o.numel() for o in out))
    record(BENCH, case, "copy_share", copy / ours, "1", "copy of the same bytes", 1.0)
    if DEVICE == "cuda":
        record(BENCH, case, "host_us", host_us(lambda: gather_kept(weights, rows, cols, out=out), (), calls=20), "us")
