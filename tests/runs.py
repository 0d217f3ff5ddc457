"""A model, a tokenizer and data so small that a whole run takes a second or two (`from tests.runs import ...`)."""

import contextlib
import csv
import io
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tests.data.tiny import word_piece
from tests.helpers import tiny_model

GOOD, BAD = "good great".split(), "bad dull".split()
REST = "the a film was who wrote it lives in works".split()


def model_folder(folder: Path, model_type: str = "bert", head: str = "", **config) -> str:
    """A pre-trained model as users have it: weights, config and tokenizer in one folder. Dropout is on."""
    tokenizer = word_piece()
    config = {"vocab_size": len(tokenizer), "hidden_dropout_prob": 0.1} | config
    tiny_model(model_type, head, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sentences(rows: int, seed: int = 0) -> list[tuple[str, int]]:
    """One telling word among others; the label is what it tells."""
    rng = random.Random(seed)
    actual = []
    for _ in range(rows):
        label = rng.randint(0, 1)
        words = rng.choices(REST, k=rng.randint(2, 7))
        words.insert(rng.randint(0, len(words)), rng.choice((BAD, GOOD)[label]))
        actual.append((" ".join(words), label))
    return actual


def sentence_file(path: Path, rows: int = 96, seed: int = 0, header=("sentence", "label")) -> str:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *sentences(rows, seed)])
    return str(path)


def workplace(folder: Path) -> Path:
    """A tiny model, 160 sentences to train on and 40 to validate with, in one folder."""
    model_folder(folder / "model")
    sentence_file(folder / "train.csv", 160, seed=1)
    sentence_file(folder / "dev.csv", 40, seed=2)
    return folder


def question_file(path: Path, rows: int = 24, seed: int = 0) -> str:
    rng = random.Random(seed)
    with open(path, "w") as file:
        for number in range(rows):
            words = rng.choices(REST, k=12)
            place = rng.randrange(12)
            words[place] = "anna"
            start = len(" ".join(words[:place])) + (place > 0)
            answers = {"text": ["anna"], "answer_start": [start]}
            row = {"id": str(number), "question": "who wrote it", "context": " ".join(words), "answers": answers}
            file.write(json.dumps(row) + "\n")
    return str(path)


def tag_file(path: Path, rows: int = 48, seed: int = 0) -> str:
    rng = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(rows):
            words = rng.choices([*REST, "anna", "paris"], k=6)
            tags = [{"anna": "B-PER", "paris": "B-LOC"}.get(word, "O") for word in words]
            file.write(json.dumps({"tokens": words, "tags": tags}) + "\n")
    return str(path)


TELLING = {"anger": "bad", "joy": "good", "place": "paris"}


def labelled(rows: int, seed: int = 0) -> list[tuple[str, list[str]]]:
    """None, one or more telling words among others, and the labels that they tell."""
    rng = random.Random(seed)
    actual = []
    for _ in range(rows):
        labels = [label for label in TELLING if rng.random() < 0.4]
        words = [*rng.choices(REST, k=rng.randint(2, 5)), *(TELLING[label] for label in labels)]
        rng.shuffle(words)
        actual.append((" ".join(words), labels))
    return actual


def label_file(path: Path, rows: int = 48, seed: int = 0) -> str:
    """Lists of labels in a jsonl file, or in a csv file a column of 0 and 1 for each label."""
    with open(path, "w", newline="") as file:
        if path.suffix == ".csv":
            rows_ = [(text, *(int(label in labels) for label in TELLING)) for text, labels in labelled(rows, seed)]
            csv.writer(file).writerows([("text", *TELLING), *rows_])
        else:
            file.writelines(json.dumps({"text": text, "labels": ls}) + "\n" for text, ls in labelled(rows, seed))
    return str(path)


def pair_file(path: Path, rows: int = 48, seed: int = 0, header=("sentence1", "sentence2", "label")) -> str:
    """Do both sentences tell the same?"""
    first, second = sentences(rows, seed), sentences(rows, seed + 1000)
    with open(path, "w", newline="") as file:
        rows_ = [(a, b, ("differ", "same")[i == j]) for (a, i), (b, j) in zip(first, second, strict=True)]
        csv.writer(file).writerows([header, *rows_])
    return str(path)


def number_file(path: Path, rows: int = 48, seed: int = 0) -> str:
    with open(path, "w", newline="") as file:
        rows_ = [(text, label + 0.25) for text, label in sentences(rows, seed)]
        csv.writer(file).writerows([("sentence", "label"), *rows_])
    return str(path)


def embedding_folder(folder: Path, mode: str = "mean", **config) -> str:
    """A sentence-transformers folder that normalizes its embeddings."""
    model_folder(folder, **({"initializer_range": 0.2} | config))  # so that heads and neurons matter
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": False}))
    return str(folder)


def text_file(path: Path, rows: int = 200, seed: int = 0) -> str:
    path.write_text("".join(f"{text}\n" for text, _ in sentences(rows, seed)))
    return str(path)


def scored_file(path: Path, rows: int = 40, seed: int = 0) -> str:
    """Pairs of sentences, with the number of words that they share as score."""
    first, second = ([text for text, _ in sentences(rows, seed + more)] for more in (0, 1000))
    scored = [(a, b, len({*a.split()} & {*b.split()})) for a, b in zip(first, second, strict=True)]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("sentence1", "sentence2", "score"), *scored])
    return str(path)


RESULT_KEYS = {
    *("task", "model", "method", "budget", "scope", "grid", "seed", "steps", "output"),
    *("metrics", "metrics_at_cut", "metrics_baseline", "cut_step", "seconds", "samples", "warnings", "throughput"),
    *("encoder_params_before", "encoder_params_after", "total_params_before", "total_params_after"),
    *("flops_before", "flops_after", "flops_length"),
    *("evaluations", "best_step", "latency", "mb_before", "mb_after", "weights", "metrics_in_full", "size"),
}


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The last line of standard output."""
        return json.loads(self.out.splitlines()[-1])


def command(*arguments: object, shown: bool = False) -> Finished:
    """`sensibert ...` in this process, which has paid for its imports already. So the environment that `main` sets is
    not read any more: the bars it would switch off are switched off by hand. shown: with the progress of a run, which
    only few tests look at."""
    from transformers.utils import logging

    from sensibert import cli, recipe
    from sensibert.report.progress import display

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        argv = mock.patch.object(sys, "argv", ["sensibert", *map(str, arguments)])
        with argv, mock.patch.object(recipe, "display", lambda quiet: display(quiet or not shown)):
            try:
                cli.main()
            except SystemExit as end:
                code = end.code
    return Finished(code, out.getvalue(), err.getvalue())


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content (None for folders): what nobody may have touched."""
    actual = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in actual}
