"""Fine-tune and trim a model that tags words, then tag a sentence.

    python examples/token_classification.py --model bert-base-cased --train-file train.jsonl \\
        --validation-file dev.jsonl --output runs/tags

A row has `tokens`, a list of words, and `tags`, a list of as many names: O, B-PER, ... How-to: docs/how-to/own-data.md.
"""

import argparse

import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from sensibert import Options, TrimConfig, finetune_and_trim

SENTENCE = "Anna lives in Paris"


@torch.inference_mode()
def tags(folder: str, words: list[str]) -> list[str]:
    """The tag of each word: that of its first token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    batch = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    best = model(**batch).logits[0].argmax(-1).tolist()
    found: dict[int, str] = {}
    for word, tag in zip(batch.word_ids(0), best, strict=True):
        if word is not None:
            found.setdefault(word, model.config.id2label[tag])
    return [found[word] for word in range(len(words))]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "train-file", "validation-file", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--budget", default="50%params")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    args = parser.parse_args(argv)

    result = finetune_and_trim(
        Options(
            model=args.model,
            output=args.output,
            train_file=args.train_file,
            validation_file=args.validation_file,
            trim=TrimConfig(budget=args.budget),  # the task is guessed from the columns
            epochs=args.epochs,
            learning_rate=args.learning_rate,
            precision="auto",
            overwrite=True,
        )
    )
    print(f"encoder parameters: {result['encoder_params_before']:,} -> {result['encoder_params_after']:,}")
    print(", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items()))
    words = SENTENCE.split()
    print("  ".join(f"{word}/{tag}" for word, tag in zip(words, tags(args.output, words), strict=True)))


if __name__ == "__main__":
    main()
