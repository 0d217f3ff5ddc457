"""Labels that are names or integers -> the names of classes, their order, and the id of a label."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..core.errors import SensibertError
from .labels import Cell, Column, show
from .tasks import MULTI_LABEL

INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
EXACT = 2**53  # whole floats below it are exact


def kind(column: Column, values: Iterable[Cell]) -> str:
    """'integer', 'number' or 'name' for labels; strings that are numbers count as numbers.

    SensibertError for names among numbers, and for NaN and infinity."""
    first: dict[str, Cell] = {}
    for row, value in values:
        first.setdefault(_kind_of(column, row, value), (row, value))
    if "name" in first and {"integer", "number"} & set(first):
        two = (first["name"], first.get("integer") or first["number"])
        (row, value), (_, other) = sorted(two, key=lambda cell: cell[0], reverse=True)  # a list may hold both
        raise column.error(
            row, f"is {show(value)}, and an earlier label is {show(other)}: want numbers only or names only"
        )
    if "name" in first:
        return "name"
    if "not finite" in first:
        row, value = first["not finite"]
        raise column.error(row, f"is {show(value)}, want a label")
    return "number" if "number" in first else "integer"


def _kind_of(column: Column, row: int, value: Any) -> str:
    if isinstance(value, bool):
        return "name"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number" if math.isfinite(value) else "not finite"
    if not isinstance(value, str):
        more = f" (several labels a row: task {MULTI_LABEL})" if isinstance(value, list) else ""
        raise column.error(row, f"is {show(value)}, want an integer, a number or a name{more}")
    text = value.strip()
    patterns = {"integer": INTEGER, "number": NUMBER, "not finite": NOT_FINITE}
    return next((name for name, pattern in patterns.items() if pattern.fullmatch(text)), "name")


def whole(value: Any) -> int | None:
    """The integer that a label is, also as text or with a point (1.0); None for anything else."""
    if isinstance(value, str) and INTEGER.fullmatch(text := value.strip()):
        return int(text)
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < EXACT else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def class_names(column: Column, values: Iterable[Cell]) -> list[str]:
    """The classes in a training column: the sorted names, or integers in numeric order; 1.0 and 1 are the same class.

    SensibertError for fewer than two classes, and for numbers that are not whole."""
    cells = list(values)
    classes: list[Any]
    if kind(column, cells) == "name":
        classes = sorted({str(value).strip() for _, value in cells})
    else:
        classes = sorted({want_whole(column, row, value) for row, value in cells})
    if len(classes) < 2:
        only = f"only one class, {show(classes[0])}" if classes else "no labels at all"
        raise column.error(None, f"has {only}: want at least two")
    return [str(name) for name in classes]


def want_whole(column: Column, row: int, value: Any) -> int:
    """`whole`; SensibertError where it is None."""
    number = whole(value)
    if number is None:
        raise column.error(row, f"is {show(value)}, want an integer or a name (to predict numbers: task regression)")
    return number


def generic(names: Sequence[str]) -> bool:
    """Whether the names only number the classes: LABEL_0, LABEL_1, ... or 0, 1, ..."""
    folded = [name.casefold() for name in names]
    return folded in ([f"label_{i}" for i in range(len(names))], [str(i) for i in range(len(names))])


def positions_of(names: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Where each of `wanted` stands in `names`, upper and lower case being the same; None if they are not the same
    names."""
    folded = [[str(name).casefold() for name in part] for part in (names, wanted)]
    if len(set(folded[0])) < len(names) or sorted(folded[0]) != sorted(folded[1]):
        names, wanted = list(names), list(wanted)
        return [names.index(name) for name in wanted] if sorted(names) == sorted(wanted) else None
    return [folded[0].index(name) for name in folded[1]]


def in_order_of(model: Sequence[str], data: Sequence[str], source: str, file: str) -> list[str]:
    """The classes of the data in the order of a model's outputs, of which there are as many.

    If only one of them has names, these. SensibertError, showing both, if their names differ."""
    if (found := positions_of(data, model)) is not None:
        return [data[i] for i in found]
    if generic(model):
        return list(data)
    if generic(data):
        return list(model)
    raise SensibertError(
        f"model: {source} has the classes {listed(model)}, and {file} has {listed(data)}: want the same names, or a "
        "model without a head for this task"
    )


def listed(names: Iterable[str]) -> str:
    """Up to eight names, for a message."""
    names = list(names)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


class ClassIds:
    """Label -> class id: the label with that name; where no name is a number, an integer is LABEL_i, or the id itself.
    A whole number with a point is the integer.

    numbered: the names of the integers in a column, where the data set has them. Upper and lower case are the same if
    no two names differ by it only. SensibertError for a label that is no class."""

    def __init__(self, names: Sequence[str], numbered: Sequence[str] | None = None) -> None:
        self.names, self.ids = list(names), {name: i for i, name in enumerate(names)}
        folded = {name.casefold(): i for i, name in enumerate(names)}
        self.folded = folded if len(folded) == len(names) else {}
        self.numbered = None if numbered is None or generic(names) else list(numbered)
        self.counts = self.numbered is None and not any(NUMBER.fullmatch(name) for name in names)

    def __call__(self, column: Column, row: int, value: Any) -> int:
        name = str(value).strip()
        label = self.ids.get(name, self.folded.get(name.casefold()))
        if label is None and (number := whole(value)) is not None:
            label = self._of_integer(number)
        if label is None:
            known, own = listed(self.names), f"; its integers are {listed(self.numbered)}" if self.numbered else ""
            raise column.error(row, f"is {show(value)}, want one of the {len(self.names)} classes ({known}){own}")
        self.ids[name] = label
        return label

    def _of_integer(self, value: int) -> int | None:
        if self.numbered is not None:
            name = self.numbered[value] if 0 <= value < len(self.numbered) else ""
            return self.ids.get(name, self.folded.get(name.casefold()))
        for name in (str(value), f"label_{value}"):
            if (label := self.ids.get(name, self.folded.get(name))) is not None:
                return label
        return value if self.counts and 0 <= value < len(self.names) else None
