"""The smallest model that keeps a fraction of the baseline's score (`--keep 99%`).

Bisection over budgets, with short recoveries from one warm-up and one analysis, compares them on one half of the
validation rows with an equally short recovery at 100 %, which isolates what trimming costs from what steps cost. The
whole recovery of the chosen budget is compared with the baseline on the other half; if it is below the floor, larger
budgets follow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from .branches import Branches, Shortened, Trained, add_baseline, add_seconds
from .core import cost
from .core.budget import Budget
from .core.errors import SensibertError
from .core.layout import Layout
from .data.row_sums import RESAMPLES, RowSums, bootstrap, interval, row_sums
from .data.task_data import TaskData
from .data.tasks import EMBEDDING
from .family import member
from .run_options import Options

SHORT = 0.25  # steps of a short recovery, as a fraction of a whole one
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
    """Finds the budget. layout: of the untrimmed model. tried: a row for every model that was trained. The constructor
    raises SensibertError for what `check_floor` refuses."""

    branches: Branches
    data: TaskData
    layout: Layout
    tried: list[dict[str, Any]] = field(default_factory=list)

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
        reference = self._short(100, baseline["steps"])
        for percent in self._candidates(reference, baseline["steps"]):
            name, begun = f"whole-{percent}", time.perf_counter()
            if (known := self.branches.finished(name)) is not None:  # by an interrupted run: it was below the floor
                self.tried.append(known)
                continue
            trained = self.branches.run(name, self._member(percent))
            check = self._check(row_sums(self.data, trained.logits), _sums(baseline))
            self._note(percent, "whole", check["score"], check["of_baseline"], time.perf_counter() - begun)
            if check["of_baseline"] >= self.floor:
                add_baseline(trained.result, baseline)
                trained.result["keep"] = {
                    "floor": self.floor,
                    "metric": self.data.main_metric,
                    "tried": self.tried,
                    **check,
                }
                searched = reference["seconds"] + sum(row["seconds"] for row in self.tried[:-1])
                add_seconds(trained.result, "search", searched)
                return trained
            self.branches.finish(name, self.tried[-1])
        whole = [row for row in self.tried if row["recovery"] == "whole"]
        best = max(whole or self.tried, key=lambda row: row["of_baseline"])
        raise SensibertError(
            f"keep: no budget below 100 % keeps {100 * self.floor:g} % of the {self.data.main_metric} of the baseline; "
            f"the best of {len(self.tried)} was {best['budget']} with {100 * best['of_baseline']:.1f} % "
            f"({best['recovery']} recovery); want a lower floor or more steps"
        )

    def _candidates(self, reference: dict[str, Any], steps: int) -> Iterator[int]:
        """Percentages to recover in full, the smallest first: those that held in the search, then halfway to 100, and
        so on."""
        low, high, held = self._smallest() - 1, 100, []
        while high - low > 1:
            percent = (low + high) // 2
            found = self._short(percent, steps)
            score, of = (float(_sums(each).part(self.choosing).score()) for each in (found, reference))
            ratio = score / of if of else 0.0
            self._note(percent, "short", score, ratio, found["seconds"])
            if ratio >= self.floor:
                high = percent
                held.append(percent)
            else:
                low = percent
        yield from sorted(held)
        last = max(held, default=low)
        while last < 99:
            last = (last + 101) // 2
            yield last

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

    def _short(self, percent: int, steps: int) -> dict[str, Any]:
        """The outcome of a short recovery. steps: of the whole run."""
        branch = f"short-{percent}"
        if (known := self.branches.finished(branch)) is not None:
            return known
        begun, short = time.perf_counter(), partial(Shortened, steps=steps)
        found = self._noted(self.branches.run(branch, shortened(self._member(percent), steps), short))
        return self.branches.finish(branch, found | {"seconds": time.perf_counter() - begun})

    def _noted(self, trained: Trained) -> dict[str, Any]:
        return {"sums": row_sums(self.data, trained.logits).values.tolist()}

    def _note(self, percent: int, recovery: str, score: float, ratio: float, seconds: float) -> None:
        row = {"budget": f"{percent}%params", "recovery": recovery, "score": score, "of_baseline": ratio}
        self.tried.append(row | {"holds": ratio >= self.floor, "seconds": round(seconds, 3)})

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


def shortened(options: Options, steps: int) -> Options:
    """The same run with a recovery of SHORT of its steps; the cut is at the same step. steps: of the whole run."""
    schedule = options.trim.schedule
    cut = min(schedule.cuts(steps))
    total = cut + max(1, round(SHORT * (steps - cut)))
    duration = schedule.trim_duration * steps * (total - cut) / (steps - cut) / total if steps > cut else 0.0
    trim = replace(options.trim, schedule=replace(schedule, trim_start=cut / total, trim_duration=duration))
    return replace(options, trim=trim, max_steps=total, save_steps=total, save_before_cut=False)
