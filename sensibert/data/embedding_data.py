"""Texts without labels for an embedding model, and scored pairs or held-out texts to compare it with the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import SensibertError, naming
from ..models.pooling import Pooling
from . import labels
from .batching import Collator
from .encode import Features, encode_text, most_tokens
from .files import Examples
from .labels import Column
from .metrics import embedding_metrics, regression_metrics, unit
from .task_data import TaskData
from .tasks import EMBEDDING, SENTENCES, get_task

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

LEAST = 20  # different texts
# Texts of the training file, at most a tenth of them, that are not trained on where there is no validation file.
HELD_OUT = 1000
LONGEST = 512  # tokens, where neither folder nor tokenizer has a limit


@dataclass(frozen=True)
class ScoredPairs:
    """first, second: rows of the validation texts [pairs]. scores [pairs]."""

    first: np.ndarray
    second: np.ndarray
    scores: np.ndarray


@dataclass
class EmbeddingData(TaskData):
    """Different texts, encoded one by one. The labels of both parts are the embeddings of the original model, once
    `with_labels` has added them."""

    pooling: Pooling = Pooling()
    pairs: ScoredPairs | None = None

    @classmethod
    def of_folder(cls, pooling: Pooling) -> EmbeddingData:
        """Without texts."""
        return cls(get_task(EMBEDDING), 0, [], None, None, Collator(0), pooling=pooling)

    @classmethod
    def of_texts(
        cls,
        train: Examples | None,
        validation: Examples | None,
        tokenizer: PreTrainedTokenizerBase,
        pooling: Pooling,
        max_length: int | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
        rows: int | None = None,
        seed: int = 0,
    ) -> EmbeddingData:
        """rows: number of training texts that are drawn and encoded; None: all. Without validation data some texts are
        held out. A training text gets one of the prompts, a validation text the first. max_length: by default the
        folder's, or what the tokenizer allows. SensibertError names file, row and column, the value, and what was
        expected."""
        if tokenizer.pad_token_id is None:
            raise SensibertError(f"tokenizer {type(tokenizer).__name__} has no pad token")
        max_length = max_length or pooling.max_length or int(min(most_tokens(tokenizer), LONGEST))

        def encoded(texts: list[str], prompts: tuple[str, ...]) -> Features:
            texts = [prompts[i % len(prompts)] + text for i, text in enumerate(texts)]
            return encode_text([[t.lower() for t in texts] if pooling.lower_case else texts], tokenizer, max_length)

        learned: list[str] = []
        held: list[str] = []
        pairs: ScoredPairs | None = None
        if validation is not None:
            with naming("validation_file"):
                held, pairs = _scored_pairs(validation, text_column, label_column)
        if train is not None:
            with naming("train_file"):
                learned = different_texts(train, text_column)
            order = np.random.default_rng(seed).permutation(len(learned))
            if validation is None:
                held = [learned[i] for i in order[: min(HELD_OUT, len(order) // 10)]]
                order = order[len(held) :]
            learned = [learned[i] for i in order[:rows]]
        parts = [
            encoded(texts, prompts) if texts else None
            for texts, prompts in ((learned, pooling.prompts), (held, pooling.prompts[:1]))
        ]
        longest = max(max(part.lengths) for part in parts if part is not None)
        collator = Collator(tokenizer.pad_token_id, None, longest)
        task = replace(get_task(EMBEDDING), max_length=max_length)
        return cls(task, 0, [], parts[0], parts[1], collator, pooling=pooling, pairs=pairs)

    @property
    def main_metric(self) -> str:
        return self.task.main_metric if self.pairs is not None else "recall_at_10"

    def constant_score(self) -> float:
        return 0.0

    def config_kwargs(self) -> dict[str, Any]:
        return {}

    def with_labels(self, embeddings: Callable[[Features], np.ndarray]) -> EmbeddingData:
        """With the embeddings of the original model."""

        def labelled(part: Features | None) -> Features | None:
            return part and Features(part.per_token, {"labels": embeddings(part)}, np.diff(part.ends))

        return replace(self, train=labelled(self.train), validation=labelled(self.validation))

    def _metrics(self, data: Features, logits: Any, label_ids: Any) -> dict[str, float]:
        embeddings, metrics = logits[0], {}
        if self.pairs is not None:
            vectors = unit(embeddings)
            cosine = (vectors[self.pairs.first] * vectors[self.pairs.second]).sum(1)
            metrics["spearman"] = regression_metrics(cosine, self.pairs.scores)["spearman"]
        if "labels" in data.per_item:
            metrics |= embedding_metrics(embeddings, data.per_item["labels"])
        return metrics


def text_columns(examples: Examples, text_column: str | None) -> list[str]:
    """The names of the columns with texts. SensibertError if none is known."""
    return [column.name for column in _text_columns(examples, text_column)]


def training_texts(examples: Examples, text_column: str | None) -> int:
    """How many texts of a file are trained on, some being held out."""
    texts = len(different_texts(examples, text_column))
    return texts - min(HELD_OUT, texts // 10)


def different_texts(examples: Examples, text_column: str | None) -> list[str]:
    """The texts of one or more columns, each once. SensibertError for an empty one, or too few different ones."""
    columns = _text_columns(examples, text_column)
    texts = dict.fromkeys(text.strip() for column in columns for text in _filled(column))
    if len(texts) < LEAST:
        came = f"all texts are {labels.show(next(iter(texts)))}" if len(texts) == 1 else f"{len(texts)} different texts"
        raise SensibertError(f"{examples.name}: {came}, want at least {LEAST} different ones")
    return list(texts)


def _filled(column: Column) -> list[str]:
    list(column.filled())
    return labels.texts(column)


def _text_columns(examples: Examples, text_column: str | None) -> list[Column]:
    if text_column is not None:
        names = (text_column,) if text_column in examples.columns else [part.strip() for part in text_column.split(",")]
        return [Column.of(examples, name, "text_column") for name in names]
    known = get_task(EMBEDDING).input_columns
    found = next((names for names in known if set(names) <= set(examples.columns)), None)
    if found is None:
        existing = ", ".join(repr(c) for c in examples.columns)
        wanted = ", ".join(dict.fromkeys(repr(name) for names in known for name in names))
        raise SensibertError(
            f"{examples.name}: no column with texts is known, the columns are {existing}; want text_column, or one of "
            f"{wanted}"
        )
    return [Column.of(examples, name) for name in found]


def _scored_pairs(
    examples: Examples, text_column: str | None, label_column: str | None
) -> tuple[list[str], ScoredPairs]:
    """The different texts of two columns, and the pairs with their scores."""
    named = [part.strip() for part in (text_column or "").split(",")]
    known = [names for names in ((tuple(named),) if text_column else ()) + SENTENCES if len(names) == 2]
    pair = next((names for names in known if set(names) <= set(examples.columns)), None)
    scored = (label_column,) if label_column else get_task(EMBEDDING).label_columns
    score = next((name for name in scored if name in examples.columns), None)
    if pair is None or score is None:
        existing = ", ".join(repr(c) for c in examples.columns)
        wanted = " or ".join(f"{a!r}, {b!r}" for a, b in known)
        raise SensibertError(
            f"{examples.name}: the columns are {existing}, want two with texts ({wanted}) and one with a score "
            f"({' or '.join(map(repr, scored))})"
        )
    numbers = labels.numbers(column := Column.of(examples, score))
    if numbers.min() == numbers.max():
        raise SensibertError(
            f"{examples.name}: column {score!r} is {labels.show(column.values[0])} in every row, want different scores"
        )
    first, second = ([text.strip() for text in _filled(Column.of(examples, name))] for name in pair)
    row_of = {text: row for row, text in enumerate(dict.fromkeys([*first, *second]))}
    if len(row_of) < 3:
        raise SensibertError(f"{examples.name}: {len(row_of)} different texts, want at least 3")
    rows = np.array([[row_of[text] for text in texts] for texts in (first, second)])
    return list(row_of), ScoredPairs(rows[0], rows[1], numbers)
