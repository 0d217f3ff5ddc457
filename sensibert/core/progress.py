"""How far long work has come, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
Progress = Callable[[str, int, int | None], None]  # (phase, done, of all; None if that is not known)


def unseen(phase: str, done: int, total: int | None) -> None:
    """Progress that nobody looks at."""


def counted(items: Iterable[T], progress: Progress, phase: str, total: int) -> Iterator[T]:
    """The items; each is told when the next one is read."""
    progress(phase, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        progress(phase, done, total)


def phase_of(step: int, cuts: Collection[int], steps: int) -> tuple[str, int]:
    """(phase of a training that a step belongs to, the phase's last step). cuts: the steps after which it trims."""
    later = [cut for cut in cuts if cut >= step]
    if not later:
        return ("recover" if cuts else "train"), steps
    return ("warm" if len(later) == len(cuts) else "trim"), min(later)
