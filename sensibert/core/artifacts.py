"""The things that pass between the verbs: frozen, saveable, with no model inside.

A grid cuts a weight [N, K] into blocks; a site is an axis of units that live and die together; a layout is all sites
of a model with their costs; a sensitivity scores the units, a plan says which survive. Files are safetensors with one
JSON entry of metadata, written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .budget import Budget
from .errors import SensibertError
from .files import write_atomically
from .grid import Grid
from .layout import Layout, layout_from

FORMAT_VERSION = 1


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """One score a unit: the statistic summed over `samples` samples (0 where no data was needed).

    With a grid, one score a block of every weight: parameter name -> fp32 [blocks of rows, blocks of columns]."""

    layout: Layout
    scores: dict[str, Tensor]  # site name -> [units] fp32
    statistic: str
    samples: int = 0
    seed: int = 0
    tensors: dict[str, float] = field(default_factory=dict)  # parameter name -> mean |w * g| of its elements
    # site name -> (units gone, predicted rise of the mean loss), the least important first; obs alone predicts it
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    grid: Grid | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sensitivity) and _facts(self) == _facts(other) and _same(self.scores, other.scores)

    def predicted_rise(self, site: str, gone: int) -> float:
        """What the loss is predicted to rise by when a site alone loses its `gone` least important units."""
        if site not in self.curves:
            known = f"the sites {', '.join(self.curves)}" if self.curves else "a sensitivity of method obs"
            raise SensibertError(f"predicted_rise: site is {site!r}, want {known}")
        units, rises = zip(*self.curves[site])
        if not 0 <= gone <= units[-1]:
            raise SensibertError(f"predicted_rise: gone is {gone}, want 0 to {units[-1]} units of {site}")
        return float(np.interp(gone, units, rises))

    def save(self, path: str | Path) -> None:
        _save(path, "sensitivity", self.scores, _facts(self))

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        tensors, facts = _load(path, "sensitivity")
        return cls(scores=tensors, **facts)


@dataclass(frozen=True, eq=False)
class Plan:
    """Which units survive. `params` and `flops` are those of the budget's scope (FLOPs of one sequence).

    With a grid, which blocks of every weight: parameter name -> bool [blocks of rows, blocks of columns]."""

    layout: Layout
    keep: dict[str, Tensor]  # site name -> [units] bool
    budget: Budget
    method: str
    params: int = 0
    flops: int = 0
    notes: dict[str, str] = field(default_factory=dict)
    grid: Grid | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and _facts(self) == _facts(other) and _same(self.keep, other.keep)

    def save(self, path: str | Path) -> None:
        _save(path, "plan", self.keep, _facts(self))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        tensors, facts = _load(path, "plan")
        return cls(keep=tensors, **facts)

    def kept(self, name: str) -> Tensor:
        """Numbers of the surviving units of a site, ascending, int64."""
        return self.keep[name].nonzero().flatten()


def _facts(artifact: Sensitivity | Plan) -> dict:
    """Every field but the tensors."""
    return {f.name: getattr(artifact, f.name) for f in dataclasses.fields(artifact) if f.name not in ("scores", "keep")}


def _encode(value: object) -> object:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[call-overload]


_DECODE = {
    "layout": layout_from,
    "budget": lambda data: Budget(**data),
    "grid": lambda data: None if data is None else Grid(**data),
    "curves": lambda data: {name: [(gone, rise) for gone, rise in curve] for name, curve in data.items()},
}


def _save(path: str | Path, kind: str, tensors: dict[str, Tensor], facts: dict) -> None:
    text = json.dumps({name: _encode(value) for name, value in facts.items()})
    metadata = {"format": f"sensibert.{kind}", "version": str(FORMAT_VERSION), "facts": text}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def _load(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise SensibertError(f"{path}: not a readable sensibert {kind} file ({error})") from None
    if metadata.get("format") != f"sensibert.{kind}":
        raise SensibertError(f"{path}: holds {metadata.get('format', 'something else')}, want a sensibert {kind} file")
    try:
        version = int(metadata["version"])
        if version > FORMAT_VERSION:
            raise SensibertError(f"{path}: format version {version}, this sensibert reads up to {FORMAT_VERSION}")
        facts = json.loads(metadata["facts"])
        facts = {name: _DECODE[name](value) if name in _DECODE else value for name, value in facts.items()}
        layout: Layout = facts["layout"]
        names = [w.parameter for w in layout.weights] if facts.get("grid") else [site.name for site in layout.sites]
        return {name: tensors[name] for name in names}, facts
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise SensibertError(f"{path}: not a readable sensibert {kind} file ({error!r})") from None
