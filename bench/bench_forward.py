"""How much faster is a trimmed model? One forward pass, dense against trimmed, in turn, medians.

    python bench/bench_forward.py [--model MODEL_OR_FOLDER --name NAME] [--budget 50%params] [--batch 32] [--length 128]

    ... --model MODEL --encode TRIMMED           # SentenceTransformer.encode of both folders, tokenizer and pooling too

The row calls the model NAME, or as its folder is called. Without a model: BERT-base with random weights. Without
--encode it is cut uniformly. The two passes alternate, so that a machine whose speed drifts slows both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _harness import record
from transformers import AutoModel, BertConfig, BertModel

from sensibert.allocation.allocate import allocate
from sensibert.sensitivity.analyze import analyze
from sensibert.trimming.trim import trim


@torch.inference_mode()
def seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    begin = time.perf_counter()
    model(input_ids=ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def encoding(folder: str, texts: list[str]) -> Callable[[], float]:
    """Seconds in which the embedding model of a folder encodes the texts."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder)

    def measured() -> float:
        begin = time.perf_counter()
        model.encode(texts, batch_size=len(texts))  # as numpy arrays: it waits for a GPU
        return time.perf_counter() - begin

    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name")
    parser.add_argument("--name", help="of the model, for the row")
    parser.add_argument("--budget", default="50%params")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--encode", metavar="TRIMMED", help="folder of --model trimmed to --budget")
    arguments = parser.parse_args()
    if arguments.encode:
        texts = [" ".join(["time"] * (arguments.length - 2))] * arguments.batch  # and two special tokens
        both = [encoding(folder, texts) for folder in (arguments.model, arguments.encode)]
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dense = AutoModel.from_pretrained(arguments.model) if arguments.model else BertModel(BertConfig())
        dense = dense.eval().to(device)
        plan = allocate(analyze(dense, method="magnitude"), arguments.budget, allocation="uniform")
        trimmed = trim(dense, plan, copy_model=True)
        ids = torch.randint(5, dense.config.vocab_size, (arguments.batch, arguments.length), device=device)
        both = [partial(seconds, model, ids) for model in (dense, trimmed)]
    times = [(both[0](), both[1]()) for _ in range(arguments.rounds + 2)][2:]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    name = arguments.name or (Path(arguments.model).name if arguments.model else "bert-base")
    kind = "encode" if arguments.encode else "uniform"
    case = f"{name} {arguments.budget} {kind} {arguments.batch}x{arguments.length}"
    record("bench_forward", case, "us", 1e6 * medians[1], "us", "dense", 1e6 * medians[0])
    share = statistics.median(after / before for before, after in times)
    print(f"trimmed over dense, pair by pair: {share:.3f} (median of {len(times)})")


if __name__ == "__main__":
    main()
