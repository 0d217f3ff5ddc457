"""The artifacts: a `Sensitivity` scores units or blocks, a `Plan` names those that survive.

Both are frozen, contain no model, and are saved as safetensors files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arguments import checked, one_of, want_fields
from .artifact_files import load_artifact, same_tensors, save_artifact
from .errors import SensibertError
from .grid import Grid
from .layout import Layout
from .plans import BlockPlan, Plan, UnitPlan
from .views import View

__all__ = ["BlockPlan", "Plan", "Sensitivity", "UnitPlan"]

RANGE = ("lowest", "median", "highest")


def _range(scores: Tensor) -> tuple[str, ...]:
    """The lowest, median and highest score as text; "-" without scores."""
    if not scores.numel():
        return ("-",) * len(RANGE)
    values = scores.float().flatten()
    return tuple(f"{float(value):.2e}" for value in (values.min(), values.median(), values.max()))


@dataclass(frozen=True, eq=False, repr=False)
class Sensitivity:
    """Scores, on any device. Without a grid one per unit: site name -> fp32 [units]. With a grid one per block of every
    weight: parameter name -> fp32 [block rows, block columns].

    statistic: the method. samples: number of samples summed over, 0 without data. tensors: parameter name -> mean
    |w * g| over its elements, the most sensitive first. curves: site name -> [(units removed, predicted rise of the
    mean loss)] as units are removed, the least important first; only for the method obs. SensibertError for a field of
    another type."""

    layout: Layout
    scores: dict[str, Tensor]
    statistic: str
    samples: int = 0
    seed: int = 0
    tensors: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    grid: Grid | None = None

    def __post_init__(self) -> None:
        want_fields(self)

    def __repr__(self) -> str:
        return self._view().text()

    def _repr_html_(self) -> str:
        return self._view().html()

    def _view(self) -> View:
        read = f"{self.samples:,} samples, seed {self.seed}" if self.samples else "no data"
        have = [name for name in ("tensors", "curves") if getattr(self, name)]
        more = f"; with {' and '.join(have)}" if have else ""
        title = f"Sensitivity: {self.layout.family} by {self.statistic}, {read}{more}"
        if self.grid is not None:
            rows = [(name, scores.numel(), *_range(scores)) for name, scores in self.scores.items()]
            return View((title,), ("tensor", "blocks", *RANGE), rows)
        kinds = {"head": "heads", "ffn": "neurons"}
        known = [site for site in self.layout.sites if site.name in self.scores]
        rows = [(f"layer {s.layer} {kinds[s.kind]}", s.units, *_range(self.scores[s.name])) for s in known]
        return View((title,), ("scores of", "units", *RANGE), rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sensitivity):
            return False
        return self._facts() == other._facts() and same_tensors(self.scores, other.scores)

    @checked
    def predicted_rise(self, site: str, gone: int) -> float:
        """Predicted rise of the loss when one site alone loses its `gone` least important units.

        SensibertError if there is no curve for the site, or it has fewer units."""
        if site not in self.curves:
            known = one_of(site, self.curves) if self.curves else "want a sensitivity of method obs"
            raise SensibertError(f"predicted_rise: site is {site!r}, {known}")
        units, rises = zip(*self.curves[site])
        if not 0 <= gone <= units[-1]:
            raise SensibertError(f"predicted_rise: gone is {gone}, want 0 to {units[-1]} units of {site}")
        return float(np.interp(gone, units, rises))

    @checked
    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically. SensibertError if that is not possible."""
        save_artifact(path, "sensitivity", self.scores, self._facts())

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Sensitivity:
        """Read a file that `save` wrote; scores are on the CPU. SensibertError for any other file."""
        return load_artifact(path, "sensitivity", cls._of_file)

    @classmethod
    def _of_file(cls, scores: dict[str, Tensor], facts: dict[str, Any]) -> Sensitivity:
        """SensibertError for scores, numbers or curves that do not fit the layout."""
        made = cls(scores=scores, **facts)
        grid, layout = made.grid, made.layout
        shapes: dict[str, tuple[int, ...]] = {site.name: (site.units,) for site in layout.sites}
        if grid is not None:
            shapes = {weight.parameter: grid.shape(weight.rows, weight.cols) for weight in layout.weights}
        for name, shape in shapes.items():
            if scores[name].dtype != torch.float32 or scores[name].shape != shape:
                got = f"{scores[name].dtype} {tuple(scores[name].shape)}"
                raise SensibertError(f"scores of {name} are {got}, want torch.float32 {shape}")
        units = {site.name: site.units for site in layout.sites}
        for name, curve in made.curves.items():
            gone = [point[0] for point in curve]
            if (
                name not in units
                or not curve
                or gone != sorted(set(gone))
                or not 0 <= gone[0] <= gone[-1] <= units[name]
            ):
                raise SensibertError(f"the curve of {name} is not one of units removed from a site of the layout")
        if made.samples < 0 or made.seed < 0:
            raise SensibertError(f"samples is {made.samples} and seed {made.seed}, want at least 0")
        return made

    def _facts(self) -> dict[str, object]:
        """Every field except the scores."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "scores"}
