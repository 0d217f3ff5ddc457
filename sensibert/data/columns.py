"""Which columns hold the inputs and the labels of a task, and which task the columns are for."""

from __future__ import annotations

from ..core.errors import SensibertError
from . import classes, labels
from .files import Examples
from .labels import Column
from .multi_label import looks_like_list
from .tasks import MULTI_LABEL, Task

# Up to so many different whole numbers are guessed to be classes: written with a point, or as integers with gaps.
CLASSES_WITH_POINT, CLASSES_WITH_GAPS = 2, 20


def guess_task(
    examples: Examples, text_column: str | None = None, label_column: str | None = None, named: bool = False
) -> str:
    """Guess the task from the columns, and for single labels from their values.

    named: single labels are classes, whatever their values, as there are names for them. SensibertError if there is no
    label column, or if the labels may be classes or numbers."""
    columns = examples.columns
    chosen = set((text_column or "").split(",")) | {label_column}
    if {"question", "context", "answers"} <= set(columns) and chosen <= {"", None, "question", "context", "answers"}:
        return "question-answering"
    label = label_column
    if label is None:
        label = next((c for c in ("label", "tags", "ner_tags", "labels") if c in columns), None)
    if label is None:
        existing = ", ".join(repr(c) for c in columns)
        raise SensibertError(
            f"{examples.name}: no column 'label', 'labels', 'tags' or 'answers', the columns are {existing}"
        )
    column = Column.of(examples, label, "" if label_column is None else "label_column")
    if label in ("tags", "ner_tags"):
        return "token-classification"
    if looks_like_list(column.values[0]):
        words = text_column.split(",")[0] if text_column else "tokens"
        of_words = words in columns and (words == "tokens" or looks_like_list(columns[words][0]))
        return "token-classification" if of_words else MULTI_LABEL
    return "text-classification" if named else _of_values(column)


def _of_values(column: Column) -> str:
    """Names and whole numbers are classes, other numbers are to be predicted. SensibertError for too many different
    whole numbers, which may be either."""
    kind = classes.kind(column, column.filled())
    if kind == "name":
        _want_decimal_points(column)
        return "text-classification"
    numbers = [classes.whole(value) for value in column.values]
    different = set(numbers)
    if None in different:
        return "regression"
    counted = set(range(len(different))) if kind == "integer" else set()
    if different == counted or len(different) <= (CLASSES_WITH_GAPS if kind == "integer" else CLASSES_WITH_POINT):
        return "text-classification"
    row = next(row for row, number in enumerate(numbers) if number not in counted)
    raise column.error(
        row,
        f"is {labels.show(column.values[row])}, and all labels are whole numbers, {len(different)} different ones: "
        "want a task, text-classification for classes or regression for numbers",
    )


def _want_decimal_points(column: Column) -> None:
    """SensibertError if all labels are numbers with a decimal comma, which would be read as names."""
    if all(
        isinstance(value, str) and classes.NUMBER.fullmatch(value.strip().replace(",", ".")) for value in column.values
    ):
        raise column.error(0, f"is {labels.show(column.values[0])}, want a decimal point, or a task if these are names")


def columns_of(task: Task, examples: Examples, text: str | None, label: str | None) -> tuple[tuple[str, ...], str]:
    """The input columns and the label column of the examples for this task."""
    inputs: tuple[str, ...] | None
    if text is not None:
        inputs = (text,) if text in examples.columns else tuple(part.strip() for part in text.split(","))
    else:
        inputs = next((c for c in task.input_columns if set(c) <= set(examples.columns)), None)
    if inputs is None:
        wanted = " or ".join(", ".join(repr(c) for c in columns) for columns in task.input_columns)
        existing = ", ".join(repr(c) for c in examples.columns)
        raise SensibertError(f"{examples.name}: {task.name} wants the columns {wanted}; the columns are {existing}")
    counts = {len(columns) for columns in task.input_columns}
    if len(inputs) not in counts:
        wanted = " or ".join(map(str, sorted(counts)))
        raise SensibertError(f"text_column is '{text}', {task.name} takes {wanted} columns, separated by commas")
    for name in inputs if text is not None else ():
        Column.of(examples, name, "text_column")
    if label is not None:
        Column.of(examples, label, "label_column")
        return inputs, label
    return inputs, next((c for c in task.label_columns if c in examples.columns), task.label_columns[0])
