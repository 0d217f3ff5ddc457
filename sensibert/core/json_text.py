"""JSON that somebody else may have written: read strictly, so that nothing in it is overlooked."""

from __future__ import annotations

import json
from typing import Any

BITS = 63  # of the whole numbers in files of ours


def parse_json(text: str, any_size: bool = False) -> Any:
    """The value of a JSON text. any_size: also whole numbers of more than 63 bits.

    ValueError for a text that is not JSON, is nested too deeply, names an entry twice (Python would take the last one)
    or has a number that is too large."""
    try:
        return (_ANY_SIZE if any_size else _OURS).decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"{twice[:40]!r} is given twice")
    return made


def _whole_number(digits: str) -> int:
    if len(digits) > 20 or abs(value := int(digits)) >= 2**BITS:
        raise ValueError(f"the number {digits[:20]}... has {len(digits)} digits, want at most {BITS} bits")
    return value


_ANY_SIZE = json.JSONDecoder(object_pairs_hook=_object)
_OURS = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole_number)
