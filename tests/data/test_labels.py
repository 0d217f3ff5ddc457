"""Labels of every kind; a bad value is named with file, row, column and what was expected."""

import numpy as np
import pytest

from sensibert.core.errors import SensibertError
from sensibert.data.files import Examples
from sensibert.data.labels import ClassIds, Column, answers, class_names, kind, lists, numbers, tag_values, texts, words


def column(*values, name="label") -> Column:
    return Column.of(Examples({name: list(values)}, "train.csv"), name)


def names_of(*values) -> list[str]:
    return class_names(column(*values), column(*values).filled())


@pytest.mark.parametrize(
    "values, expected",
    [
        (["0", "1"], "integer"),
        ([0, 1], "integer"),
        (["+1", " -2 "], "integer"),
        (["1", "2.5"], "number"),
        ([1.0, 2], "number"),
        (["1e3", ".5", "-2."], "number"),
        (["yes", "no"], "name"),
        (["NA", "null", "nan"], "name"),  # words among words
        (["2020_01", "1_000"], "name"),
        (["0x10", "1,5"], "name"),
        ([True, False], "name"),
        (["9" * 40], "number"),
    ],
)
def test_the_kind_of_labels(values, expected):
    assert kind(column(*values), column(*values).filled()) == expected


def test_names_are_sorted_and_integers_are_their_own_names():
    assert names_of("yes", "no ", "yes", "no") == ["no", "yes"]
    assert names_of("2", "0", "1", "0") == ["0", "1", "2"]
    assert names_of(1, 0) == ["0", "1"]
    assert names_of(True, False) == ["False", "True"]
    assert names_of("nan", "null", "NA") == ["NA", "nan", "null"]
    assert names_of(1, -1) == ["-1", "1"]
    assert names_of("10", "9", "0") == ["0", "9", "10"]
    assert names_of("1.0", 0.0, "1", "1e0") == ["0", "1"]


BAD_LABELS = {
    "one class": (["a", "a"], "train.csv: column 'label' has only one class, 'a' (str): want at least two"),
    "one integer": (["0", "0"], "column 'label' has only one class, 0 (int): want at least two"),
    "number": (
        ["0", "0.5"],
        "row 2, column 'label' is '0.5' (str), want an integer or a name (to predict numbers: task regression)",
    ),
    "name among integers": (
        ["0", "1", "abc"],
        "row 3, column 'label' is 'abc' (str), and an earlier label is '0' (str): want",
    ),
    "integer among names": (
        ["a", "b", "7"],
        "row 3, column 'label' is '7' (str), and an earlier label is 'a' (str): want numbers",
    ),
    "bool among integers": ([0, True], "row 2, column 'label' is True (bool), and an earlier label is 0 (int)"),
    "whole and not": ([0.0, 1.0, 1.5], "row 3, column 'label' is 1.5 (float), want an integer or a name"),
    "enormous": (["0", "9" * 40], "row 2, column 'label' is '99999"),
    "nan": ([0.0, float("nan")], "row 2, column 'label' is nan (float), want a label"),
    "nan word": (["0", "NaN", "1"], "row 2, column 'label' is 'NaN' (str), want a label"),
    "infinite": (["0", "1", "inf"], "row 3, column 'label' is 'inf' (str), want a label"),
    "none": ([0, 1, None], "row 3, column 'label' is empty"),
    "blank": (["0", " "], "row 2, column 'label' is empty"),
    "list": ([[0], [1]], "row 1, column 'label' is [0] (list), want an integer, a number or a name"),
    "long": (["1", "x" * 99], "row 2, column 'label' is '" + "x" * 36 + "... (str), and an earlier label is '1'"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_are_named(case):
    values, message = BAD_LABELS[case]
    with pytest.raises(SensibertError) as caught:
        names_of(*values)
    assert message in str(caught.value) and str(caught.value).startswith("train.csv: ")


def ids_of(names, *values) -> list[int]:
    ids = ClassIds(names)
    return [ids(column(*values), row, value) for row, value in enumerate(values)]


def test_class_ids_go_by_name_first_and_integers_are_ids():
    assert ids_of(["no", "yes"], "yes", " no", 1, "0") == [1, 0, 1, 0]
    assert ids_of(["1", "0"], "1", 0) == [0, 1]
    assert ids_of(["no", "yes"], 1.0, "0.0") == [1, 0]
    assert ids_of(["-1", "1"], "1.0", -1.0, "-1", "+1") == [1, 0, 0, 1]
    assert ids_of(["False", "True"], True, False) == [1, 0]


@pytest.mark.parametrize("value", ["maybe", 2, -1, "2", 0.5, "2.0", None, float("nan")])
def test_a_label_outside_the_classes_is_named(value):
    with pytest.raises(
        SensibertError, match=r"train.csv: row 2, column 'label' is .*, want (one of the 2 classes \(no|an)"
    ):
        ids_of(["no", "yes"], "no", value)


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
