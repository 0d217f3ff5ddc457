"""Columns of examples -> checked texts, class ids, numbers, words, tags and answers; every error names its place."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import SensibertError
from .files import Examples

INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
FLOAT32_MAX = float(np.finfo(np.float32).max)


Place = tuple[int, Any]  # row, value


@dataclass(frozen=True)
class Column:
    """One column of a file. Rows are counted from 1, the header not counted."""

    file: str
    name: str
    values: list

    @classmethod
    def of(cls, examples: Examples, name: str) -> Column:
        if name not in examples.columns:
            seen = ", ".join(repr(c) for c in examples.columns)
            raise SensibertError(f"{examples.name}: no column '{name}', the columns are {seen}")
        return cls(examples.name, name, examples.columns[name])

    def error(self, row: int | None, text: str) -> SensibertError:
        place = "" if row is None else f"row {row + 1}, "
        return SensibertError(f"{self.file}: {place}column '{self.name}' {text}")

    def filled(self) -> Iterator[Place]:
        for row, value in enumerate(self.values):
            if value is None or (isinstance(value, str) and not value.strip()):
                raise self.error(row, "is empty")
            yield row, value


def show(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def texts(column: Column) -> list[str]:
    """The column as it is, once every value is known to be text that UTF-8 can hold. Empty texts are allowed."""
    for row, value in enumerate(column.values):
        if not isinstance(value, str):
            raise column.error(row, "is empty" if value is None else f"is {show(value)}, want text")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise column.error(row, f"holds half a surrogate pair at character {error.start}") from error
    return column.values


def kind(column: Column, values: Iterable[Place]) -> str:
    """'integer', 'number' or 'name' for labels; numbers in strings count as numbers. Mixtures and NaN are errors."""
    first: dict[str, Place] = {}
    for row, value in values:
        first.setdefault(_kind_of(column, row, value), (row, value))
    if "name" in first and {"integer", "number"} & set(first):
        (row, value), (_, other) = sorted((first["name"], first.get("integer") or first["number"]), reverse=True)
        raise column.error(row, f"is {show(value)}, and {show(other)} before: want numbers only or names only")
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
        raise column.error(row, f"is {show(value)}, want an integer, a number or a name")
    text = value.strip()
    patterns = {"integer": INTEGER, "number": NUMBER, "not finite": NOT_FINITE}
    return next((name for name, pattern in patterns.items() if pattern.fullmatch(text)), "name")


def first_number(column: Column, places: Iterable[Place]) -> Place:
    """The first label that is a number and not an integer, where the `kind` is number."""
    return next(place for place in places if _kind_of(column, *place) == "number")


def class_names(column: Column, values: Iterable[Place]) -> list[str]:
    """The classes among a training column's values: sorted names, or '0' to 'n-1' for integers without gaps."""
    places = list(values)
    found = kind(column, places)
    if found == "number":
        row, value = first_number(column, places)
        raise column.error(row, f"is {show(value)}, want an integer or a name (for numbers the task is regression)")
    seen = {str(v).strip() for _, v in places} if found == "name" else {int(v) for _, v in places}
    if len(seen) < 2:
        only = f"only one class, {show(next(iter(seen)))}" if seen else "no labels at all"
        raise column.error(None, f"has {only}: want at least two")
    if found == "name":
        return sorted(seen)
    outside = next((place for place in places if not 0 <= int(place[1]) < len(seen)), None)
    if outside is not None:
        listed = ", ".join(str(i) for i in sorted(seen)[:8]) + (", ..." if len(seen) > 8 else "")
        wish = f"the {len(seen)} integers are {listed}: want 0 to n-1 without gaps, or names"
        raise column.error(outside[0], f"is {show(outside[1])}; {wish} (numbers to predict are the task regression)")
    return [str(i) for i in range(len(seen))]


class ClassIds:
    """Label -> class id, by name first, then, for an integer, as the id itself."""

    def __init__(self, names: Sequence[str]):
        self.names, self.ids = list(names), {name: i for i, name in enumerate(names)}

    def __call__(self, column: Column, row: int, value: Any) -> int:
        name = str(value).strip()
        found = self.ids.get(name)
        if found is None and _kind_of(column, row, value) == "integer" and 0 <= int(value) < len(self.names):
            found = self.ids[name] = int(value)
        if found is None:
            known = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
            raise column.error(row, f"is {show(value)}, want one of the {len(self.names)} classes ({known})")
        return found


def numbers(column: Column) -> np.ndarray:
    """[B] float32, finite."""
    found = []
    for row, value in column.filled():
        try:
            found.append(float(value))
        except (TypeError, ValueError):
            raise column.error(row, f"is {show(value)}, want a number") from None
        if not abs(found[-1]) <= FLOAT32_MAX:
            raise column.error(row, f"is {show(value)}, want a finite number")
    return np.array(found, np.float32)


def lists(column: Column) -> list[list]:
    """Lists as they are, JSON lists in strings, and plain strings cut at white space."""
    found = []
    for row, value in enumerate(column.values):
        if isinstance(value, str):
            value = _json(column, row, value, "list") if value.lstrip().startswith("[") else value.split()
        if not isinstance(value, list):
            raise column.error(row, f"is {show(value)}, want a list")
        found.append(value)
    return found


def _json(column: Column, row: int, value: str, want: str) -> Any:
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        raise column.error(row, f"is {show(value)}, want a JSON {want}") from None


def words(column: Column) -> list[list[str]]:
    found = lists(column)
    for row, sentence in enumerate(found):
        for word in sentence:
            if not isinstance(word, str):
                raise column.error(row, f"holds {show(word)}, want words")
    return found


def tag_values(column: Column, tokens: list[list[str]]) -> list[list]:
    """One tag a word."""
    found = lists(column)
    for row, (tags, sentence) in enumerate(zip(found, tokens)):
        if len(tags) != len(sentence):
            raise column.error(row, f"has {len(tags)} tags for {len(sentence)} tokens")
    return found


def each_tag(column: Column) -> Iterator[Place]:
    for row, tags in enumerate(lists(column)):
        for tag in tags:
            if tag is None or tag == "":
                raise column.error(row, "holds an empty tag")
            yield row, tag


def answers(column: Column, contexts: list[str]) -> list[list[tuple[str, int]]]:
    """[(text, first character)] of every row, each checked to stand in its context; [], or only '', is 'no answer'."""
    found = []
    for row, (value, context) in enumerate(zip(column.values, contexts)):
        if isinstance(value, str):
            value = _json(column, row, value, "object {text: [...], answer_start: [...]}")
        if isinstance(value, list):  # [{text, answer_start}, ...]
            value = {key: [a.get(key) if isinstance(a, dict) else a for a in value] for key in ("text", "answer_start")}
        lists_of = [value.get(key) for key in ("text", "answer_start")] if isinstance(value, dict) else [None]
        lists_of = [[item] if isinstance(item, (str, int)) else item for item in lists_of]
        if not all(isinstance(item, list) for item in lists_of) or len(lists_of[0]) != len(lists_of[1]):
            raise column.error(row, f"is {show(value)}, want text and answer_start, equally long lists")
        for text, start in zip(*lists_of):
            if not isinstance(text, str) or not isinstance(start, int):
                raise column.error(row, f"has text {show(text)} at {show(start)}, want a string and an integer")
            if start < 0 or context[start : start + len(text)] != text:
                stands = show(context[max(start, 0) : max(start, 0) + len(text)])
                raise column.error(row, f"has text {show(text)} at character {start}, where the context has {stands}")
        found.append([answer for answer in zip(*lists_of) if answer[0]])
    return found
