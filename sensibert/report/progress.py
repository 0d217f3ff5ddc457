"""The display of a run on standard error: its phases, and how far each of them is.

On a terminal the present phase is one line that moves, and every finished phase stays as a line above it. Elsewhere
lines are written at the begin and the end of a phase, and in between at most every PACE seconds: those of a training
when the Trainer logs.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text
from transformers.utils import logging as transformers_logging

from ..core.logs import LOGGER
from .phase import TRAINING, Phase, clock

PACE = 10  # seconds between two lines of a phase, without a terminal


class Display(logging.Handler):
    """Where a run is; this one shows nothing.

    Inside its context the bars and messages of transformers are off, and those of the logger `sensibert` are shown."""

    least = logging.WARNING  # level of messages that are shown

    def __init__(self) -> None:
        super().__init__()
        self._libraries = ExitStack()
        self.started = time.perf_counter()
        self.phase: Phase | None = None
        self._aside: float | None = None  # since when an evaluation interrupts the training
        self._level = logging.NOTSET

    def __enter__(self) -> Display:
        self._level = LOGGER.level
        LOGGER.setLevel(self._level or self.least)
        self._libraries.enter_context(_quiet_transformers())
        return self

    def __exit__(self, *_: object) -> None:
        self._libraries.close()
        LOGGER.setLevel(self._level)

    def __call__(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Go on with a phase, or begin another. An evaluation between two steps does not end their phase."""
        now = self.phase
        if now is not None and now.name == name and done >= now.done:
            if self._aside is not None:
                now.began, self._aside = now.began + time.perf_counter() - self._aside, None
            now.done, now.total = done, total
            self.moved(now)
        elif now is not None and now.trains and name == "evaluate":
            self._aside = self._aside or time.perf_counter()
            self.moved(Phase(name, 0, total, done, began=self._aside))
        elif name not in TRAINING or done != total:  # a run may be resumed after its last step
            self.end()
            self.phase = Phase(name, done, total, done)
            self.begun(self.phase)

    def note(self, **facts: str) -> None:
        """Facts that are shown with the phase."""
        if self.phase is not None:
            self.phase.facts |= facts
            self.moved(self.phase)

    def scored(self, metrics: dict[str, float], main: str) -> None:
        """The scores of an evaluation that is done."""
        texts = {name: f"{value:.4f}" for name, value in metrics.items()}
        if self.phase is not None and self._aside is not None:
            self.phase.facts[main] = texts[main]
            self.line(f"step {self.phase.done:,}: {', '.join(f'{name} {text}' for name, text in texts.items())}")
        else:
            self.note(**texts)

    def end(self) -> None:
        """The phase is over."""
        if self.phase is not None:
            self.ended(self.phase)
        self.phase = self._aside = None

    def emit(self, record: logging.LogRecord) -> None:
        label = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self.line(f"{label}{record.getMessage()}")

    def line(self, text: str) -> None:
        """Show a line that stays."""

    def begun(self, phase: Phase) -> None: ...

    def moved(self, phase: Phase) -> None: ...

    def ended(self, phase: Phase) -> None: ...


class Silent(Display):
    """A display that hides warnings too: those of a process whose messages the first one shows."""

    least = logging.ERROR


class _Shown(Display):
    """A display that shows the messages of the logger."""

    least = logging.INFO

    def __enter__(self) -> Display:
        super().__enter__()
        LOGGER.addHandler(self)
        return self

    def __exit__(self, *details: object) -> None:
        LOGGER.removeHandler(self)
        super().__exit__(*details)


class Lines(_Shown):
    """Plain lines with the time since the start."""

    def __init__(self) -> None:
        super().__init__()
        self._shown = 0.0  # when the last line was

    def line(self, text: str) -> None:
        self._shown = time.perf_counter()
        print(f"[{clock(self._shown - self.started)}] {text}", file=sys.stderr, flush=True)

    def begun(self, phase: Phase) -> None:
        steps = f" steps {phase.first + 1:,} to {phase.total:,}" if phase.name in TRAINING else ""
        self.line(f"{phase.label} ...{steps}")

    def note(self, **facts: str) -> None:
        super().note(**facts)
        if self.phase is not None:
            self._tell(self.phase)

    def moved(self, phase: Phase) -> None:
        if phase.name not in TRAINING:  # steps are told when they are logged
            self._tell(phase)

    def _tell(self, phase: Phase) -> None:
        if time.perf_counter() - self._shown >= PACE and phase.done != phase.total:
            left = phase.left()
            times = [f"{clock(phase.seconds())} elapsed", *([] if left is None else [f"{clock(left)} left"])]
            self.line(f"{phase.label:<9} {', '.join([*phase.details(), *times])}")

    def ended(self, phase: Phase) -> None:
        self.line(phase.summary())


class _Details(ProgressColumn):
    """The text beside the bar. It is cut off where the terminal ends."""

    def render(self, task: Task) -> Text:
        phase: Phase | None = task.fields["phase"]
        if phase is None:
            return Text()
        left = phase.left()
        times = clock(phase.seconds()) + ("" if left is None else f" < {clock(left)}")
        return Text("  ".join([times, *phase.details()]), overflow="ellipsis")


class Live(_Shown):
    """One line that moves, below those that stay."""

    def __init__(self) -> None:
        super().__init__()
        label, bar, details = Column(min_width=9), Column(min_width=12), Column(no_wrap=True)
        columns = TextColumn("{task.description}", table_column=label), BarColumn(12, table_column=bar)
        self._bar = Progress(
            *columns, _Details(details), console=Console(stderr=True), refresh_per_second=4, transient=True
        )
        self._task = self._bar.add_task("", visible=False, phase=None)

    def __enter__(self) -> Display:
        super().__enter__()
        self._bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bar.stop()
        super().__exit__(*details)

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begun(self, phase: Phase) -> None:
        self._bar.reset(self._task, total=phase.total, visible=True, description=phase.label, phase=phase)
        self.moved(phase)

    def moved(self, phase: Phase) -> None:
        self._bar.update(self._task, total=phase.total, completed=phase.done, description=phase.label, phase=phase)

    def ended(self, phase: Phase) -> None:
        self._bar.update(self._task, visible=False)
        self.line(phase.summary())


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def display(quiet: bool) -> Display:
    """The display for this process: nothing if quiet, else by whether standard error is a terminal."""
    if quiet:
        return Display()
    return Live() if sys.stderr.isatty() else Lines()
