"""How much faster is a trimmed model? One forward pass, dense against trimmed, in turn, medians.

    python bench/bench_forward.py [--model MODEL_OR_FOLDER] [--budget 50%params] [--batch 32] [--length 128]

Without a model: BERT-base with random weights, cut uniformly. The two passes alternate, so that a machine
whose speed drifts slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from bench_accuracy import append, machine
from transformers import AutoModel, BertConfig, BertModel

from sensibert.artifacts import Budget
from sensibert.pipeline.allocate import allocate
from sensibert.pipeline.analyze import analyze
from sensibert.pipeline.trim import trim

RESULTS = Path(__file__).parent / "results" / "bench_forward.jsonl"


@torch.inference_mode()
def seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    begin = time.perf_counter()
    model(input_ids=ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--budget", default="50%params")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = AutoModel.from_pretrained(arguments.model) if arguments.model else BertModel(BertConfig())
    dense = dense.eval().to(device)
    plan = allocate(analyze(dense, statistic="magnitude"), Budget.parse(arguments.budget), policy="uniform")
    trimmed = trim(dense, plan, copy_model=True)
    ids = torch.randint(5, dense.config.vocab_size, (arguments.batch, arguments.length), device=device)
    times = [(seconds(dense, ids), seconds(trimmed, ids)) for _ in range(arguments.rounds + 2)][2:]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    name = "minilm-l6" if dense.config.hidden_size == 384 else "bert-base"
    row = {
        "bench": "bench_forward",
        "case": f"{name} {arguments.budget} uniform {arguments.batch}x{arguments.length}",
        "metric": "ms",
        "value": round(1e3 * medians[1], 2),
        "unit": "ms",
        "rival": "dense",
        "rival_value": round(1e3 * medians[0], 2),
        "ratio": round(medians[0] / medians[1], 3),
        "pairwise_share": round(statistics.median(b / a for a, b in times), 3),
        "threads": torch.get_num_threads(),
        **machine(),
    }
    append(RESULTS, row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
