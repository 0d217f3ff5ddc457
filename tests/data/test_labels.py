"""Columns of every kind; a bad value is named with file, row, column and what was expected."""

import numpy as np
import pytest

from sensibert.core.errors import SensibertError
from sensibert.data.files import Examples
from sensibert.data.labels import Column, answers, lists, numbers, tag_values, texts, words


def column(*values, name="label") -> Column:
    return Column.of(Examples({name: list(values)}, "train.csv"), name)


def test_numbers_are_float32():
    values = numbers(column("1", 2, "-3.5e1", 0.25))
    assert values.dtype == np.float32 and values.tolist() == [1.0, 2.0, -35.0, 0.25]


@pytest.mark.parametrize(
    "value, message",
    [
        ("abc", "'abc' (str), want a number"),
        ([1], "[1] (list), want a number"),
        ("nan", "'nan' (str), want a finite number"),
        (float("inf"), "inf (float), want a finite number"),
        (1e39, "1e+39 (float), want a finite number"),
    ],
)
def test_a_value_that_is_not_a_number_is_named(value, message):
    with pytest.raises(SensibertError) as caught:
        numbers(column(1, value))
    assert str(caught.value) == f"train.csv: row 2, column 'label' is {message}"


def test_texts_may_be_empty_but_must_be_text():
    assert texts(column("", "null", "é")) == ["", "null", "é"]
    for value, message in ((None, "is empty"), (3, "is 3 (int), want text"), ("é\ud800", "half a surrogate pair at")):
        with pytest.raises(SensibertError) as caught:
            texts(column("x", value, name="sentence"))
        assert f"train.csv: row 2, column 'sentence' {message}" in str(caught.value) or "surrogate" in message
        assert message in str(caught.value)


def test_a_missing_column_is_named_with_the_existing_ones():
    with pytest.raises(SensibertError, match=r"train.csv: no column 'label', the columns are 'a', 'b'"):
        Column.of(Examples({"a": [], "b": []}, "train.csv"), "label")


def test_lists_come_as_lists_as_json_or_as_words():
    assert lists(column(["a", "b"], '["a", "b"]', "a b", " [1, 2]")) == [["a", "b"]] * 3 + [[1, 2]]


@pytest.mark.parametrize(
    "value, message",
    [
        ("['a', 'b']", "is \"['a', 'b']\" (str), want a JSON list"),
        (3, "is 3 (int), want a list"),
        (["a", 3], "holds 3 (int), want words"),
    ],
)
def test_values_that_are_not_words_are_named(value, message):
    with pytest.raises(SensibertError) as caught:
        words(column(["x"], value, name="tokens"))
    assert str(caught.value) == f"train.csv: row 2, column 'tokens' {message}"


def test_every_word_needs_a_tag():
    with pytest.raises(SensibertError, match=r"row 2, column 'tags' has 1 tags for 2 tokens"):
        tag_values(column(["O"], ["O"], name="tags"), [["a"], ["b", "c"]])


CONTEXT = "Anna lives in Paris."


@pytest.mark.parametrize(
    "value",
    [
        {"text": ["Paris", "in Paris"], "answer_start": [14, 11]},
        '{"text": ["Paris", "in Paris"], "answer_start": [14, 11]}',
        [{"text": "Paris", "answer_start": 14}, {"text": "in Paris", "answer_start": 11}],
    ],
)
def test_answers_in_every_format(value):
    assert answers(column(value, name="answers"), [CONTEXT]) == [[("Paris", 14), ("in Paris", 11)]]


@pytest.mark.parametrize("value", [{"text": [], "answer_start": []}, {"text": [""], "answer_start": [0]}, []])
def test_no_answer_is_an_answer(value):
    assert answers(column(value, name="answers"), [CONTEXT]) == [[]]


def test_a_single_answer_needs_no_list():
    assert answers(column({"text": "Anna", "answer_start": 0}, name="answers"), [CONTEXT]) == [[("Anna", 0)]]


@pytest.mark.parametrize(
    "value, message",
    [
        (None, "is None (NoneType), want text and answer_start, equally long lists"),
        ({"text": ["Anna"]}, "want text and answer_start, equally long lists"),
        ({"text": ["Anna"], "answer_start": []}, "want text and answer_start, equally long lists"),
        ("Anna", "is 'Anna' (str), want a JSON object {text: [...], answer_start: [...]}"),
        ({"text": ["Anna"], "answer_start": ["0"]}, "has text 'Anna' (str) at '0' (str), want a string and an integer"),
        (
            {"text": ["Paris"], "answer_start": [13]},
            "has text 'Paris' (str) at character 13, where the context has ' Pari'",
        ),
        ({"text": ["Paris"], "answer_start": [-6]}, "has text 'Paris' (str) at character -6"),
        ({"text": ["Paris"], "answer_start": [900]}, "at character 900, where the context has '' (str)"),
    ],
)
def test_answers_that_are_not_in_their_context_are_named(value, message):
    with pytest.raises(SensibertError) as caught:
        answers(column([], value, name="answers"), ["", CONTEXT])
    assert str(caught.value).startswith("train.csv: row 2, column 'answers' ") and message in str(caught.value)
