"""The rows of a csv file whose delimiter is a comma, a semicolon, a tab or a vertical bar."""

from __future__ import annotations

import csv
import io
import sys

from ..core.errors import SensibertError

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
ONE_COLUMN = "\x1f"  # the unit separator of ASCII, which no text holds
LONGEST_HEADER = 2**16  # characters

Row = tuple[int, list[str]]  # line number of its beginning, fields


def csv_rows(text: str, name: str) -> list[Row]:
    """All rows that are not empty, the header first; a header without a delimiter makes a single column.

    Where the header holds several of DELIMITERS, the rows decide: the delimiter is the one by which all of them have as
    many fields as the header. SensibertError for text that is not csv, and if no delimiter or several qualify."""
    found = {delimiter: header for delimiter in DELIMITERS if len(header := _header(text, delimiter)) > 1}
    if len(found) < 2:
        return _parse(text, next(iter(found), ONE_COLUMN), name)
    agreeing, reasons = [], []
    for delimiter, header in found.items():
        try:
            rows = _parse(text, delimiter, name)
        except SensibertError as error:
            reasons.append(f"by {DELIMITERS[delimiter]}, {str(error).removeprefix(f'{name}: ')}")
            continue
        odd = next((row for row in rows if len(row[1]) != len(header)), None)
        if odd is None:
            agreeing.append((delimiter, rows))
        else:
            reasons.append(
                f"by {DELIMITERS[delimiter]}, the header has {len(header)} fields and line {odd[0]} has {len(odd[1])}"
            )
    if len(agreeing) == 1:
        return agreeing[0][1]
    if agreeing:
        reasons = [f"by {DELIMITERS[each]}, all rows have {len(rows[0][1])} fields" for each, rows in agreeing]
    raise SensibertError(
        f"{name}: the delimiter is not clear: {'; '.join(reasons)}; want one delimiter, and quotes around fields that "
        "hold another"
    )


def _header(text: str, delimiter: str) -> list[str]:
    """The fields of the first row that is not empty; none if it is not csv with this delimiter."""
    begin = io.StringIO(text[:LONGEST_HEADER], newline="")
    try:
        return next(filter(None, csv.reader(begin, delimiter=delimiter, strict=True)), [])
    except csv.Error:
        return []


def _parse(text: str, delimiter: str, name: str) -> list[Row]:
    """Strict: an unclosed quote is an error and does not absorb the rows after it."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # long contexts are allowed
    rows, line = [], 1
    try:
        for fields in reader:
            if fields:
                rows.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        reason = str(error).replace(f"'{ONE_COLUMN}'", "the end of the line")
        raise SensibertError(f"{name}: line {line}: not csv ({reason})") from error
    finally:
        csv.field_size_limit(limit)
    return rows
