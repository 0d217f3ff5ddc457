"""What a plan or a sensitivity shows of itself: lines for `repr`, the same as a small HTML table in notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .text import table

MOST_ROWS = 6  # of a table in a repr; of more, the first and the last ones are shown


@dataclass(frozen=True)
class View:
    """Lines of text, and a table below them."""

    lines: tuple[str, ...]
    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def text(self) -> str:
        return "\n".join([*self.lines, table(self.header, _few(self.rows))])

    def html(self) -> str:
        """All rows; style and script are left to the notebook."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.header)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in self.rows)
        lines = "".join(f"<p>{escape(line)}</p>" for line in self.lines)
        return f"{lines}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    return f"<td>{escape(f'{value:,}' if isinstance(value, int) else str(value))}</td>"


def _few(rows: Sequence[Sequence[object]]) -> list[Sequence[object]]:
    if len(rows) <= MOST_ROWS:
        return list(rows)
    half = MOST_ROWS // 2
    return [*rows[:half], [f"... {len(rows) - 2 * half} more", *[""] * (len(rows[0]) - 1)], *rows[-half:]]
