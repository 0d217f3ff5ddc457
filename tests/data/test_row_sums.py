"""Sums over rows give the metrics of the tasks; resampling them gives errors and paired tests."""

from types import SimpleNamespace

import numpy as np
import pytest

from sensibert.core.errors import SensibertError
from sensibert.data import row_sums as module
from sensibert.data.files import load_examples
from sensibert.data.row_sums import RowSums, bootstrap, interval, paired_difference, row_sums
from sensibert.data.task_data import TaskData
from tests import runs
from tests.data.tiny import word_piece


def data_of(path) -> TaskData:
    return TaskData.build(None, None, load_examples(path), word_piece())


@pytest.mark.parametrize(
    "write, task",
    [
        (runs.sentence_file, "text-classification"),
        (runs.number_file, "regression"),
        (runs.tag_file, "token-classification"),
        (runs.question_file, "question-answering"),
    ],
)
def test_the_score_of_the_sums_is_the_main_metric(tmp_path, write, task):
    lines = task in ("token-classification", "question-answering")
    data = data_of(write(tmp_path / ("rows.jsonl" if lines else "rows.csv")))
    assert data.task.name == task
    rows, longest = len(data.validation), max(data.validation.lengths)
    generator = np.random.default_rng(0)
    shape = {"text-classification": (2,), "regression": (1,)}.get(task, (longest, data.num_labels))
    logits = generator.normal(size=(rows, *shape))
    if task == "question-answering":
        logits = tuple(generator.normal(size=(rows, longest)) for _ in range(2))
    sums = row_sums(data, logits)
    assert sums.score() == pytest.approx(data.compute_metrics(logits)[data.main_metric], abs=1e-9)
    assert sums.score() != 0


def test_the_error_of_a_mean_is_the_known_one():
    right = np.arange(400) % 5 > 0  # 80 %
    resampled = bootstrap([RowSums.quotient(right)])[0]
    assert resampled.std() == pytest.approx(np.sqrt(0.8 * 0.2 / 400), rel=0.05)
    low, high = interval(resampled)
    assert low == pytest.approx(0.8 - 1.96 * 0.02, abs=0.004) and high == pytest.approx(0.8 + 1.96 * 0.02, abs=0.004)


def test_a_correlation_of_resampled_rows_is_that_of_the_rows():
    generator = np.random.default_rng(1)
    x = generator.normal(size=50) + 1e4  # far from 0, where raw squares lose digits
    y = x + generator.normal(size=50)
    sums, drawn = RowSums.correlation(x, y), generator.integers(50, size=50)
    counts = np.bincount(drawn, minlength=50)
    assert sums.score(counts) == pytest.approx(np.corrcoef(x[drawn], y[drawn])[0, 1], abs=1e-9)


def test_a_constant_side_scores_zero():
    assert RowSums.correlation(np.ones(5), np.arange(5)).score() == 0
    assert RowSums.quotient(np.zeros(5), np.zeros(5)).score() == 0  # no entity anywhere


def test_the_paired_test_sees_what_separate_errors_hide():
    generator = np.random.default_rng(2)
    first = generator.random(1000) < 0.8
    worse = first.copy()
    worse[np.flatnonzero(first)[:12]] = False  # never better
    gap = paired_difference(RowSums.quotient(worse), RowSums.quotient(first))
    assert gap.value == pytest.approx(-0.012) and gap.low < gap.value < gap.high < 0 and gap.p_value < 0.001
    assert bootstrap([RowSums.quotient(first)])[0].std() > 0.012
    same = paired_difference(RowSums.quotient(first), RowSums.quotient(first))
    assert same == (0.0, 0.0, 0.0, 1.0)


def test_a_chance_difference_is_not_significant():
    generator = np.random.default_rng(3)
    first, second = generator.random(500) < 0.8, generator.random(500) < 0.8
    assert paired_difference(RowSums.quotient(first), RowSums.quotient(second)).p_value > 0.05


def test_few_rows_at_a_time_are_drawn_as_often(monkeypatch):
    sums = RowSums.quotient(np.arange(30) % 2)
    monkeypatch.setattr(module, "AT_A_TIME", 100)
    assert bootstrap([sums, sums]).shape == (2, module.RESAMPLES)


def test_other_rows_are_refused():
    with pytest.raises(SensibertError, match="scores of 3 and 4 rows, want the same rows"):
        paired_difference(RowSums.quotient(np.ones(3)), RowSums.quotient(np.ones(4)))
    with pytest.raises(SensibertError, match="there is no validation data"):
        row_sums(SimpleNamespace(validation=None), np.ones((3, 2)))
