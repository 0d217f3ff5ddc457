"""Several labels a row: lists of names, of integers, or of 0 and 1 -> names of the labels and a matrix of 0 and 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import classes, labels
from .classes import ClassIds
from .labels import Cell, Column, show


def looks_like_list(value: Any) -> bool:
    """Whether a cell is a list, or text in brackets, as a list is written in a csv file."""
    text = value.strip() if isinstance(value, str) else ""
    return isinstance(value, list) or (text.startswith("[") and text.endswith("]"))


@dataclass(frozen=True)
class LabelLists:
    """The labels of every row of a column: names or integers; [] for none.

    width: the length of the lists of 0 and 1 that they were made of, of which a label is a position; else None."""

    column: Column
    rows: list[list]
    width: int | None = None

    @classmethod
    def of(cls, column: Column, count: int | None = None) -> LabelLists:
        """count: how many labels there are, if that is known. SensibertError for a value that is no list, and for lists
        of 0 and 1 of different lengths."""
        rows = [_list(column, row, value) for row, value in enumerate(column.values)]
        width = _width(column, rows, count)
        if width is None:
            return cls(column, rows)
        return cls(column, [[i for i, value in enumerate(row) if classes.whole(value)] for row in rows], width)

    def __iter__(self) -> Iterator[Cell]:
        """(row, label) for every label."""
        return ((row, label) for row, found in enumerate(self.rows) for label in found)

    def names(self) -> list[str]:
        """All labels: the sorted names, integers in numeric order, or the positions. SensibertError for fewer than two,
        or a mixture."""
        return classes.class_names(self.column, self) if self.width is None else [str(i) for i in range(self.width)]

    def matrix(self, names: Sequence[str], numbered: Sequence[str] | None = None) -> np.ndarray:
        """float32 [rows, names]: 1 for the labels of a row. numbered: the names of integers, if they have some.

        SensibertError for a label that is none of the names, and for lists of another length."""
        if self.width not in (None, len(names)):
            wanted = f"want one for each of the {len(names)} labels ({classes.listed(names)})"
            raise self.column.error(None, f"holds lists of {self.width} values, {wanted}")
        ids, matrix = ClassIds(names, numbered), np.zeros((len(self.rows), len(names)), np.float32)
        for row, label in self:
            matrix[row, ids(self.column, row, label)] = 1
        return matrix


def _list(column: Column, row: int, value: Any) -> list:
    if isinstance(value, str) and value.strip().startswith("["):
        value = labels.json_cell(column, row, value, "list")
    if not isinstance(value, list):
        came = "is empty" if value is None or not str(value).strip() else f"is {show(value)}"
        raise column.error(row, f'{came}, want a list of labels such as ["a", "b"], or [] for none')
    value = [int(label) if isinstance(label, bool) else label for label in value]
    for label in value:
        if isinstance(label, str) and not label.strip():
            raise column.error(row, "holds an empty label")
        if not isinstance(label, str) and classes.whole(label) is None:
            raise column.error(row, f"holds {show(label)}, want names or integers")
    return value


def _width(column: Column, rows: list[list], count: int | None) -> int | None:
    """The common length of lists of 0 and 1, a value for each label; None for lists of labels.

    A list with a value twice is no list of labels. SensibertError for lists that may be either, and for such lists of
    different lengths."""
    bits = [[classes.whole(value) for value in row] for row in rows]
    if any(value not in (0, 1) for row in bits for value in row):
        return None
    lengths, twice = {len(row) for row in bits}, any(len(set(row)) < len(row) for row in bits)
    if len(lengths) > 1 and (twice or (count in (None, 2) and [1, 0] in bits)):
        usual = max(lengths, key=[*map(len, bits)].count) if count is None else count
        row = next(row for row, found in enumerate(bits) if len(found) != usual)
        wanted = (
            f"0 or 1 for each of {usual} labels, as in other rows" if count is None else f"{usual}, one for each label"
        )
        raise column.error(row, f"holds {len(bits[row])} values, want {wanted}")
    width = lengths.pop() if len(lengths) == 1 else 0
    return width if width > 1 and (twice or count in (None, width)) else None
