"""Fine-tune and trim a model that answers questions, then ask it one.

    python examples/question_answering.py --model bert-base-uncased --train-file train.jsonl \\
        --validation-file dev.jsonl --output runs/answers

The files are in the format of SQuAD: `question`, `context` and `answers`. How-to: docs/how-to/question-answering.md.
"""

import argparse

import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from sensibert import Options, TrimConfig, finetune_and_trim

QUESTION = "Who wrote it?"
CONTEXT = "The film was made in Paris. Anna wrote it in a few weeks, and it was a great success."
LONGEST = 30  # tokens of an answer


@torch.inference_mode()
def answer(folder: str, question: str, context: str) -> str:
    """The best span of the context."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    batch = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets = batch.pop("offset_mapping")[0].tolist()
    inside = torch.tensor([part == 1 for part in batch.sequence_ids(0)])
    outputs = model(**batch)
    start, end = (logits[0].masked_fill(~inside, -torch.inf) for logits in (outputs.start_logits, outputs.end_logits))
    spans = (start[:, None] + end[None, :]).triu().tril(LONGEST - 1)  # the end is not before the start
    spans = spans.masked_fill(~torch.ones_like(spans, dtype=torch.bool).triu().tril(LONGEST - 1), -torch.inf)
    first, last = divmod(int(spans.argmax()), len(offsets))
    return context[offsets[first][0] : offsets[last][1]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "train-file", "validation-file", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--budget", default="50%params")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-length", type=int, help="tokens of a window; the default is 384")
    args = parser.parse_args(argv)

    result = finetune_and_trim(
        Options(
            model=args.model,
            output=args.output,
            train_file=args.train_file,
            validation_file=args.validation_file,
            task="question-answering",
            trim=TrimConfig(budget=args.budget),  # dropout and the learning rate continue after the cut
            epochs=args.epochs,
            max_length=args.max_length,
            precision="auto",
            overwrite=True,
        )
    )
    print(f"encoder parameters: {result['encoder_params_before']:,} -> {result['encoder_params_after']:,}")
    print(", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items()))
    print(f"{QUESTION} {answer(args.output, QUESTION, CONTEXT)}")


if __name__ == "__main__":
    main()
