"""The things that pass between the verbs: frozen, saveable, with no model inside.

A grid cuts a weight [N, K] into blocks; a site is an axis of units that live and die together; a layout is all sites
of a model with their costs; a sensitivity scores the units, a plan says which survive. Files are safetensors with one
JSON entry of metadata, written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import SensibertError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Grid:
    """Blocks of (block_rows, block_cols) over a weight [N, K]; 0 = the whole axis, the last may be short."""

    block_rows: int
    block_cols: int

    def __post_init__(self) -> None:
        if self.block_rows < 0 or self.block_cols < 0:
            raise ValueError(f"Grid: block is ({self.block_rows}, {self.block_cols}), want sizes >= 0 (0 = whole axis)")

    @classmethod
    def element(cls) -> Grid:
        return cls(1, 1)

    @classmethod
    def row(cls) -> Grid:
        return cls(1, 0)

    @classmethod
    def column(cls) -> Grid:
        return cls(0, 1)

    @classmethod
    def rows(cls, span: int) -> Grid:
        """Bands of `span` output channels: an attention head seen from q, k, v."""
        return cls(span, 0)

    @classmethod
    def columns(cls, span: int) -> Grid:
        """Bands of `span` input channels: an attention head seen from the output projection."""
        return cls(0, span)

    @classmethod
    def block(cls, rows: int, cols: int) -> Grid:
        return cls(rows, cols)

    @classmethod
    def tensor(cls) -> Grid:
        return cls(0, 0)

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Inverse of str(): `element`, `row`, `column`, `rows:64`, `columns:64`, `64x64`, `tensor`."""
        named = {"element": cls(1, 1), "row": cls(1, 0), "column": cls(0, 1), "tensor": cls(0, 0)}
        if text in named:
            return named[text]
        band = re.fullmatch(r"(rows|columns):(\d+)", text)
        if band:
            return cls.rows(int(band[2])) if band[1] == "rows" else cls.columns(int(band[2]))
        block = re.fullmatch(r"(\d+)x(\d+)", text)
        if block:
            return cls(int(block[1]), int(block[2]))
        raise ValueError(f"Grid: text is {text!r}, want element, row, column, rows:D, columns:D, BNxBK or tensor")

    def __str__(self) -> str:
        special = {(1, 1): "element", (1, 0): "row", (0, 1): "column", (0, 0): "tensor"}
        pair = (self.block_rows, self.block_cols)
        if pair in special:
            return special[pair]
        if not self.block_cols:
            return f"rows:{self.block_rows}"
        if not self.block_rows:
            return f"columns:{self.block_cols}"
        return f"{self.block_rows}x{self.block_cols}"

    def block_size(self, num_rows: int, num_cols: int) -> tuple[int, int]:
        """The block in elements for a weight [N, K], at least (1, 1)."""
        return self.block_rows or max(num_rows, 1), self.block_cols or max(num_cols, 1)

    def shape(self, num_rows: int, num_cols: int) -> tuple[int, int]:
        """Number of blocks along each axis of a weight [N, K]."""
        rows, cols = self.block_size(num_rows, num_cols)
        return math.ceil(num_rows / rows), math.ceil(num_cols / cols)

    def expand(self, keep: Tensor, num_rows: int, num_cols: int) -> Tensor:
        """keep, one value a block -> the same value for each element, [N, K]."""
        if tuple(keep.shape) != self.shape(num_rows, num_cols):
            raise ValueError(f"Grid {self}: keep is {tuple(keep.shape)}, want {self.shape(num_rows, num_cols)}")
        rows, cols = self.block_size(num_rows, num_cols)
        wide = keep.repeat_interleave(rows, 0)[:num_rows]
        return wide.repeat_interleave(cols, 1)[:, :num_cols]


@dataclass(frozen=True)
class Member:
    """A parameter's share in a site: unit j owns [j*span, (j+1)*span) in each of `parts` sections of axis `dim`."""

    parameter: str
    dim: int
    span: int = 1
    parts: int = 1

    @property
    def grid(self) -> Grid:
        """The grid whose blocks are the units (of one section)."""
        return Grid(self.span, 0) if self.dim == 0 else Grid(0, self.span)

    def index(self, kept: Tensor, units: int) -> Tensor:
        """Kept unit numbers [n] -> kept positions along the axis [parts * n * span], sections in their order."""
        offset = torch.arange(self.span, device=kept.device)
        inside = (kept[:, None] * self.span + offset).flatten()
        return torch.cat([inside + part * units * self.span for part in range(self.parts)])


