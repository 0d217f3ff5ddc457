"""What an annotation takes, and how messages name what came and what was wanted."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sensibert.core.arguments import at_least_one, checked, fits, fraction, in_words, one_of, show, want
from sensibert.core.budget import Budget
from sensibert.core.errors import SensibertError


@pytest.mark.parametrize(
    "value, text",
    [
        ("a'b", '"a\'b"'),
        ("x" * 78, repr("x" * 78)),
        ("x" * 79, "'" + "x" * 76 + "..."),
        (2**200 - 1, f"{str(2**200 - 1)}"),
        (2**200, "a number of 201 bits"),
        (Path("a"), "'a'"),
        (None, "None"),
        (True, "True"),
        ([1], "a list"),
        (int, "the class int"),
        (torch.ones(1), "a Tensor"),
        (ValueError(), "a ValueError"),
        (OSError(), "an OSError"),
    ],
)
def test_a_value_in_a_message(value, text):
    assert show(value) == text


def test_a_similar_name_is_proposed():
    assert one_of("Blue", ["red", "blue"]) == "want one of red, blue; did you mean 'blue'?"
    assert one_of("xyz", (name for name in ("red", "Blue"))) == "want one of red, Blue"


@pytest.mark.parametrize("text, value", [("0.5%", 0.005), ("0.5", 0.5), ("0", 0), ("99.9%", 0.999), (".25", 0.25)])
def test_a_fraction(text, value):
    assert fraction("loss", text) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("text", ["100%", "1", "-1%", "x", "", "%", "nan", "5%%"])
def test_what_is_no_fraction(text):
    message = "^loss is .*, want for example 2%, at least 0% and below 100%$"
    with pytest.raises(SensibertError, match=message):
        fraction("loss", text, "2%")


def test_at_least_one():
    at_least_one(batch=1, length=None)
    with pytest.raises(SensibertError, match="^length is 0, want at least 1$"):
        at_least_one(batch=1, length=0, rows=-1)


@pytest.mark.parametrize(
    "hint, good, bad",
    [
        (Any, [None, 1, "x"], []),
        (int, [1], [True, 1.0, "1", None]),
        (float, [1, 1.5], [False, "1"]),
        (bool, [True], [1, 0, None]),
        (object, [True, 1, None], []),
        (int | None, [1, None], [True, "x"]),
        (Sequence[int], [[1], (1,), range(3), {1}, {1: 2}.keys()], ["ab", b"ab", {1: 2}, torch.ones(2), 3]),
        (Iterable[int], [[1], iter([1]), {1: 2}], ["ab", b"ab", 3]),
        (Mapping[str, int], [{"a": 1}, {}], [[("a", 1)], None]),
        (tuple[int, int], [(1, 2), (1, 2, 3)], [[1, 2]]),
    ],
)
def test_what_fits_an_annotation(hint, good, bad):
    assert [value for value in good if not fits(value, hint)] == []
    assert [value for value in bad if fits(value, hint)] == []


@pytest.mark.parametrize(
    "hint, words",
    [
        (str | None, "text or None"),
        (int | float, "a whole number or a number"),
        (tuple[int, str], "(a whole number, text)"),
        (tuple[int, ...], "a tuple"),
        (list[int], "a list"),
        (Iterable[int], "an Iterable"),
        (nn.Module, "a model (torch.nn.Module)"),
        (Budget, "a Budget such as Budget.parse('50%params')"),
    ],
)
def test_an_annotation_in_words(hint, words):
    assert in_words(hint) == words


@pytest.mark.parametrize(
    "value, hint, message",
    [
        ("x", int, "x is 'x', want a whole number"),
        ([1, "b"], list[int], r"x\[1\] is 'b', want a whole number"),
        ((1, 2.5), Sequence[int], r"x\[1\] is 2.5, want a whole number"),
        ({"a": 1, 2: 3}, dict[str, int], "x: a name is 2, want text"),
        ({"a": "b"}, Mapping[str, int], r"x\['a'\] is 'b', want a whole number"),
        ((1, 2, 3), tuple[int, int], r"x has 3 entries, want \(a whole number, a whole number\)"),
        ((1, "b"), tuple[int, int], r"x\[1\] is 'b', want a whole number"),
        ([["a"]], list[list[int]] | None, r"x\[0\]\[0\] is 'a', want a whole number"),
    ],
)
def test_the_element_that_does_not_fit_is_named(value, hint, message):
    with pytest.raises(SensibertError, match=f"^{message}$"):
        want("x", value, hint)


def test_what_fits_passes():
    for value, hint in (((1, 2), tuple[int, ...]), ({"a": [1]}, dict[str, list[int]]), (None, dict[str, int] | None)):
        want("x", value, hint)


class Named:
    @checked
    def __init__(self, number: int, *rest: int, name: str = "", **more: int) -> None:
        self.given = number, rest, name, more


def test_arguments_are_checked_where_they_are_given():
    assert Named(1, "a", name="b", c="d").given == (1, ("a",), "b", {"c": "d"})  # *rest and **more are not looked at
    with pytest.raises(SensibertError, match="^Named: number is 'x', want a whole number$"):
        Named("x")
    with pytest.raises(SensibertError, match="^Named: name is 3, want text$"):
        Named(1, name=3)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'number'"):
        Named()
