"""The form of the weights file that a run writes: the vocabulary of its embeddings, and the precision of weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .core.config import TrimConfig
from .core.errors import SensibertError
from .data.files import texts_of
from .data.task_data import TaskData
from .data.tasks import EMBEDDING
from .inputs import load_model, load_tokenizer, training_examples, validation_rows, vocabulary_texts
from .models.masks import cost_of
from .models.weight_bits import round_weights
from .run_options import Options
from .size_choice import ROWS, HeldOut, SizeChoice
from .training.run_memory import RunMemory
from .trimming.vocabulary import Smaller, keep_pieces, shrink

LOSES = 0.005  # of the main metric: a form that loses a larger fraction is worth a warning


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a model, and one of fewer pieces: that of the run if it was requested, else one that a budget of
    size may choose."""

    whole: PreTrainedTokenizerBase
    smaller: Smaller | None = None
    requested: bool = False

    @classmethod
    def of(cls, options: Options) -> Vocabulary:
        whole, texts = load_tokenizer(options.model), vocabulary_texts(options)
        if texts is not None:
            return cls(whole, shrink(load_model(options.model), whole, texts), True)
        if not options.chooses_vocabulary():
            return cls(whole)
        try:
            smaller = shrink(load_model(options.model), whole, texts_of(training_examples(options)))
        except SensibertError as error:  # of a kind of tokenizer, or positions that count from the padding
            logging.getLogger("sensibert").info("size: the vocabulary stays as it is (%s)", error)
            return cls(whole)
        return cls(whole, smaller if len(smaller.kept) < len(whole) else None)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the training."""
        return self.smaller.tokenizer if self.requested and self.smaller is not None else self.whole

    def trim(self, model: PreTrainedModel) -> dict[str, int]:
        """Trim a model's embeddings to the requested vocabulary; return the facts for result.json."""
        before = {"total_params_before": cost_of(model, "model")[0]}
        return before | (self.keep(model) if self.requested else {})

    def want_chosen(self, checkpoint: Path, memory: RunMemory) -> None:
        """SensibertError if the run that left a checkpoint has chosen fewer pieces, and this one may not."""
        pieces = memory.table.vocabulary if memory.size is not None and memory.table is not None else 0
        if pieces and self.smaller is None:
            raise SensibertError(
                f"resume: {checkpoint} is of a run that chose {pieces:,} pieces of the vocabulary, and this one keeps "
                "all: want vocabulary left out"
            )

    def keep(self, model: PreTrainedModel) -> dict[str, int]:
        """Keep the pieces of the smaller vocabulary; return the facts."""
        assert self.smaller is not None
        keep_pieces(model, self.smaller)
        return {"vocabulary_before": len(self.whole), "vocabulary_after": len(self.smaller.tokenizer)}


def held_out(options: Options, data: TaskData, vocabulary: Vocabulary) -> HeldOut | None:
    """Validation rows, to measure on what a form loses; None if no form is to be chosen, or there are no such rows."""
    if not options.size_budgets() or options.task == EMBEDDING or data.validation is None:
        return None
    tokenizers = [vocabulary.tokenizer]
    if vocabulary.smaller is not None and not vocabulary.requested:
        tokenizers.append(vocabulary.smaller.tokenizer)
    found = []
    for tokenizer in tokenizers:
        rows = validation_rows(options, data, tokenizer, ROWS)
        assert rows.train is not None  # encoded as such
        found.append((rows.train, rows.collator))
    return HeldOut("validation", *found)


def size_choice(options: Options, vocabulary: Vocabulary, rows: HeldOut | None) -> SizeChoice | None:
    """What the budget of a run leaves open; None if nothing."""
    trim = options.trim
    if not trim.trims or trim.parsed_budget().kind != "size":
        return None
    choice = SizeChoice(
        precisions(trim), None if vocabulary.requested or rows is None else vocabulary.smaller, rows, options.seed
    )
    return choice if len(choice.forms) > 1 else None


def precisions(trim: TrimConfig) -> tuple[str, ...]:
    """Of the weights in the file, to choose from."""
    if trim.weights is not None or trim.runtime.endswith("int8"):
        return (trim.weights or "fp32",)
    return ("fp32", "fp16")


@dataclass(frozen=True)
class Taken:
    """The form that a run ends with. budgeted: whether a budget of size chose it, or a part of it."""

    tokenizer: PreTrainedTokenizerBase
    weights: str
    fewer: bool
    budgeted: bool

    @classmethod
    def of(cls, options: Options, vocabulary: Vocabulary, memory: RunMemory) -> Taken:
        table = memory.table if memory.size is not None else None
        weights = options.trim.weights or (table.weights if table is not None else "fp32")
        fewer = table is not None and table.vocabulary > 0
        chosen = vocabulary.smaller if fewer else None
        tokenizer = vocabulary.tokenizer if chosen is None else chosen.tokenizer
        return cls(tokenizer, weights, fewer, table is not None)

    @property
    def changes(self) -> bool:
        return self.fewer or self.weights != "fp32"

    def bring(
        self, model: PreTrainedModel, options: Options, data: TaskData, vocabulary: Vocabulary
    ) -> tuple[TaskData, dict[str, int]]:
        """Bring a trained model into the form, in place. Returns the data that fits it, and facts for result.json."""
        facts: dict[str, int] = {}
        if self.fewer:
            facts |= vocabulary.keep(model)
            rows = validation_rows(options, data, self.tokenizer)
            data = replace(data, validation=rows.validation, collator=rows.collator, queries=rows.queries)
        if self.weights != "fp32":
            round_weights(model, self.weights)
        return data, facts

    def warnings(self, name: str, full: dict[str, float] | None, metrics: dict[str, float] | None) -> list[str]:
        """Sentences about a main metric, by its name, that the form lowers by more than LOSES. full: as trained."""
        if not full or not metrics or metrics[name] >= full[name] - LOSES * abs(full[name]):
            return []
        ways = ["a larger budget"] * self.budgeted + ["--vocabulary all"] * self.fewer
        ways += ["--weights fp32"] * (self.weights != "fp32")
        return [
            f"{name} is {metrics[name]:.4f} as the file holds the model, and was {full[name]:.4f} as it was trained: "
            f"{' or '.join(ways)} may lose less"
        ]
