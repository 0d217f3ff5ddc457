"""How close does a trimmed embedding model stay to the original, at equal encoder parameters and equal steps?

    python bench/bench_embedding.py --data DATA --model MODEL [--budgets 50%params 25%params] [--seeds 0 1 2]
    ... --methods ours layer-obs magnitude random "spread layers" torch-pruning-magnitude    # some of them
    ... --max-steps 1                        # right after the cut, without training

MODEL is a folder of sentence-transformers. Trained on, without labels: the texts of banking77, snli, mrpc and qnli in
DATA. Everything but the choice of units is the same for all methods. Scores, all by the cosine of two embeddings:

    stsb       Spearman correlation with the scores of STS-B, which is never trained on
    banking77  accuracy of the class of the nearest training text
    mrpc       share of paraphrases whose partner is the nearest of all
    snli       share of premises whose entailed hypothesis is the nearest of 1,000
    recall     recall@10: neighbours of the original that are neighbours still, among texts that are not trained on

A run is one row for each score, beside that of the original model. `layers` drops layers, and does not meet every
budget; its rows say what it kept.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _harness import record
from rivals import RIVALS, Layers

from sensibert.core.config import TrimConfig
from sensibert.data.batching import Collator
from sensibert.data.encode import Features, encode_text
from sensibert.data.metrics import embedding_metrics, regression_metrics, unit
from sensibert.inputs import load_model, load_tokenizer
from sensibert.models.embedding import EmbeddingModel
from sensibert.models.pooling import read_pooling
from sensibert.recipe import finetune_and_trim
from sensibert.run_options import PRECISIONS, Options
from sensibert.training.predict import predict

TRAINED_ON = ("banking77", "snli", "mrpc", "qnli")
TEXT_COLUMNS = ("sentence", "sentence1", "sentence2")
PAIRS = {"mrpc": "1", "snli": "0"}  # set -> label of the pairs that belong together
MOST_PAIRS, LONGEST = 1000, 128
METHODS = ("ours", "layer-obs", "magnitude", "random", "layers", "spread layers", "torch-pruning-magnitude")


def rows_of(data: Path, name: str, part: str) -> list[dict[str, str]]:
    with open(data / name / f"{part}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_texts(data: Path, path: Path) -> None:
    """The different texts of the training files, one a line."""
    rows = (row for name in TRAINED_ON for row in rows_of(data, name, "train"))
    texts = dict.fromkeys(" ".join(row[c].split()) for row in rows for c in TEXT_COLUMNS if c in row)
    path.write_text("".join(f"{text}\n" for text in texts if text), encoding="utf-8")


class Scores:
    """The scores of a model. The first one is the original."""

    def __init__(self, data: Path, model: str, autocast: torch.dtype | None) -> None:
        self.tokenizer, self.autocast = load_tokenizer(model), autocast
        assert self.tokenizer.pad_token_id is not None  # a folder of sentence-transformers has one
        self.collator = Collator(self.tokenizer.pad_token_id, None, LONGEST)
        self.original: np.ndarray | None = None  # its vectors of the texts that are not trained on
        stsb = rows_of(data, "stsb", "validation")
        self.wanted = np.array([float(row["score"]) for row in stsb])
        self.pairs = {"stsb": self._encoded_pairs(stsb)}
        for name, label in PAIRS.items():
            alike = [row for row in rows_of(data, name, "validation") if row["label"] == label]
            once = {row["sentence1"]: row for row in alike}
            self.pairs[name] = self._encoded_pairs(list(once.values())[:MOST_PAIRS])
        banking = [rows_of(data, "banking77", part) for part in ("train", "validation")]
        self.banking = [self._encoded([row["sentence"] for row in rows]) for rows in banking]
        self.classes = [np.array([row["label"] for row in rows]) for rows in banking]

    def _encoded(self, texts: list[str]) -> Features:
        return encode_text([texts], self.tokenizer, LONGEST)

    def _encoded_pairs(self, rows: list[dict[str, str]]) -> list[Features]:
        return [self._encoded([row[column] for row in rows]) for column in TEXT_COLUMNS[1:]]

    def of(self, model: torch.nn.Module) -> dict[str, float]:
        """Percentages."""

        def vectors(texts: Features) -> np.ndarray:
            return unit(np.asarray(predict(model, texts, self.collator, autocast=self.autocast)))

        (known, seen), pairs = map(vectors, self.banking), {n: list(map(vectors, p)) for n, p in self.pairs.items()}
        pool = np.concatenate([seen, *(part for both in pairs.values() for part in both)])
        self.original = pool if self.original is None else self.original
        first, second = pairs.pop("stsb")
        found = {"stsb": regression_metrics((first * second).sum(1), self.wanted)["spearman"]}
        found["banking77"] = float(np.mean(self.classes[0][(seen @ known.T).argmax(1)] == self.classes[1]))
        for name, (one, other) in pairs.items():
            found[name] = float(np.mean((one @ other.T).argmax(1) == np.arange(len(one))))
        found["recall"] = embedding_metrics(pool, self.original)["recall_at_10"]
        return {name: 100 * value for name, value in found.items()}


def run(
    arguments: argparse.Namespace, texts: Path, budget: str, method: str, seed: int
) -> tuple[torch.nn.Module, int, float]:
    """The trimmed model, its encoder parameters, and the processor seconds of the run."""
    rival, trim = RIVALS[method]() if method in RIVALS else None, TrimConfig(budget)
    if rival is not None:
        trim = replace(trim, compensate=False)
    elif method != "ours":
        trim = replace(trim, method=method)
    with tempfile.TemporaryDirectory() as scratch:
        options = Options(
            model=arguments.model, output=str(Path(scratch) / "out"), train_file=str(texts), task="embedding",
            trim=trim, max_steps=arguments.max_steps, precision=arguments.precision, seed=seed, save_steps=10**9,
            quiet=True,
        )  # fmt: skip
        begin = time.process_time()
        result = finetune_and_trim(options, rival, accept_unfinished=isinstance(rival, Layers))
        seconds, left = time.process_time() - begin, result["encoder_params_after"]
        if isinstance(rival, Layers):
            assert rival.model is not None  # it was called
            layers = result["encoder_params_before"] // rival.model.config.num_hidden_layers
            return rival.model, layers * len(rival.kept), seconds
        return EmbeddingModel(load_model(options.output), read_pooling(options.output)), left, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", default="MiniLM", help="of the model, for the rows")
    parser.add_argument("--budgets", nargs="+", default=["50%params", "25%params"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=800)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    arguments = parser.parse_args()
    autocast = Options(precision=arguments.precision).autocast()
    scores = Scores(arguments.data, arguments.model, autocast)
    original = scores.of(EmbeddingModel(load_model(arguments.model), read_pooling(arguments.model)).eval())
    print("original", *(f"{name} {value:.2f}" for name, value in original.items()), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        texts = Path(scratch) / "texts.txt"
        write_texts(arguments.data, texts)
        for seed in arguments.seeds:
            for budget in arguments.budgets:
                for method in arguments.methods:
                    model, left, seconds = run(arguments, texts, budget, method, seed)
                    case = f"{arguments.name} {budget} {arguments.max_steps} steps {method} seed {seed}"
                    print(f"{case}: {left:,} encoder parameters, {seconds:.0f} processor seconds", flush=True)
                    for name, value in scores.of(model.eval()).items():
                        record("bench_embedding", case, name, value, "%", "original", original[name])


if __name__ == "__main__":
    main()
