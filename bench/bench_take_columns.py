"""Columns of activations gathered, and put back in place, in one pass: against torch's indexing and a copy.

python -m pytest bench/bench_take_columns.py --benchmark-only -o python_files='bench_*.py'

Half of the neurons of an FFN, or of a head's columns, at random places. On a CPU: fewer tokens.
"""

from __future__ import annotations

import pytest
import torch
from _harness import DEVICE, copy_us, measure, record, timed

from sensibert.ops.masked_adamw import index_map
from sensibert.ops.masked_linear.take_columns import take_columns

BENCH = "bench_take_columns"
TOKENS = [4096, 32768] if DEVICE == "cuda" else [512]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def gather(x, kept, index):
    return x.index_select(1, kept)


def scatter(x, kept, index):
    return x.new_zeros(len(x), len(index)).index_copy_(1, kept, x)


@pytest.mark.parametrize("way", [gather, scatter], ids=lambda way: way.__name__)
@pytest.mark.parametrize("width", [768, 3072])
@pytest.mark.parametrize("tokens", TOKENS)
def test_half_of_the_columns(tokens, width, way, benchmark):
    kept = torch.randperm(width, device=DEVICE)[: width // 2].sort().values
    index = kept.int() if way is gather else index_map(kept, width)
    size = width if way is gather else len(kept)
    num_bytes = DTYPE.itemsize * tokens * (width + len(kept))
    data = [torch.randn(tokens, size, device=DEVICE).to(DTYPE) for _ in range(max(2, 160_000_000 // num_bytes))]
    assert torch.equal(take_columns(data[0], index), way(data[0], kept, index))  # no number on red

    ours = timed(benchmark, lambda x: take_columns(x, index), [(x,) for x in data]).median
    theirs = measure(way, [(x, kept, index) for x in data]).median
    case = f"{way.__name__} {width // 2} of {width} {tokens}"
    record(BENCH, case, "us", ours, "us", "index_select" if way is gather else "zeros and index_copy_", theirs)
    record(BENCH, case, "copy_share", copy_us(num_bytes) / ours, "1", "copy of the same bytes", 1.0)
