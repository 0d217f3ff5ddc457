"""The main metric of a task as a function of sums over rows, so that rows can be resampled.

Accuracy and F1 are quotients of two sums; a correlation is a function of six.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import SensibertError
from .embedding_data import EmbeddingData
from .metrics import answer_f1, entities, ranks, unit
from .task_data import TaskData

RESAMPLES = 5000
AT_A_TIME = 2**22  # rows drawn before they are summed
CONFIDENCE = 0.95


@dataclass(frozen=True)
class RowSums:
    """What every row adds to the sums that a metric is computed from.

    values [rows, 2]: numerator and denominator; or for a correlation [rows, 6]: 1, x, y, x^2, y^2, x y."""

    values: np.ndarray

    @classmethod
    def quotient(cls, over: np.ndarray, under: np.ndarray | None = None) -> RowSums:
        """under: by default 1 in every row, so that the metric is a mean."""
        return cls(np.stack([over, np.ones(len(over)) if under is None else under], 1).astype(np.float64))

    @classmethod
    def correlation(cls, x: np.ndarray, y: np.ndarray) -> RowSums:
        """Pearson's, of the centered x and y: their squares would lose digits otherwise."""
        x, y = (np.asarray(each, np.float64) - np.mean(each, dtype=np.float64) for each in (x, y))
        return cls(np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], 1))

    def score(self, counts: np.ndarray | None = None) -> np.ndarray:
        """The metric; 0 where it is not defined. counts [..., rows]: how often each row counts; None: once."""
        sums = self.values.sum(0) if counts is None else counts @ self.values
        if sums.shape[-1] == 2:
            over, under = np.moveaxis(sums, -1, 0)
        else:
            n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
            over, under = n * xy - x * y, np.sqrt(np.maximum((n * xx - x * x) * (n * yy - y * y), 0))
        return np.divide(over, under, out=np.zeros_like(over, np.float64), where=under > 0)

    def part(self, rows: np.ndarray) -> RowSums:
        return RowSums(self.values[rows])


def row_sums(data: TaskData, logits: Any) -> RowSums:
    """Of the main metric of the validation rows. logits: as `compute_metrics` takes them."""
    logits = [np.asarray(part, np.float32) for part in (logits if isinstance(logits, (tuple, list)) else (logits,))]
    rows = data.validation
    if rows is None:
        raise SensibertError("row_sums: there is no validation data")
    if isinstance(data, EmbeddingData):
        if data.pairs is None:
            raise SensibertError("validation_file: it holds texts without scores, want pairs of texts with scores")
        vectors = unit(logits[0])
        cosine = (vectors[data.pairs.first] * vectors[data.pairs.second]).sum(1)
        return RowSums.correlation(ranks(cosine), ranks(data.pairs.scores))
    if data.task.name == "question-answering":
        best = [row[0].text if row else "" for row in data.answers(logits[0], logits[1], n_best=1)]
        return RowSums.quotient(
            np.array([max(answer_f1(text, gold) for gold in golds or [""]) for text, golds in zip(best, data.golds())])
        )
    if data.task.name == "token-classification":
        pairs = [tuple(set(entities(tags)) for tags in pair) for pair in zip(*data.tags(rows, logits))]
        return RowSums.quotient(
            np.array([2 * len(ours & gold) for ours, gold in pairs]),
            np.array([len(ours) + len(gold) for ours, gold in pairs]),
        )
    wanted = rows.per_item["labels"]
    if data.task.name == "regression":
        predicted = logits[0].reshape(-1)
        predicted = 1 / (1 + np.exp(-predicted)) if data.one_logit else predicted
        return RowSums.correlation(predicted, wanted.reshape(-1))
    return RowSums.quotient(logits[0].argmax(-1) == wanted)


def bootstrap(scored: Sequence[RowSums], seed: int = 0) -> np.ndarray:
    """Scores [models, RESAMPLES] on rows drawn with replacement, the same rows for every model."""
    rows = len(scored[0].values)
    generator = np.random.default_rng(seed)
    parts = [[each.score(counts) for each in scored] for counts in _counts(rows, generator)]
    return np.concatenate([np.stack(part) for part in parts], 1)


def _counts(rows: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """[samples, rows]: how often each row was drawn."""
    most = max(1, AT_A_TIME // rows)
    for begin in range(0, RESAMPLES, most):
        samples = min(most, RESAMPLES - begin)
        drawn = generator.integers(rows, size=(samples, rows)) + rows * np.arange(samples)[:, None]
        yield np.bincount(drawn.reshape(-1), minlength=samples * rows).reshape(samples, rows)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The range of the middle 95 % of resampled values."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


class Difference(NamedTuple):
    """Of two scores on the same rows, by the paired bootstrap (Efron & Tibshirani 1993; Koehn 2004).

    low, high: a 95 % confidence interval. p_value: two-sided."""

    value: float
    low: float
    high: float
    p_value: float


def paired_difference(ours: RowSums, others: RowSums, seed: int = 0) -> Difference:
    """ours - others. SensibertError for scores of different numbers of rows."""
    if ours.values.shape != others.values.shape:
        raise SensibertError(
            f"paired_difference: scores of {len(ours.values)} and {len(others.values)} rows, want the same rows"
        )
    first, second = bootstrap([ours, others], seed)
    gaps = first - second
    beyond = 1 + min(int((gaps <= 0).sum()), int((gaps >= 0).sum()))
    value = float(ours.score() - others.score())
    return Difference(value, *interval(gaps), min(1.0, 2 * beyond / (RESAMPLES + 1)))
