"""Local files, or data sets on the hub -> columns of values. Strings such as 'NA' are not converted."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import SensibertError, first_line
from ..core.json_text import parse_json
from .delimiters import csv_rows

# Compressed content may have this many bytes, or this many times those of its file.
FREE_BYTES, RATIO = 2**28, 100
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Examples:
    """Rows as columns of equal length.

    name: the file or data set, for messages. class_names: column -> names of its classes, where the hub has them."""

    columns: dict[str, list]
    name: str
    class_names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def load_examples(source: str, split: str | None = None) -> Examples:
    """Read a csv, tsv, jsonl, json, parquet or txt file (each also with .gz), or the data set `name` or `name:config`.

    split: of a data set on the hub, by default 'train'. SensibertError if the data are missing, empty or malformed; it
    names the file and line."""
    if not source:
        raise SensibertError("'' is no file, want the name of one")
    path = Path(source)
    parts = path.name.lower().split(".")[1:]
    suffix = parts[-2] if len(parts) > 1 and parts[-1] == "gz" else "".join(parts[-1:])
    if os.path.isfile(source):
        if suffix not in READERS:
            known = ", ".join(f".{name}" for name in READERS)
            raise SensibertError(f"{source}: unknown suffix '.{suffix}', want {known}, each also with .gz")
        examples = Examples(READERS[suffix](_read(path), source), source)
    elif os.path.exists(source):
        raise SensibertError(f"{source} is a folder, want a file")
    elif suffix in READERS or path.parent.name and path.parent.is_dir() or not HUB_NAME.fullmatch(source):
        raise SensibertError(f"{source}: no such file")
    else:
        examples = _from_hub(source, split or "train")
    if len(examples) == 0:
        raise SensibertError(f"{source} holds no rows")
    return examples


def _read(path: Path) -> bytes:
    try:
        return _decompressed(path) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SensibertError(f"{path} is not a complete gzip file ({error})") from error
    except OSError as error:
        raise SensibertError(f"{path}: {error.strerror or error}") from error


def _decompressed(path: Path) -> bytes:
    """The content of a gzip file, read in parts: nothing beyond the bounds is ever in memory."""
    bound = max(FREE_BYTES, RATIO * path.stat().st_size)
    content = bytearray()
    with gzip.open(path) as file:
        while part := file.read(2**20):
            content += part
            if len(content) > bound:
                raise SensibertError(
                    f"{path}: holds more than {bound / 1e6:.0f} MB, over {RATIO} times its own size; want it unpacked"
                )
    return bytes(content)


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SensibertError(f"{name}: line {line}: byte 0x{data[error.start]:02x} is not UTF-8") from error


def _table(rows: list[tuple[int, list[str]]], name: str) -> dict[str, list]:
    """rows: (line number, fields); the first one is the header."""
    if not rows:
        raise SensibertError(f"{name} is empty, want a header and rows")
    header = rows[0][1]
    for column in header:
        if header.count(column) > 1:
            raise SensibertError(f"{name}: column '{column}' appears twice in the header")
    for line, fields in rows[1:]:
        if len(fields) != len(header):
            raise SensibertError(
                f"{name}: line {line}: {len(fields)} fields, want {len(header)} ({', '.join(header)[:80]})"
            )
    return {column: [fields[i] for _, fields in rows[1:]] for i, column in enumerate(header)}


def _read_csv(data: bytes, name: str) -> dict[str, list]:
    return _table(csv_rows(_decode(data, name), name), name)


def _read_tsv(data: bytes, name: str) -> dict[str, list]:
    """Quotes are parsed as in csv if every line is well formed; otherwise they are plain text, as in GLUE."""
    lines = [(i, line.rstrip("\r")) for i, line in enumerate(_decode(data, name).split("\n"), 1)]
    lines = [(i, line) for i, line in lines if line]
    plain = [(i, line.split("\t")) for i, line in lines]
    if any(field.startswith('"') for _, fields in plain for field in fields):
        try:
            quoted = [(i, next(csv.reader([line], delimiter="\t", strict=True))) for i, line in lines]
        except csv.Error:
            return _table(plain, name)
        if len({len(fields) for _, fields in quoted}) == 1:
            return _table(quoted, name)
    return _table(plain, name)


def _parse_json(text: str, name: str, line: int | None = None) -> Any:
    try:
        return parse_json(text, any_size=True)
    except ValueError as error:
        msg, place = getattr(error, "msg", error), line or getattr(error, "lineno", None)
        raise SensibertError(f"{name}: {f'line {place}: ' if place else ''}not JSON ({msg})") from error


def _records(rows: list[tuple[str, Any]], name: str) -> dict[str, list]:
    """rows: (place for messages, object). Keys that an object lacks are None in its row."""
    columns: dict[str, list] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            raise SensibertError(f"{name}: {where} is {type(row).__name__}, want an object with named fields")
        columns.update({key: [] for key in row if key not in columns})
    return {key: [row.get(key) for _, row in rows] for key in columns}


def _read_jsonl(data: bytes, name: str) -> dict[str, list]:
    lines = [(i, line) for i, line in enumerate(_decode(data, name).split("\n"), 1) if line.strip()]
    return _records([(f"line {i}", _parse_json(line, name, i)) for i, line in lines], name)


def _read_json(data: bytes, name: str) -> dict[str, list]:
    """A list of objects, {"data": a list of objects}, a SQuAD file, or an object of columns."""
    content = _parse_json(_decode(data, name), name)
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
        if content and isinstance(content[0], dict) and "paragraphs" in content[0]:
            content = _squad_rows(content, name)
    if isinstance(content, list):
        return _records([(f"row {i}", row) for i, row in enumerate(content, 1)], name)
    if not (isinstance(content, dict) and content and all(isinstance(v, list) for v in content.values())):
        raise SensibertError(f"{name}: want a list of objects, or one object of equally long lists")
    if len({len(values) for values in content.values()}) > 1:
        lengths = ", ".join(f"{key} {len(values)}" for key, values in content.items())
        raise SensibertError(f"{name}: columns differ in length ({lengths})")
    return content


def _squad_rows(articles: list, name: str) -> list[dict]:
    """One row per question of a SQuAD file."""
    try:
        return [
            {
                "id": qa["id"],
                "context": paragraph["context"],
                "question": qa["question"],
                "answers": {key: [answer[key] for answer in qa["answers"]] for key in ("text", "answer_start")},
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise SensibertError(f"{name}: 'data' holds paragraphs but is not a SQuAD file ({error!r})") from error


def _read_parquet(data: bytes, name: str) -> dict[str, list]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        size = max(sum(group.total_byte_size for group in groups), file.metadata.num_rows * file.metadata.num_columns)
        if size > (bound := max(FREE_BYTES, RATIO * len(data))):
            raise SensibertError(
                f"{name}: holds more than {bound / 1e6:.0f} MB, over {RATIO} times its own size; want csv or jsonl"
            )
        return file.read().to_pydict()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, SensibertError):
            raise
        raise SensibertError(f"{name}: not parquet ({first_line(error)})") from error


def _read_txt(data: bytes, name: str) -> dict[str, list]:
    """One text a line; empty lines are left out."""
    return {"text": [line.strip() for line in _decode(data, name).splitlines() if line.strip()]}


READERS: dict[str, Callable[[bytes, str], dict[str, list]]] = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
    "txt": _read_txt,
}


def _from_hub(source: str, split: str) -> Examples:
    import datasets

    name, _, config = source.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # datasets raises errors of its own, of the hub, of pyarrow and of fsspec
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SensibertError(f"{source} is not a file, and cannot be loaded from the hub ({reason})") from error
    class_names = {}
    for column, feature in data.features.items():
        names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
        if names:
            class_names[column] = list(names)
    return Examples(data.to_dict(), f"{source}[{split}]", class_names)


def texts_of(examples: Examples) -> Iterator[str]:
    """Every text of every column; words that are apart are joined by spaces."""
    for column in examples.columns.values():
        for value in column:
            if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
                yield " ".join(value)
            elif isinstance(value, str) and value:
                yield value
