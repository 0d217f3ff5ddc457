"""Plain text for a terminal: numbers in aligned columns, and no character that commands it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

# Characters that would command the terminal: controls other than tab and newline, changes of direction, half pairs.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with characters that would command a terminal as escapes, `\\x1b`: names from files may have them."""
    return _COMMANDS.sub(lambda match: ascii(match[0])[1:-1], text)


def table(header: Sequence[str], rows: Iterable[Sequence[object]], left: Collection[int] = (0,)) -> str:
    """Aligned plain text: a header line, a rule, and one line per row.

    Integers get thousands separators. left: the left-aligned columns; all others are right-aligned."""
    cells = [list(header)] + [[f"{v:,}" if isinstance(v, int) else str(v) for v in row] for row in rows]
    widths = [max(len(row[c]) for row in cells) for c in range(len(header))]
    lines = []
    for row in cells:
        aligned = (cell.ljust(w) if c in left else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths)))
        lines.append("  ".join(aligned).rstrip())
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def share(after: float, before: float) -> str:
    """`after` as a percentage of `before`, for example "12.5 %"; "-" where before is 0."""
    return f"{100 * after / before:.1f} %" if before else "-"


def number_of(number: int, name: str) -> str:
    """A number of things, for example "1 thread" or "2 threads"."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def short(number: float) -> str:
    """A count in three digits or so, for example "10.6M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:g}"
