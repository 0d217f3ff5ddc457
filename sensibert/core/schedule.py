"""When a run trims, and how fast it learns: pure functions of the step. Fractions are of all steps of the run.

A  dense warm-up until `warm_share` · B analysis · C trim, at once or along a cubic over `trim_share` · D recover at a
fixed structure, linear to 0, after another warm-up (`lifted`) or from where the rate was, or higher (`plain`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .errors import SensibertError

SHAPES = ("oneshot", "cubic")
RECOVERIES = ("lifted", "plain")
LIFTED_PEAK = 1.6


@dataclass(frozen=True)
class Schedule:
    """shape: oneshot or cubic (Zhu & Gupta, arXiv 1710.01878); milestones: how many cuts the cubic takes.

    warmup, rewarm: shares of the steps in which the learning rate rises, at first and after the last cut. recovery:
    from the last cut on, `lifted`: up to 1.6 times the peak, no dropout; `plain`: with the model's dropout, and from
    the rate that it was, or the higher the further the cut goes below half (`peak`); None: what the task wants
    (`for_task`), lifted if nobody says. recover_peak (times the peak) and recover_dropout: other values than those.
    freeze_embeddings: from the last cut on they learn no more; None: where less than half of the encoder is left.
    distil_until: the share of the recovery in which a teacher's weight falls linearly to 0; None: it stays."""

    shape: str = "oneshot"
    warm_share: float = 1 / 3
    trim_share: float = 0.2
    milestones: int = 6
    warmup: float = 0.06
    rewarm: float = 0.03
    recovery: str | None = None
    recover_peak: float | None = None
    recover_dropout: float | None = None
    freeze_embeddings: bool | None = None
    distil_until: float | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise SensibertError(f"schedule: shape is {self.shape!r}, want one of {', '.join(SHAPES)}")
        if self.recovery not in (*RECOVERIES, None):
            raise SensibertError(f"schedule: recovery is {self.recovery!r}, want one of {', '.join(RECOVERIES)}")
        for name in ("warm_share", "trim_share", "warmup", "rewarm", "recover_dropout"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise SensibertError(f"schedule: {name} is {getattr(self, name)}, want a fraction in [0, 1)")
        if self.warm_share + (self.trim_share if self.shape == "cubic" else 0) >= 1:
            raise SensibertError("schedule: warm_share + trim_share leave no steps to recover, want a sum below 1")
        if self.milestones < 1:
            raise SensibertError(f"schedule: milestones is {self.milestones}, want at least 1")
        if self.recover_peak is not None and not self.recover_peak > 0:
            raise SensibertError(f"schedule: recover_peak is {self.recover_peak}, want more than 0")
        if self.distil_until is not None and not 0 < self.distil_until <= 1:
            raise SensibertError(f"schedule: distil_until is {self.distil_until}, want a fraction in (0, 1]")

    def for_task(self, recovery: str) -> Schedule:
        """With the task's recovery where none was asked for."""
        return replace(self, recovery=self.recovery or recovery)

    def dropout(self) -> float | None:
        """The dropout after the last cut; None: the model's own."""
        if self.recover_dropout is None and self.recovery == "plain":
            return None
        return self.recover_dropout or 0.0

    def freezes(self, left: float) -> bool:
        """Whether the embeddings stand still after the last cut; left: what stays of the encoder's cost."""
        return left < 0.5 if self.freeze_embeddings is None else self.freeze_embeddings

    def cuts(self, total: int) -> dict[int, float]:
        """step -> how far the trimming has gone after it, from 0 (dense) to 1 (the budget)."""
        first = min(max(1, round(self.warm_share * total)), total)
        if self.shape == "oneshot":
            return {first: 1.0}
        length, found = self.trim_share * total, {}
        for number in range(1, self.milestones + 1):
            progress = number / self.milestones
            found[min(total, first + round(length * (number - 1) / max(1, self.milestones - 1)))] = progress
        return found

    def ratio(self, progress: float, final: float) -> float:
        """r = r_f + (1 - r_f) (1 - t)^3: the share of the cost that is left at progress t."""
        return final + (1 - final) * (1 - progress) ** 3

    def fade(self, step: int, total: int) -> float:
        """Factor on a teacher's weight: 1 until the last cut, then to 0 over distil_until of the rest."""
        last = max(self.cuts(total))
        if self.distil_until is None or step <= last:
            return 1.0
        return max(0.0, 1 - (step - last) / (self.distil_until * (total - last)))

    def peak(self, begin: float, left: float) -> float:
        """What the rate rises to after the last cut, from begin; left: what stays of the encoder's cost."""
        if self.recover_peak is not None:
            return self.recover_peak
        if self.recovery != "plain":
            return LIFTED_PEAK
        return begin + (LIFTED_PEAK - begin) * max(0.0, 1 - 2 * left)

    def lr(self, dense: bool = False, left: float = 0.5) -> Callable[[int, int], float]:
        """(step, total) -> factor on the peak: warm-up then linear to 0; after the last cut once more from `peak`."""

        def line(step: int, total: int) -> float:
            return max(0.0, 1 - step / max(1, total))

        def factor(step: int, total: int) -> float:
            warm = max(1, round(self.warmup * total))
            if step < warm:
                return (step + 1) / warm
            last = max(self.cuts(total)) if not dense else total
            if step < last or dense:
                return line(step, total)
            again = max(1, round(self.rewarm * total))
            begin = line(last, total)
            peak = self.peak(begin, left)
            if step < last + again:
                return begin + (peak - begin) * (step - last + 1) / again
            return peak * max(0.0, (total - step) / max(1, total - last - again))

        return factor
