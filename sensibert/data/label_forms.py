"""Labels as files have them -> one column: several columns of 0 and 1 become lists, integers get names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ..core.errors import SensibertError
from . import classes, labels
from .files import Examples
from .labels import Cell, Column, show
from .multi_label import LabelLists
from .tasks import MULTI_LABEL, Task


def joined(examples: Examples, names: Sequence[str], into: str) -> Examples:
    """With one more column, called `into`, that lists for every row those of `names` whose column holds 1.

    SensibertError for a column that is missing or given twice, and for a value other than 0 and 1."""
    if len(set(names)) < len(names):
        raise SensibertError(f"label_column is '{into}', want different columns")
    columns = [Column.of(examples, name, "label_column") for name in names]
    rows: list[list[str]] = [[] for _ in range(len(examples))]
    for column in columns:
        for row, value in column.filled():
            bit = int(value) if isinstance(value, bool) else classes.whole(value)
            if bit not in (0, 1):
                raise column.error(row, f"is {show(value)}, want 0 or 1, as in every of several columns of labels")
            if bit:
                rows[row].append(column.name)
    class_names = examples.class_names | {into: list(names)}
    return replace(examples, columns=examples.columns | {into: rows}, class_names=class_names)


def cells_of(task: Task, column: Column) -> Iterable[Cell]:
    """(row, label) of every label of a column, of a task with classes. SensibertError at an empty one."""
    if task.name == MULTI_LABEL:
        return LabelLists.of(column)
    return labels.each_tag(column) if task.name == "token-classification" else column.filled()


def named(task: Task, data: Sequence[Examples], label: str, names: list[str]) -> list[Examples]:
    """The data with `names` in place of the integers of a column, in the order of their values in the first of them.

    SensibertError if there are more or fewer different integers, or labels that have names already."""
    first, column = data[0], Column.of(data[0], label)
    if label in first.class_names:
        raise _named_already(first, label, first.class_names[label])
    cells = list(cells_of(task, column))
    if classes.kind(column, cells) == "name":
        raise _named_already(first, label, sorted({str(value).strip() for _, value in cells}))
    lists = LabelLists.of(column) if task.name == MULTI_LABEL else None
    values = sorted({classes.want_whole(column, *cell) for cell in cells})
    if lists is not None and lists.width is not None:
        values = list(range(lists.width))
    if len(values) != len(names):
        raise SensibertError(
            f"label_names: {len(names)} names ({classes.listed(names)}), and column '{label}' of {first.name} has "
            f"{len(values)} different labels ({classes.listed(map(str, values))}): want one for each, in this order"
        )
    name_of = dict(zip(values, names, strict=True))
    return [_renamed(task, examples, label, name_of) for examples in data]


def _named_already(examples: Examples, label: str, names: Sequence[str]) -> SensibertError:
    return SensibertError(
        f"label_names: column '{label}' of {examples.name} has names already ({classes.listed(names)}), want integers, "
        "or label_names left out"
    )


def _renamed(task: Task, examples: Examples, label: str, name_of: dict[int, str]) -> Examples:
    column = Column.of(examples, label)

    def name(row: int, value: Any) -> Any:
        number = classes.whole(value)
        if number is None:  # a name, or nothing that is a label
            return value
        if number not in name_of:
            known = classes.listed(map(str, name_of))
            raise column.error(row, f"is {show(value)}, want one of {known}, which label_names gives names to")
        return name_of[number]

    values: list[Any]
    if task.name == "token-classification":
        values = [[name(row, tag) for tag in tags] for row, tags in enumerate(labels.lists(column))]
    elif task.name == MULTI_LABEL:
        lists = LabelLists.of(column, len(name_of))
        if lists.width is not None:
            lists.matrix(list(name_of.values()))  # refuses lists of another length
        values = [[name(row, each) for each in found] for row, found in enumerate(lists.rows)]
    else:
        values = [name(row, value) for row, value in column.filled()]
    class_names = examples.class_names | {label: list(name_of.values())}
    return replace(examples, columns=examples.columns | {label: values}, class_names=class_names)
