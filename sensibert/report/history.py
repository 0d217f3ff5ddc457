"""The history of a run: loss, score and size against steps, as rows of run.csv."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FILE = "run.csv"  # in the folder of reports


class Moment(NamedTuple):
    """A step of a run and what is known of it. event: log, cut, evaluation or end. loss: mean since the last log."""

    step: int
    event: str
    loss: float | None = None
    learning_rate: float | None = None
    encoder_params: int | None = None
    score: float | None = None


def history(
    logged: Iterable[Mapping[str, Any]], cuts: Sequence[int], result: Mapping[str, Any], metric: str
) -> list[Moment]:
    """The moments of a run in order.

    logged: log_history of the Trainer. cuts: their steps. result: the content of result.json. metric: the score."""
    moments = [
        Moment(log["step"], "log", log["loss"], log.get("learning_rate"), log.get("sensibert/encoder_params"))
        for log in logged
        if "loss" in log
    ]
    evaluations = (log for log in logged if f"eval_{metric}" in log)
    moments += [Moment(log["step"], "evaluation", score=log[f"eval_{metric}"]) for log in evaluations]
    done = [step for step in cuts if step <= result["steps"]]
    for step in done:
        at_cut = result["metrics_at_cut"] if step == done[0] else None
        size = result["encoder_params_after"] if step == done[-1] else None
        moments.append(Moment(step, "cut", encoder_params=size, score=(at_cut or {}).get(metric)))
    size, score = result["encoder_params_after"], (result["metrics"] or {}).get(metric)
    return [*sorted(moments, key=lambda moment: moment.step), Moment(result["steps"], "end", None, None, size, score)]


def write_history(path: Path, moments: Iterable[Moment]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([Moment._fields, *([_cell(value) for value in moment] for moment in moments)])


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def read_history(path: Path) -> list[Moment]:
    """Inverse of `write_history`. ValueError for a file with other columns or cells."""
    with open(path, newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if tuple(header) != Moment._fields or any(len(row) != len(header) for row in rows):
        raise ValueError(f"columns are {', '.join(header) or 'missing'}, want {', '.join(Moment._fields)}")
    return [_moment(dict(zip(header, row))) for row in rows]


def _moment(cells: Mapping[str, str]) -> Moment:
    def number(name: str) -> float | None:
        return float(cells[name]) if cells[name] else None

    size = int(cells["encoder_params"]) if cells["encoder_params"] else None
    return Moment(int(cells["step"]), cells["event"], number("loss"), number("learning_rate"), size, number("score"))


def losses(moments: Iterable[Moment]) -> list[tuple[int, float]]:
    """(step, loss) of every log."""
    return [(m.step, m.loss) for m in moments if m.loss is not None]


def scores(moments: Iterable[Moment]) -> list[tuple[int, float]]:
    """(step, score): at the first cut, at evaluations and at the end."""
    return [(m.step, m.score) for m in moments if m.score is not None]


def sizes(moments: Sequence[Moment], before: int) -> list[tuple[int, int]]:
    """(step, encoder parameters from there on): a cut changes them after its step. before: of the untrimmed model."""
    known = [(m.step, m.encoder_params) for m in moments if m.encoder_params is not None]
    return [(0, before), *known]


def cut_steps(moments: Iterable[Moment]) -> list[int]:
    return [m.step for m in moments if m.event == "cut"]
