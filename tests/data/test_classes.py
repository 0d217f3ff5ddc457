"""Labels that are names or integers, their order and their ids; a bad one is named with file, row and column."""

import pytest

from sensibert.core.errors import SensibertError
from sensibert.data.classes import ClassIds, class_names, kind
from sensibert.data.files import Examples
from sensibert.data.labels import Column


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