@dataclass(frozen=True)
class Flops:
    """2 x multiply-adds of a forward pass: per token, pair of tokens, sequence, and per pass whatever the batch."""

    token: int = 0
    pair: int = 0
    sequence: int = 0
    forward: int = 0

    def at(self, batch: int, length: int) -> int:
        return batch * (self.token * length + self.pair * length * length + self.sequence) + self.forward

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, count: int) -> Flops:
        return Flops(*(a * count for a in dataclasses.astuple(self)))


@dataclass(frozen=True)
class Site:
    """`units` units that can be removed one by one, each a block of every member. Costs are those of one unit."""

    name: str
    kind: str  # "head" or "ffn"
    layer: int
    units: int
    members: tuple[Member, ...]
    consumer: Member  # the member whose columns read the unit's activation: gates and gate gradients live there
    params: int
    flops: Flops
    minimum: int = 0  # units the family's code cannot do without


@dataclass(frozen=True)
class Weight:
    """A matrix [rows, cols] of the sites, as the blocks of a grid see it: what is masked when no whole unit goes."""

    parameter: str
    layer: int
    rows: int
    cols: int
    flops: int  # of one element, a token; 0 where it is multiplied once a pass, whatever the tokens


@dataclass(frozen=True)
class Layout:
    """What of a model can be trimmed, and what everything costs. Parameters count shared tensors once."""

    family: str
    digest: str  # of the structure and a sample of the weights: tells another model apart
    sites: tuple[Site, ...]
    hidden: int
    encoder_params: int
    total_params: int
    encoder_rest: Flops  # what no site owns, inside the encoder
    model_rest: Flops  # the same for the whole model, encoder included
    weights: tuple[Weight, ...] = ()  # the matrices among the sites' members

    def site(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)


_SCALE = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SCOPES = ("encoder", "model")


@dataclass(frozen=True)
class Budget:
    """An upper bound on parameters or FLOPs of the encoder or the model, as a share of the dense one or absolute."""

    value: float
    kind: str  # "params", "flops" or "ms"
    relative: bool
    scope: str = "encoder"
    length: int = 128  # tokens a sequence, for FLOPs

    @classmethod
    def parse(cls, text: str, scope: str = "encoder", length: int = 128) -> Budget:
        """`50%params`, `30%flops`, `5.3Mparams`, `1.2Gflops`, `8ms`. SensibertError says what is wrong."""
        wanted = "want for example 50%params, 30%flops, 5.3Mparams or 1.2Gflops"
        if scope not in SCOPES:
            raise SensibertError(f"budget: scope is {scope!r}, want encoder or model")
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[KMGT]?)\s*(params|flops|ms)\s*", text)
        if not found or (found[3] == "ms" and found[2]):
            raise SensibertError(f"budget: {text!r} is not a budget, {wanted}")
        number, unit, kind = float(found[1]), found[2], found[3]
        relative = unit == "%"
        if number <= 0 or (relative and number > 100):
            raise SensibertError(f"budget: {text!r} is outside (0 %, 100 %], {wanted}")
        return cls(number / 100 if relative else number * _SCALE[unit], kind, relative, scope, length)

    def __str__(self) -> str:
        if self.relative:
            return f"{self.value * 100:g}%{self.kind}"
        for unit in ("T", "G", "M", "K"):
            if self.kind != "ms" and self.value >= _SCALE[unit]:
                return f"{self.value / _SCALE[unit]:.12g}{unit}{self.kind}"
        return f"{self.value:.12g}{self.kind}"


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


def _layout(data: dict) -> Layout:
    sites = []
    for site in data.pop("sites"):
        members = tuple(Member(**m) for m in site.pop("members"))
        consumer, flops = Member(**site.pop("consumer")), Flops(**site.pop("flops"))
        sites.append(Site(members=members, consumer=consumer, flops=flops, **site))
    rest = {name: Flops(**data.pop(name)) for name in ("encoder_rest", "model_rest")}
    weights = tuple(Weight(**weight) for weight in data.pop("weights", ()))
    return Layout(sites=tuple(sites), weights=weights, **rest, **data)


_DECODE = {
    "layout": _layout,
    "budget": lambda data: Budget(**data),
    "grid": lambda data: None if data is None else Grid(**data),
    "curves": lambda data: {name: [(gone, rise) for gone, rise in curve] for name, curve in data.items()},
}


def write_atomically(path: str | Path, write) -> None:
    """Call write(temporary path beside `path`), then rename: the file is there whole or not at all.

    SensibertError where there is no room or no right to write."""
    path, temporary = Path(path), None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise SensibertError(f"{path}: cannot be written ({error})") from error
        raise


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
