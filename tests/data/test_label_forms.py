"""Labels in several columns, and names for labels that are integers."""

import pytest

from sensibert.core.errors import SensibertError
from sensibert.data.files import Examples
from sensibert.data.label_forms import joined, named
from sensibert.data.tasks import get_task


def examples(name: str = "train.csv", **columns) -> Examples:
    return Examples(columns, name)


def test_several_columns_become_lists_in_the_order_that_was_given():
    rows = examples(text=["x", "y", "z"], a=[0, 1, 0], b=["1", "1.0", "0"], c=[True, False, False])
    made = joined(rows, ["c", "a", "b"], "c, a,b")
    assert made.columns["c, a,b"] == [["c", "b"], ["a", "b"], []] and made.class_names == {"c, a,b": ["c", "a", "b"]}


@pytest.mark.parametrize(
    "column, message",
    [
        ([0, 2], "train.csv: row 2, column 'b' is 2 (int), want 0 or 1, as in every of several columns of labels"),
        (["0", "yes"], "train.csv: row 2, column 'b' is 'yes' (str), want 0 or 1"),
        ([0.5, 1], "train.csv: row 1, column 'b' is 0.5 (float), want 0 or 1"),
        (["1", ""], "train.csv: row 2, column 'b' is empty"),
    ],
)
def test_a_value_that_is_not_0_or_1_is_named(column, message):
    with pytest.raises(SensibertError) as caught:
        joined(examples(a=[0, 1], b=column), ["a", "b"], "a,b")
    assert str(caught.value).startswith(message)


def test_missing_and_equal_columns_are_named():
    with pytest.raises(SensibertError, match="label_column: train.csv: no column 'c', the columns are 'a', 'b'"):
        joined(examples(a=[0], b=[1]), ["a", "c"], "a,c")
    with pytest.raises(SensibertError, match="label_column is 'a,a', want different columns"):
        joined(examples(a=[0], b=[1]), ["a", "a"], "a,a")


def names_of(task, values, names=("no", "yes"), *others, column="label"):
    data = [examples(f"{name}.csv", **{column: part}) for name, part in zip(("train", "dev"), (values, *others))]
    made = named(get_task(task), data, column, list(names))
    assert all(part.class_names == {column: list(names)} for part in made)
    return [part.columns[column] for part in made]


def test_integers_get_names_in_the_order_of_their_values():
    assert names_of("text-classification", [1, -1, "1.0"]) == [["yes", "no", "yes"]]
    assert names_of("text-classification", ["10", "9"], ("z", "a"), [9.0, "a"]) == [["a", "z"], ["z", "a"]]
    assert names_of("token-classification", [[0, 1], "1 0"], ("O", "B")) == [[["O", "B"], ["B", "O"]]]
    lists = [[0, 1, 0], [0, 1, 1]], ("x", "y", "z"), [[1, 0, 0]]
    assert names_of("multi-label-classification", *lists) == [[["y"], ["y", "z"]], [["x"]]]
    assert names_of("multi-label-classification", [[5, 7], [7], []]) == [[["no", "yes"], ["yes"], []]]


REFUSED = {
    "too many": (
        ("text-classification", [0, 1], ("a", "b", "c")),
        "label_names: 3 names (a, b, c), and column 'label' of train.csv has 2 different labels (0, 1): want one for",
    ),
    "too few": (
        ("text-classification", [-1, 0, 1]),
        "label_names: 2 names (no, yes), and column 'label' of train.csv has 3",
    ),
    "width": (
        ("multi-label-classification", [[0, 1, 1], [0, 0, 0]]),
        "2 names (no, yes), and column 'label' of train.csv has 3",
    ),
    "names": (
        ("text-classification", ["bad", "good"]),
        "label_names: column 'label' of train.csv has names already (bad, good), want integers, or label_names left",
    ),
    "mixture": (
        ("text-classification", ["0", "good"]),
        "row 2, column 'label' is 'good' (str), and an earlier",
    ),
    "fraction": (("text-classification", [0, 0.5]), "train.csv: row 2, column 'label' is 0.5 (float), want an integer"),
    "other integer": (
        ("text-classification", [-1, 1], ("no", "yes"), [1, 0]),
        "dev.csv: row 2, column 'label' is 0 (int), want one of -1, 1, which label_names gives names to",
    ),
    "other length": (
        ("multi-label-classification", [[0, 1, 1], [0, 0, 0]], ("a", "b", "c"), [[0, 0, 0, 1]]),
        "dev.csv: column 'label' holds lists of 4 values, want one for each of the 3 labels (a, b, c)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_that_do_not_fit_the_labels_are_refused(case):
    arguments, message = REFUSED[case]
    with pytest.raises(SensibertError) as caught:
        names_of(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_names_of_a_data_set_stay():
    rows = Examples({"label": [0, 1]}, "hub", {"label": ["neg", "pos"]})
    with pytest.raises(SensibertError, match=r"'label' of hub has names already \(neg, pos\)"):
        named(get_task("text-classification"), [rows], "label", ["a", "b"])
