"""The smallest model that keeps a fraction of the baseline's score (`--keep 99%`).

Bisection over budgets, each with a whole recovery from one warm-up and one analysis: a short one says little, since
what a small model has not relearned yet it may still relearn. Scores on one half of the validation rows choose; the
chosen model is compared with the baseline on the other half, and if it keeps too little there, larger ones follow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .branches import Branches, Trained, add_baseline, add_seconds
from .core import cost
from .core.budget import Budget
from .core.errors import SensibertError
from .core.layout import Layout
from .data.row_sums import RESAMPLES, RowSums, bootstrap, interval, row_sums
from .data.task_data import TaskData
from .data.tasks import EMBEDDING
from .family import member
from .run_options import Options

CLOSE = 1.2  # the search ends when the smallest budget that held is less than this times the largest that did not
# Share of the rows that two models of nearly equal scores answer differently, one right and one wrong.
CHANGED = 0.05
LEAST_ROWS = 100
WITHOUT_RATIO = ("regression", EMBEDDING)


def wanted_rows(floor: float) -> int:
    """Validation rows with which, on half of them, a loss of 1 - floor is one standard error of a paired difference."""
    return max(LEAST_ROWS, 2 * math.ceil(CHANGED / (1 - floor) ** 2))


def check_floor(options: Options, data: TaskData) -> None:
    """SensibertError if the validation data cannot show whether the floor holds."""
    floor, requested = options.floor(), f"keep is {options.keep!r}"
    if data.task.name in WITHOUT_RATIO:
        raise SensibertError(
            f"{requested}, but the metric of task {data.task.name} is {data.main_metric}, a correlation, of which a "
            "percentage means nothing; want --budget or --budgets"
        )
    rows, wanted = _rows(data), wanted_rows(floor)
    if rows < wanted:
        raise SensibertError(
            f"validation_file: it has {rows:,} rows, want at least {wanted:,} for keep {options.keep}: on half of them "
            f"a loss of {100 * (1 - floor):g} % is as large as the standard error"
        )


def _rows(data: TaskData) -> int:
    return len(data.golds()) if data.task.name == "question-answering" else len(data.validation or ())


@dataclass
class Search:
    """Finds the budget. layout: of the untrimmed model. tried: a row for every comparison with the baseline. The
    constructor raises SensibertError for what `check_floor` refuses."""

    branches: Branches
    data: TaskData
    layout: Layout
    tried: list[dict[str, Any]] = field(default_factory=list)
    _trained: dict[int, Trained] = field(default_factory=dict)  # percent -> the last model that was trained

    def __post_init__(self) -> None:
        options = self.branches.options
        check_floor(options, self.data)
        self.floor = options.floor()
        order = np.random.default_rng(options.seed).permutation(_rows(self.data))
        self.choosing, self.checking = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])

    def find(self) -> Trained:
        """The model; `keep` in its result tells how it was found. SensibertError if no budget below 100 % holds the
        floor."""
        baseline = self.branches.baseline(self._noted)
        for percent in self._candidates(baseline):
            begun = time.perf_counter()
            if (trained := self._trained.get(percent)) is None:
                trained = self.branches.run(_branch(percent), self._member(percent))
            check = self._check(row_sums(self.data, trained.logits), _sums(baseline))
            self._note(percent, "checking", check["score"], check["of_baseline"], time.perf_counter() - begun)
            if check["of_baseline"] >= self.floor:
                add_baseline(trained.result, baseline)
                trained.result["keep"] = {
                    "floor": self.floor,
                    "metric": self.data.main_metric,
                    "tried": self.tried,
                    **check,
                }
                others = [row["seconds"] for row in self.tried if row["budget"] != f"{percent}%params"]
                add_seconds(trained.result, "search", sum(others))
                return trained
        checked = [row for row in self.tried if row["rows"] == "checking"] or self.tried
        best = max(checked, key=lambda row: row["of_baseline"])
        raise SensibertError(
            f"keep: no budget below 100 % keeps {100 * self.floor:g} % of the {self.data.main_metric} of the baseline; "
            f"the best of {len(checked)} was {best['budget']} with {100 * best['of_baseline']:.1f} %; want a lower "
            "floor or more steps"
        )

    def _candidates(self, baseline: dict[str, Any]) -> Iterator[int]:
        """Percentages to check, the smallest first: those that held in the search, then halfway to 100, and so on."""
        low, high, held = max(1, self._smallest() - 1), 100, []
        while high > CLOSE * low and high - low > 1:
            percent = min(max(round(math.sqrt(low * high)), low + 1), high - 1)
            if self._holds(percent, baseline):
                high = percent
                held.append(percent)
            else:
                low = percent
        yield from sorted(held)
        last = max(held, default=low)
        while last < 99:
            last = (last + 101) // 2
            yield last

    def _holds(self, percent: int, baseline: dict[str, Any]) -> bool:
        """Whether the model of this size is at the floor or above it on the rows that choose."""
        begun = time.perf_counter()
        if (known := self.branches.finished(_branch(percent))) is not None:  # by an interrupted run
            self.tried.append(known)
            return known["holds"]
        trained = self.branches.run(_branch(percent), self._member(percent))
        parts = (row_sums(self.data, trained.logits), _sums(baseline))
        score, of = (float(part.part(self.choosing).score()) for part in parts)
        row = self._note(percent, "choosing", score, score / of if of else 0.0, time.perf_counter() - begun)
        self.branches.finish(_branch(percent), row)
        if row["holds"]:
            self._trained = {percent: trained}
        return row["holds"]

    def _smallest(self) -> int:
        """The least percentage that the model can be trimmed to."""
        trim = self.branches.options.trim
        for percent in range(1, 100):
            try:
                cost.limit(self.layout, Budget(percent / 100, "params", True, trim.scope), trim.parsed_grid())
            except SensibertError:
                continue
            return percent
        raise SensibertError(f"keep: less than 1 % of the {trim.scope} can be trimmed, want scope encoder")

    def _member(self, percent: int) -> Options:
        return member(self.branches.options, Budget(percent / 100, "params", True, self.branches.options.trim.scope))

    def _noted(self, trained: Trained) -> dict[str, Any]:
        return {"sums": row_sums(self.data, trained.logits).values.tolist()}

    def _note(self, percent: int, rows: str, score: float, ratio: float, seconds: float) -> dict[str, Any]:
        row = {"budget": f"{percent}%params", "rows": rows, "score": score, "of_baseline": ratio}
        self.tried.append(row | {"holds": ratio >= self.floor, "seconds": round(seconds, 3)})
        return self.tried[-1]

    def _check(self, ours: RowSums, baseline: RowSums) -> dict[str, Any]:
        """Scores on the rows that chose nothing, with 95 % intervals."""
        parts = [each.part(self.checking) for each in (ours, baseline)]
        score, of = (float(part.score()) for part in parts)
        first, second = bootstrap(parts, self.branches.options.seed)
        ratios = np.divide(first, second, out=np.zeros_like(first), where=second > 0)
        return {
            "rows": len(self.checking),
            "score": score,
            "score_interval": list(interval(first)),
            "baseline": of,
            "baseline_interval": list(interval(second)),
            "difference": score - of,
            "difference_interval": list(interval(first - second)),
            "of_baseline": score / of if of else 0.0,
            "of_baseline_interval": list(interval(ratios)),
            "intervals": f"95 %, paired bootstrap with {RESAMPLES:,} resamples",
        }


def _sums(outcome: dict[str, Any]) -> RowSums:
    return RowSums(np.array(outcome["sums"]))


def _branch(percent: int) -> str:
    return f"whole-{percent}"
