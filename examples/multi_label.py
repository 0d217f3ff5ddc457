"""Several labels a row: fine-tune a real BERT on messages about none, one or more topics, and trim it to half.

`python examples/multi_label.py` runs it in about a minute on a CPU. The model is all-MiniLM-L6-v2 from the `demo`
extra. The messages are made here, of sentences about each topic; those of the validation file are in no message of the
training file. All files go into one folder, by default runs/multi-label.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from demo import packaged_model
from transformers import pipeline
from transformers.utils import logging

from sensibert import Options, TrimConfig, finetune_and_trim
from sensibert.report.tables import table

SENTENCES = {
    "delivery": (
        "My parcel has not arrived yet.",
        "The tracking number does not work.",
        "The courier left the box at the wrong door.",
        "When will my order be shipped?",
        "The package came three days late.",
        "Can you send it to another address?",
        "The shipment is stuck at customs.",
        "Nobody rang the bell when it was delivered.",
    ),
    "payment": (
        "My card was charged twice.",
        "I am still waiting for my refund.",
        "The invoice shows the wrong amount.",
        "Can I pay in two instalments?",
        "The discount code was not applied.",
        "My bank declined the transfer.",
        "Please send me a receipt for the payment.",
        "Why is the price higher than on the website?",
    ),
    "account": (
        "I cannot log in any more.",
        "I forgot my password.",
        "How do I change my email address?",
        "Please delete my profile.",
        "The confirmation email never came.",
        "Somebody else is using my login.",
        "My username is not accepted.",
        "The password reset link has expired.",
    ),
}
SMALL_TALK = ("Hello.", "Thank you for your help.", "I have been a customer for years.", "Have a nice day.")
NEW = (
    "I was billed two times and the box is still not here.",
    "My password does not work and I want my money back.",
    "Thanks, everything is fine.",
)


def messages(rows: int, part: slice, seed: int) -> list[dict]:
    """Rows with a text and the list of its topics, of the sentences in a part of each topic's list."""
    rng, made = random.Random(seed), []
    for _ in range(rows):
        topics = [topic for topic in SENTENCES if rng.random() < 0.4]
        text = [*(rng.choice(SENTENCES[topic][part]) for topic in topics), rng.choice(SMALL_TALK)]
        rng.shuffle(text)
        made.append({"text": " ".join(text), "labels": topics})
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/multi-label", help="folder for the messages and the trimmed model")
    parser.add_argument("--epochs", type=float, default=4)
    args = parser.parse_args(argv)
    logging.disable_progress_bar()  # of loading weights; the training keeps its own
    data = Path(args.output, "data")
    data.mkdir(parents=True, exist_ok=True)
    for name, rows, part in (("train", 600, slice(0, 6)), ("validation", 200, slice(6, 8))):
        lines = [json.dumps(row) + "\n" for row in messages(rows, part, seed=rows)]
        (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    result = finetune_and_trim(
        Options(
            model=packaged_model(),
            output=str(Path(args.output, "model")),
            train_file=str(data / "train.jsonl"),  # lists of labels: the task is guessed
            validation_file=str(data / "validation.jsonl"),
            trim=TrimConfig(budget="50%params"),
            epochs=args.epochs,
            precision="auto",
            overwrite=True,
            quiet=not sys.stderr.isatty(),
        )
    )
    print(f"\nEncoder: {result['encoder_params_before']:,} -> {result['encoder_params_after']:,} parameters\n")
    print(table(("validation", ""), [(name, f"{value:.3f}") for name, value in result["metrics"].items()]))
    classify = pipeline(task="text-classification", model=result["output"], top_k=None)
    for text, answers in zip(NEW, classify(list(NEW)), strict=True):
        scores = {answer["label"]: f"{100 * answer['score']:.0f} %" for answer in answers}
        print(f"\n{text}\n  " + ", ".join(f"{topic} {scores[topic]}" for topic in SENTENCES))


if __name__ == "__main__":
    main()
