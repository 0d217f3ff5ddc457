"""What one step hands to the next: a `Sensitivity` scores units or blocks, a `Plan` says which survive.

Both are frozen, hold no model, and are saved as safetensors files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from .artifact_files import load_artifact, same_tensors, save_artifact
from .errors import SensibertError
from .grid import Grid
from .layout import Layout
from .plans import BlockPlan, Plan, UnitPlan

__all__ = ["BlockPlan", "Plan", "Sensitivity", "UnitPlan"]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Scores on any device: per unit, site name -> fp32 [units], or with a grid per block of every weight, parameter
    name -> fp32 [block rows, block columns].

    statistic: the method that gave them. samples: how many it summed over (0 if it needs no data). tensors: parameter
    name -> mean |w * g| over its elements, the most sensitive first. curves: site name -> [(units removed, predicted
    rise of the mean loss)], the least important units first; only the method obs predicts it."""

    layout: Layout
    scores: dict[str, Tensor]
    statistic: str
    samples: int = 0
    seed: int = 0
    tensors: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    grid: Grid | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sensitivity):
            return False
        return self._facts() == other._facts() and same_tensors(self.scores, other.scores)

    def predicted_rise(self, site: str, gone: int) -> float:
        """Predicted rise of the loss when one site alone loses its `gone` least important units.

        SensibertError if there is no curve for the site, or it has fewer units."""
        if site not in self.curves:
            known = f"the sites {', '.join(self.curves)}" if self.curves else "a sensitivity of method obs"
            raise SensibertError(f"predicted_rise: site is {site!r}, want {known}")
        units, rises = zip(*self.curves[site])
        if not 0 <= gone <= units[-1]:
            raise SensibertError(f"predicted_rise: gone is {gone}, want 0 to {units[-1]} units of {site}")
        return float(np.interp(gone, units, rises))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all; SensibertError if that is not possible."""
        save_artifact(path, "sensitivity", self.scores, self._facts())

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """The sensitivity of a file, with its scores on the CPU; SensibertError if the file holds none."""
        return load_artifact(path, "sensitivity", lambda scores, facts: cls(scores=scores, **facts))

    def _facts(self) -> dict[str, object]:
        """Every field but the scores."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "scores"}
