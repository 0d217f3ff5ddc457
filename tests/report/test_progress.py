"""The display of a run without a terminal. tests/test_console.py looks at whole runs, also in one."""

import logging
import re

import pytest
from transformers.utils import logging as transformers_logging

from sensibert.core.logs import LOGGER
from sensibert.report import phase, progress
from sensibert.report.phase import clock
from sensibert.report.progress import Display, Lines, display


@pytest.fixture
def lines(capsys):
    """A function that returns the lines of standard error since it was last called, without their times."""
    return lambda: [re.sub(r"^\[\d:\d\d:\d\d\] ", "", line) for line in capsys.readouterr().err.splitlines()]


def test_a_phase_has_a_line_at_its_begin_and_one_at_its_end(lines):
    shown = Lines()
    shown("load")
    shown("warm", 0, 20)
    shown("warm", 20, 20)
    shown.note(loss="0.5")
    shown("analyze")
    shown("analyze", 1, 1)
    shown.end()
    begun, *rest = lines()
    assert (begun, rest[0][:10], rest[1]) == ("load ...", "load      ", "warm-up ... steps 1 to 20")
    assert re.fullmatch(r"warm-up   20 steps, \d\.\d s, loss 0\.5", rest[2]) and rest[3] == "analyze ..."
    assert re.fullmatch(r"analyze   1 micro-batch, \d\.\d s", rest[4]) and len(rest) == 5


def test_between_them_lines_come_at_a_steady_pace(lines, monkeypatch):
    monkeypatch.setattr(progress, "PACE", 0)
    shown = Lines()
    shown("recover", 10, 30)
    shown("recover", 20, 30)
    assert lines() == ["recover ... steps 11 to 30"]
    shown.note(loss="0.5")  # when the Trainer logs
    (line,) = lines()
    assert re.fullmatch(r"recover   20/30 steps, [\d.]+ steps/s, loss 0\.5, 0:00:0\d elapsed, 0:00:0\d left", line), (
        line
    )
    monkeypatch.setattr(progress, "PACE", 1000)
    shown.note(loss="0.4")
    shown("analyze", 0, 3)
    lines()
    shown("analyze", 1, 3)
    assert lines() == []
    monkeypatch.setattr(progress, "PACE", 0)
    shown("analyze", 2, 3)
    assert lines()[0].startswith("analyze   2/3 micro-batches, ")
    shown("analyze", 3, 3)
    assert lines() == []  # the line at its end follows


def test_an_evaluation_between_two_steps_is_one_line_of_their_phase(lines):
    shown = Lines()
    shown("recover", 10, 30)
    shown("recover", 20, 30)
    shown("evaluate", 0, 2)
    shown("evaluate", 2, 2)
    shown.scored({"accuracy": 0.5, "f1": 0.25}, "accuracy")
    shown("recover", 30, 30)
    assert lines() == ["recover ... steps 11 to 30", "step 20: accuracy 0.5000, f1 0.2500"]
    shown("evaluate", 2, 2)
    shown.scored({"accuracy": 1.0}, "accuracy")
    shown.end()
    ended, begun, scored = lines()
    assert re.fullmatch(r"recover   20 steps, \d\.\d s, accuracy 0\.5000", ended) and begun == "evaluate ..."
    assert scored.endswith("s, accuracy 1.0000")


def test_the_time_of_such_an_evaluation_is_not_that_of_the_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(phase.time, "perf_counter", lambda: now[0])
    shown = Display()
    for name, done, second in (("recover", 0, 0), ("recover", 1, 2), ("evaluate", 0, 2), ("recover", 2, 9)):
        now[0] = float(second)
        shown(name, done, 4)
    assert shown.phase.seconds() == 2 and shown.phase.left() == 2


def test_messages_of_the_package_are_shown_and_the_logger_is_left_as_it_was(lines):
    before, bars = (LOGGER.level, list(LOGGER.handlers)), transformers_logging.is_progress_bar_enabled()
    with Lines():
        LOGGER.info("cut at step %d", 4)
        LOGGER.warning("no head")
        assert not transformers_logging.is_progress_bar_enabled()
    assert lines() == ["cut at step 4", "warning: no head"]
    assert (LOGGER.level, LOGGER.handlers) == before and transformers_logging.is_progress_bar_enabled() == bars


def test_a_quiet_display_shows_nothing_but_leaves_warnings_to_others(lines, caplog):
    with display(quiet=True) as shown:
        shown("load")
        shown.line("here")
        LOGGER.info("cut")
        LOGGER.warning("no head")
    assert lines() == [] and [record.levelno for record in caplog.records] == [logging.WARNING]


def test_times_are_hours_minutes_and_seconds():
    assert [clock(seconds) for seconds in (0.9, 61, 3600 * 11 + 59)] == ["0:00:00", "0:01:01", "11:00:59"]
