"""The latency in a result, in the form that tables and plots need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Times(NamedTuple):
    """Milliseconds of a forward pass of the untrimmed and of the trimmed model, and what was timed, in words."""

    what: str
    before: float
    after: float


def timings(facts: Mapping[str, Any]) -> list[Times]:
    """One entry for each batch size that was timed, the smallest first; empty if none was."""
    latency, found = facts.get("latency") or {}, []
    for name, times in latency.items():
        if name.startswith("batch_"):
            rows = name.removeprefix("batch_").removesuffix("_ms")
            found.append(Times(f"latency of {rows} x {latency['length']} tokens", times["before"], times["after"]))
    return found


def one_text(facts: Mapping[str, Any]) -> Times | None:
    """The times of the smallest batch."""
    return next(iter(timings(facts)), None)
