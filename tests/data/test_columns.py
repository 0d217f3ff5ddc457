"""The task that columns are for, and the columns of a task."""

import pytest

from sensibert.core.errors import SensibertError
from sensibert.data.columns import guess_task
from sensibert.data.files import Examples


def examples(name: str = "train.csv", **columns) -> Examples:
    return Examples(columns, name)


@pytest.mark.parametrize(
    "columns, task",
    [
        ({"sentence": ["a"], "label": ["0"]}, "text-classification"),
        ({"text": ["a"], "label": ["x"]}, "text-classification"),
        ({"sentence1": ["a"], "sentence2": ["b"], "label": ["0.5"]}, "regression"),
        ({"id": ["1"], "question": ["a"], "context": ["b"], "answers": [{}]}, "question-answering"),
        ({"tokens": [["a"]], "tags": [["O"]]}, "token-classification"),
        ({"tokens": ["a b"], "ner_tags": ["O O"]}, "token-classification"),
        ({"tokens": [["a"]], "labels": [["O"]]}, "token-classification"),
        ({"sentence": ["a"], "labels": ["x"]}, "text-classification"),
        ({"sentence": ["a"], "labels": [["x"]]}, "multi-label-classification"),
        ({"text": ["a"], "label": [[]]}, "multi-label-classification"),
        ({"text": ["a"], "label": ['["x", "y"]']}, "multi-label-classification"),
        ({"text": ["a"], "tokens": [["a"]], "labels": [["O"]]}, "token-classification"),
        ({"sentence": ["a"] * 2, "label": [1.0, 0.0]}, "text-classification"),
        ({"sentence": ["a"] * 2, "label": [-1, 1]}, "text-classification"),
        ({"sentence": ["a"] * 30, "label": list(range(30))}, "text-classification"),
    ],
)
def test_the_task_is_guessed_from_the_columns(columns, task):
    assert guess_task(examples(**columns)) == task


def test_the_task_is_guessed_from_the_chosen_columns():
    rows = examples(words=[["a"]], pos=[["O"]], question=["q"], context=["c"], answers=[{}], kind=["x"], size=["0.5"])
    assert guess_task(rows) == "question-answering"
    assert guess_task(rows, text_column="words", label_column="pos") == "token-classification"
    assert guess_task(rows, text_column="question", label_column="kind") == "text-classification"
    assert guess_task(rows, text_column="question,context", label_column="size") == "regression"
    assert guess_task(rows, text_column="question", label_column="pos") == "multi-label-classification"
    assert guess_task(rows, text_column="question", label_column="size", named=True) == "text-classification"


@pytest.mark.parametrize(
    "values, message",
    [
        (["2", "0.0", "1"], r"row 1, column 'label' is '2' (str), and all labels are whole numbers, 3 different ones"),
        ([*range(20), 100], "row 21, column 'label' is 100 (int), and all labels are whole numbers, 21 different ones"),
    ],
)
def test_whole_numbers_with_a_point_or_many_with_gaps_may_be_classes_or_numbers(values, message):
    with pytest.raises(SensibertError) as caught:
        guess_task(examples(sentence=["a"] * len(values), label=values))
    want = ": want a task, text-classification for classes or regression for numbers"
    assert str(caught.value) == f"train.csv: {message}{want}"


def test_data_without_a_known_label_column_have_no_task():
    with pytest.raises(
        SensibertError, match="train.csv: no column 'label', 'labels', 'tags' or 'answers', the columns are 'a'"
    ):
        guess_task(examples(a=["1"]))


def test_numbers_with_a_decimal_comma_are_not_taken_for_names():
    with pytest.raises(
        SensibertError, match=r"row 1, column 'label' is '0,5' \(str\), want a decimal point, or a task"
    ):
        guess_task(examples(sentence=["a", "b"], label=["0,5", "1,25"]))
    assert guess_task(examples(sentence=["a", "b"], label=["0,5", "x"])) == "text-classification"
