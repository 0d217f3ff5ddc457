"""Trim a classifier inside a Trainer of your own: one callback, and everything else as it was.

    python examples/own_trainer.py --model bert-base-uncased --train-file train.csv \\
        --validation-file dev.csv --output runs/own-trainer

The files have the columns `sentence` and `label`, whole numbers from 0. How-to: docs/how-to/own-trainer.md.
"""

import argparse

import numpy as np
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from sensibert import TrimCallback, TrimConfig


def accuracy(predictions) -> dict[str, float]:
    return {"accuracy": float(np.mean(predictions.predictions.argmax(-1) == predictions.label_ids))}


def encoder_params(model) -> int:
    return sum(parameter.numel() for parameter in model.base_model.encoder.parameters())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "train-file", "validation-file", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--budget", default="50%params")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_dataset("csv", data_files={"train": args.train_file, "validation": args.validation_file})
    data = data.map(lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=128), batched=True)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1 + max(data["train"]["label"]))
    before = encoder_params(model)

    trainer = Trainer(
        model,
        TrainingArguments(
            f"{args.output}/checkpoints",
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=32,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=[TrimCallback(TrimConfig(budget=args.budget))],  # the only line that trims
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(f"{args.output}/model")
    if not trainer.is_world_process_zero():  # under torchrun the first process writes
        return
    print(f"encoder parameters: {before:,} -> {encoder_params(model):,}")
    print(f"accuracy: {metrics['eval_accuracy']:.4f}")

    reloaded = AutoModelForSequenceClassification.from_pretrained(f"{args.output}/model")
    print(f"{args.output}/model reloads with {encoder_params(reloaded):,} encoder parameters")


if __name__ == "__main__":
    main()
