"""A phase of a run: how far it is, and what it did."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

TRAINING = ("train", "warm", "trim", "recover")
LABELS = {"warm": "warm-up"}
UNITS = dict.fromkeys(TRAINING, ("step", "steps")) | {"analyze": ("micro-batch", "micro-batches")}
UNITS |= {"embed": ("text", "texts")}
BATCHES = "batch", "batches"  # of all others


@dataclass
class Phase:
    """A phase of a run. first, done: counts at its begin and now, of total (None: not known). facts: shown with it."""

    name: str
    first: int = 0
    total: int | None = None
    done: int = 0
    facts: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=lambda: time.perf_counter())

    @property
    def label(self) -> str:
        return LABELS.get(self.name, self.name)

    def counted(self, text: str, count: int) -> str:
        """The text and the unit that the phase counts in."""
        return f"{text} {UNITS.get(self.name, BATCHES)[count != 1]}"

    @property
    def trains(self) -> bool:
        """Whether it is a training that goes on."""
        return self.name in TRAINING and self.done != self.total

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def details(self) -> list[str]:
        """Count, facts, and steps a second, as far as they are known."""
        parts = [self.counted(f"{self.done:,}/{self.total:,}", self.total)] if self.total else []
        if self.name in TRAINING and self.done > self.first:
            parts.append(f"{(self.done - self.first) / self.seconds():.1f} steps/s")
        return parts + [f"{name} {value}" for name, value in self.facts.items()]

    def left(self) -> float | None:
        """Seconds until its end, if it goes on as before; None if that is not known."""
        if not self.total or self.done == self.first:
            return None
        return self.seconds() * (self.total - self.done) / (self.done - self.first)

    def summary(self) -> str:
        """What it did, once it is over."""
        count = self.done - self.first
        parts = [self.counted(f"{count:,}", count)] if count else []
        parts.append(f"{self.seconds():.1f} s")
        return f"{self.label:<9} {', '.join([*parts, *(f'{name} {value}' for name, value in self.facts.items())])}"


def clock(seconds: float) -> str:
    """12 -> "0:00:12"."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
