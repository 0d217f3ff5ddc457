"""Columns of examples -> checked texts, numbers, words, tags and answers; class ids are in `classes`.

Every error names file, row and column, the value, and what was expected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.arguments import did_you_mean
from ..core.errors import SensibertError
from ..core.json_text import parse_json
from .files import Examples

FLOAT32_MAX = float(np.finfo(np.float32).max)

Cell = tuple[int, Any]  # row (from 0), value


@dataclass(frozen=True)
class Column:
    """One column of a file. Messages count rows from 1, without the header."""

    file: str
    name: str
    values: list

    @classmethod
    def of(cls, examples: Examples, name: str, argument: str = "") -> Column:
        """The column of that name; SensibertError names the existing ones, and the argument that chose it, if any."""
        if name not in examples.columns:
            existing = ", ".join(repr(c) for c in examples.columns) + did_you_mean(name, map(str, examples.columns))
            place = f"{argument}: {examples.name}" if argument else examples.name
            raise SensibertError(f"{place}: no column {name!r}, the columns are {existing}")
        return cls(examples.name, name, examples.columns[name])

    def error(self, row: int | None, text: str) -> SensibertError:
        """The error whose message is file, row, column, then `text`; row None: the whole column."""
        place = "" if row is None else f"row {row + 1}, "
        return SensibertError(f"{self.file}: {place}column '{self.name}' {text}")

    def filled(self) -> Iterator[Cell]:
        """All cells; SensibertError at an empty one."""
        for row, value in enumerate(self.values):
            if value is None or (isinstance(value, str) and not value.strip()):
                raise self.error(row, "is empty")
            yield row, value


def show(value: Any) -> str:
    """A value and its type for a message, shortened to 40 characters."""
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def texts(column: Column) -> list[str]:
    """The values, all of them text that UTF-8 can encode. Empty texts are allowed, missing ones are not."""
    for row, value in enumerate(column.values):
        if not isinstance(value, str):
            raise column.error(row, "is empty" if value is None else f"is {show(value)}, want text")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise column.error(row, f"holds half a surrogate pair at character {error.start}") from error
    return column.values


def numbers(column: Column) -> np.ndarray:
    """The column as float32 [rows]; SensibertError for a value that is no finite number."""
    result = []
    for row, value in column.filled():
        try:
            result.append(float(value))
        except (TypeError, ValueError, OverflowError):
            raise column.error(row, f"is {show(value)}, want a number") from None
        if not abs(result[-1]) <= FLOAT32_MAX:
            raise column.error(row, f"is {show(value)}, want a finite number")
    return np.array(result, np.float32)


def lists(column: Column) -> list[list]:
    """The values as lists: lists as they are, strings parsed as JSON if they begin with [, else split at spaces."""
    result = []
    for row, value in enumerate(column.values):
        if isinstance(value, str):
            value = json_cell(column, row, value, "list") if value.lstrip().startswith("[") else value.split()
        if not isinstance(value, list):
            raise column.error(row, f"is {show(value)}, want a list")
        result.append(value)
    return result


def json_cell(column: Column, row: int, value: str, want: str) -> Any:
    """A cell of JSON; SensibertError if it is not."""
    try:
        return parse_json(value, any_size=True)
    except ValueError:
        raise column.error(row, f"is {show(value)}, want a JSON {want}") from None


def words(column: Column) -> list[list[str]]:
    """The words of every row; SensibertError for a list with anything but strings."""
    sentences = lists(column)
    for row, sentence in enumerate(sentences):
        for word in sentence:
            if not isinstance(word, str):
                raise column.error(row, f"holds {show(word)}, want words")
    return sentences


def tag_values(column: Column, tokens: list[list[str]]) -> list[list]:
    """The tags of every row; SensibertError unless there is one per word."""
    rows = lists(column)
    for row, (tags, sentence) in enumerate(zip(rows, tokens)):
        if len(tags) != len(sentence):
            raise column.error(row, f"has {len(tags)} tags for {len(sentence)} tokens")
    return rows


def each_tag(column: Column) -> Iterator[Cell]:
    """(row, tag) for every tag; SensibertError at an empty one."""
    for row, tags in enumerate(lists(column)):
        for tag in tags:
            if tag is None or tag == "":
                raise column.error(row, "holds an empty tag")
            yield row, tag


def answers(column: Column, contexts: list[str]) -> list[list[tuple[str, int]]]:
    """[(text, first character), ...] of every row; [] is 'no answer'.

    A value is {text: [...], answer_start: [...]}, a list of {text, answer_start}, or either as JSON. SensibertError for
    any other value, and for a text that is not at that character of its context."""
    result: list[list[tuple[str, int]]] = []
    for row, (value, context) in enumerate(zip(column.values, contexts)):
        if isinstance(value, str):
            value = json_cell(column, row, value, "object {text: [...], answer_start: [...]}")
        if isinstance(value, list):  # [{text, answer_start}, ...]
            value = {key: [a.get(key) if isinstance(a, dict) else a for a in value] for key in ("text", "answer_start")}
        pair = [value.get(key) if isinstance(value, dict) else None for key in ("text", "answer_start")]
        golds, starts = ([item] if isinstance(item, (str, int)) else item for item in pair)
        if not isinstance(golds, list) or not isinstance(starts, list) or len(golds) != len(starts):
            raise column.error(row, f"is {show(value)}, want text and answer_start, equally long lists")
        for text, start in zip(golds, starts):
            if not isinstance(text, str) or not isinstance(start, int):
                raise column.error(row, f"has text {show(text)} at {show(start)}, want a string and an integer")
            if start < 0 or context[start : start + len(text)] != text:
                there = show(context[max(start, 0) : max(start, 0) + len(text)])
                raise column.error(row, f"has text {show(text)} at character {start}, where the context has {there}")
        result.append([(text, start) for text, start in zip(golds, starts) if text])
    return result
