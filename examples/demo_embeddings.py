"""Trim an embedding model to half of its encoder on texts without labels, then search with it, before and after.

`make demo-embeddings` runs it. The model is all-MiniLM-L6-v2 from the `demo` extra, the texts are the docstrings of
examples/docstrings.py. Nothing is downloaded. All files go into one folder, by default runs/demo-embeddings.
"""

import argparse
import csv
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import docstrings
import torch
from demo import packaged_model
from sentence_transformers import SentenceTransformer
from transformers.utils import logging

from sensibert import Options, TrimConfig, finetune_and_trim
from sensibert.report.tables import table

QUERIES = (
    "shortest path between two nodes",
    "random numbers from a bell curve",
    "remove rows with missing values",
    "solve an equation symbolically",
    "split a sentence into tokens",
    "send an email through a server",
)
SPEED = "texts a second, 32 of 128 tokens"


def read_texts(data: Path, part: str) -> list[str]:
    with open(data / f"{part}.csv", newline="", encoding="utf-8") as file:
        return [row["sentence"] for row in csv.DictReader(file)]


def texts_a_second(models: list[SentenceTransformer], repeats: int = 7) -> list[float]:
    """Medians; the models alternate, so that other processes slow all of them."""
    texts = [" ".join(["film"] * 126)] * 32
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for model, times in zip(models, seconds, strict=True):
            begin = time.perf_counter()
            model.encode(texts, batch_size=32)
            if turn:  # the first is a warm-up
                times.append(time.perf_counter() - begin)
    return [len(texts) / statistics.median(times) for times in seconds]


def search(models: list[SentenceTransformer], texts: list[str]) -> None:
    """Print the text that each model finds for each query."""
    found = []
    for model in models:
        vectors, queries = model.encode(texts, convert_to_tensor=True), model.encode(QUERIES, convert_to_tensor=True)
        found.append(model.similarity(queries, vectors).argmax(1).tolist())
    for query, whole, trimmed in zip(QUERIES, *found, strict=True):
        print(f"\n{query}\n  original  {texts[whole][:100]}")
        print("  trimmed   the same" if whole == trimmed else f"  trimmed   {texts[trimmed][:100]}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/demo-embeddings", help="folder for the texts and the trimmed model")
    parser.add_argument("--max-steps", type=int, default=500)
    args = parser.parse_args(argv)
    logging.disable_progress_bar()  # of loading weights
    begin, base, data = time.perf_counter(), packaged_model(), Path(args.output, "data")
    print("Reading the docstrings of the installed libraries ...", flush=True)
    counts = docstrings.build(data)
    print(f"{counts['train']:,} texts for training, {sum(counts.values()):,} to search in", flush=True)
    result = finetune_and_trim(
        Options(
            model=base,
            output=str(Path(args.output, "model")),
            task="embedding",
            train_file=str(data / "train.csv"),
            text_column="sentence",
            trim=TrimConfig(budget="50%params"),
            max_steps=args.max_steps,
            precision="auto",
            overwrite=True,
        )
    )
    models = [SentenceTransformer(str(folder), device="cpu") for folder in (base, result["output"])]
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in models]
    speeds = texts_a_second(models)
    rows = [
        ("encoder parameters", *(f"{result[f'encoder_params_{when}']:,}" for when in ("before", "after"))),
        ("all parameters, with embeddings", *(f"{size:,}" for size in sizes)),
        (SPEED, *(f"{speed:.1f}" for speed in speeds)),
        ("nearest neighbours of the original kept", "", f"{100 * result['metrics']['recall_at_10']:.0f} %"),
        ("cosine to the original's embedding", "", f"{result['metrics']['cosine']:.3f}"),
    ]
    print("\nall-MiniLM-L6-v2, encoder trimmed to half without labels\n")
    print(table(("", "original", "trimmed"), rows))
    with torch.inference_mode():
        search(models, read_texts(data, "train") + read_texts(data, "validation"))
    print(f"\n{time.perf_counter() - begin:.0f} seconds, files in {args.output}")


if __name__ == "__main__":
    main()
