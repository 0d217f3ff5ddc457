"""When a run trims, and its learning rate: pure functions of the step. Fractions are of all steps of the run.

Warm up until `trim_start`, analyze, trim (at once, or along a cubic over `trim_duration`), then recover at a fixed
structure while the learning rate falls linearly to 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .arguments import checked
from .errors import SensibertError
from .settings import FRACTION, POSITIVE, check, setting

SHAPES = ("oneshot", "cubic")
RECOVERIES = ("rewarm", "continue")
MOST_CUTS = 10_000
TRIM_START = 1 / 3
REWARM_PEAK = 1.6  # times the peak learning rate
SCHEDULE, RECOVERY = "Schedule", "Recovery after trimming"  # panels of the help


@dataclass(frozen=True)
class Schedule:
    """When to trim, and how the learning rate, dropout and embeddings behave afterwards.

    shape: `oneshot`, or `cubic` with `milestones` cuts (Zhu & Gupta, arXiv 1710.01878). recovery: after the last cut,
    `rewarm` turns dropout off and raises the learning rate again, to 1.6 times its peak; `continue` keeps dropout and
    continues the schedule; below a 50 % budget it raises the rate, more for smaller budgets (`peak`); None: the task's
    default (`for_task`), `rewarm` without a task. recover_peak (times the peak learning rate) and recover_dropout
    override both. freeze_embeddings: None freezes them after trimming if no more than half of the encoder is left.
    SensibertError names an invalid value."""

    shape: str = setting(
        "oneshot",
        "oneshot: trim in one cut. cubic: in several cuts, large ones first.",
        SCHEDULE,
        SHAPES,
        flag="schedule",
    )
    trim_start: float | None = setting(
        None, "Fraction of the steps before the first cut.", SCHEDULE, bound=FRACTION, was="warm_share",
        show_default="1/3, for embeddings 0",
    )  # fmt: skip
    trim_duration: float = setting(
        0.2,
        "Fraction of the steps from the first to the last cut of a cubic schedule.",
        SCHEDULE,
        bound=FRACTION,
        was="trim_share",
    )
    milestones: int = setting(
        6, "Number of cuts of a cubic schedule.", SCHEDULE, bound=(lambda n: 1 <= n <= MOST_CUTS, f"1 to {MOST_CUTS}")
    )
    warmup_ratio: float = setting(
        0.06,
        "Fraction of the steps in which the learning rate rises at the start.",
        SCHEDULE,
        bound=FRACTION,
        was="warmup",
    )
    rewarm_ratio: float = setting(
        0.03,
        "Fraction of the steps in which the learning rate rises again after the last cut.",
        RECOVERY,
        bound=FRACTION,
        was="rewarm",
    )
    recovery: str | None = setting(
        None,
        "rewarm: raise the learning rate again, without dropout. continue: keep dropout and continue the schedule; "
        "below a 50 % budget the rate is raised.",
        RECOVERY,
        RECOVERIES,
        renamed={"lifted": "rewarm", "plain": "continue"},
        show_default="continue for question answering, otherwise rewarm",
    )
    recover_peak: float | None = setting(
        None, "Highest learning rate after the last cut, as a multiple of --learning-rate.", RECOVERY, bound=POSITIVE,
        show_default="from --recovery",
    )  # fmt: skip
    recover_dropout: float | None = setting(
        None, "Dropout probability after the last cut.", RECOVERY, bound=FRACTION, show_default="from --recovery"
    )
    freeze_embeddings: bool | None = setting(
        None, "Freeze the embeddings after the last cut.", RECOVERY, show_default="up to a 50 % budget"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.start() + (self.trim_duration if self.shape == "cubic" else 0) >= 1:
            raise SensibertError("schedule: trim_start + trim_duration leave no steps to recover, want a sum below 1")

    @checked
    def for_task(self, recovery: str, trim_start: float | None = None) -> Schedule:
        """With the task's defaults where nothing was chosen."""
        start = trim_start if self.trim_start is None else self.trim_start
        return replace(self, recovery=self.recovery or recovery, trim_start=start)

    def start(self) -> float:
        """`trim_start`, or its default."""
        return TRIM_START if self.trim_start is None else self.trim_start

    def dropout(self) -> float | None:
        """Dropout after the last cut; None: the model's own."""
        if self.recover_dropout is None and self.recovery == "continue":
            return None
        return self.recover_dropout or 0.0

    @checked
    def freezes(self, left: float) -> bool:
        """Whether embeddings are frozen after the last cut. left: fraction of the encoder's cost that is left."""
        return left <= 0.5 if self.freeze_embeddings is None else self.freeze_embeddings

    @checked
    def cuts(self, total: int) -> dict[int, float]:
        """Step -> progress of the trimming after it: 0 is untrimmed, 1 the budget. total: steps of the run."""
        first = min(max(1, round(self.start() * total)), total)
        if self.shape == "oneshot":
            return {first: 1.0}
        length, cuts = self.trim_duration * total, {}
        for number in range(1, self.milestones + 1):
            progress = number / self.milestones
            cuts[min(total, first + round(length * (number - 1) / max(1, self.milestones - 1)))] = progress
        return cuts

    def shortcomings(self, total: int) -> list[str]:
        """Sentences about what does not fit into a run of so many steps."""
        cuts, asked, found = self.cuts(total), self.milestones if self.shape == "cubic" else 1, []
        if len(cuts) < asked:
            found.append(f"{total} steps have room for {len(cuts)} of {asked} cuts (milestones)")
        if max(cuts) == total:
            found.append(f"the last cut is after step {total}, the last one: no steps are left to recover from it")
        return found

    @checked
    def ratio(self, progress: float, final: float) -> float:
        """r = r_f + (1 - r_f) (1 - t)^3: the fraction of the cost that is left at progress t."""
        return final + (1 - final) * (1 - progress) ** 3

    @checked
    def peak(self, begin: float, left: float) -> float:
        """Peak factor of the learning rate after the last cut. begin: the factor at the cut; left as for `freezes`."""
        if self.recover_peak is not None:
            return self.recover_peak
        if self.recovery != "continue":
            return REWARM_PEAK
        return begin + (REWARM_PEAK - begin) * max(0.0, 1 - 2 * left)

    @checked
    def lr(self, baseline: bool = False, left: float = 0.5) -> Callable[[int, int], float]:
        """(step, total steps) -> factor on the peak learning rate: warm-up, then linear decay to 0. After the last cut
        the same again, with the peak of `peak`. With trim_start 0 nothing is learned before the first cut. baseline:
        without a cut."""

        def line(step: int, total: int) -> float:
            return max(0.0, 1 - step / max(1, total))

        def factor(step: int, total: int) -> float:
            warm = max(1, round(self.warmup_ratio * total))
            cuts = {total: 1.0} if baseline else self.cuts(total)
            last, at_once = max(cuts), not baseline and self.start() == 0
            if at_once and step < min(cuts):
                return 0.0
            if step < (min(warm, last) if at_once else warm):
                return (step + 1) / warm
            if step < last or baseline:
                return line(step, total)
            again = max(1, round(self.rewarm_ratio * total))
            peak = self.peak(line(last, total), left)
            begin = 0.0 if at_once and len(cuts) == 1 else line(last, total)
            if step < last + again:
                return begin + (peak - begin) * (step - last + 1) / again
            return peak * max(0.0, (total - step) / max(1, total - last - again))

        return factor
