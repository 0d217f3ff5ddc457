"""The k-th largest of all scores of BERT's encoder, and the masks: against kthvalue, topk, sort and a copy.

python -m pytest bench/bench_select_threshold.py --benchmark-only -o python_files='bench_*.py'

The rivals get the scores as one flat tensor, for free, and need not write masks. On a CPU: one layer of twelve, 7 M
scores, and the case says so.
"""

from __future__ import annotations

import pytest
import torch
from _harness import DEVICE, copy_us, host_us, measure, record, timed
from problems import encoder, random_like

from sensibert.ops import select_threshold

BENCH = "bench_select_threshold"
SIZE, LAYERS = ("85M", 12) if DEVICE == "cuda" else ("7M", 1)  # of BERT-base
KINDS = {
    "": lambda w, g: (w * g).abs(),
    " half zeros": lambda w, g: (w * g).clamp(min=0),  # weights that were masked before score exactly 0
    " ten values": lambda w, g: (w * g * 2e4).abs().round().clamp(max=9),  # the cut falls among millions of equals
}


@pytest.mark.parametrize("density", [0.5, 0.2] if DEVICE == "cuda" else [0.5])
@pytest.mark.parametrize("kind", KINDS if DEVICE == "cuda" else [""])
def test_masks_of_the_encoder(kind, density, benchmark):
    parameters = encoder("bert-base")
    parameters = parameters[: len(parameters) * LAYERS // 12]
    weights, grads = (random_like(parameters, DEVICE, seed=seed) for seed in (0, 1))
    scores = [KINDS[kind](w, g) for w, g in zip(weights, grads)]
    flat = torch.cat([s.flatten() for s in scores])
    n, k = len(flat), round(density * len(flat))

    got = select_threshold(scores, k)
    want = flat.sort(descending=True, stable=True)
    kept = torch.cat([m.flatten() for m in got.keep]).nonzero()[:, 0]
    assert torch.equal(kept, want.indices[:k].sort().values) and got.threshold == want.values[k - 1]
    del want, kept, weights, grads

    case = SIZE + kind + ("" if density == 0.5 else f" {density:.0%} kept")
    ours = timed(benchmark, select_threshold, [(scores, k)]).median  # the scores are several times L2
    rivals = {
        "torch.kthvalue": lambda: torch.kthvalue(flat, n - k + 1),
        "torch.topk": lambda: torch.topk(flat, k, sorted=False),
        "torch.sort": lambda: torch.sort(flat),
    }
    for name, rival in rivals.items():
        record(BENCH, case, "us", ours, "us", name, measure(rival, [()]).median)
    record(BENCH, case, "us", ours, "us", "copy of the same bytes", copy_us(4 * n + n))  # scores read, masks written
    if DEVICE == "cuda":
        record(BENCH, case, "host_us", host_us(select_threshold, (scores, k), calls=20), "us")
