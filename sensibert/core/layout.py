"""What can be trimmed in a model and what it costs: members, sites and weights. No tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import one_of, show, want_fields
from .errors import SensibertError
from .grid import Grid

LARGEST = 10**15  # of a number of units, parameters or FLOPs in a file


@dataclass(frozen=True)
class Member:
    """A parameter that belongs to a site: unit j is [j*span, (j+1)*span) in each of `parts` sections of axis `dim`.

    A fused query-key-value matrix has three parts."""

    parameter: str
    dim: int
    span: int = 1
    parts: int = 1

    @property
    def grid(self) -> Grid:
        """The grid whose blocks are the units (of one section)."""
        return Grid(self.span, 0) if self.dim == 0 else Grid(0, self.span)

    def index(self, kept: Tensor, units: int) -> Tensor:
        """Indices of the kept units, int64 [n] -> indices along axis `dim`, int64 [parts * n * span], by sections.

        units: number of units of the site."""
        offset = torch.arange(self.span, device=kept.device)
        inside = (kept[:, None] * self.span + offset).flatten()
        return torch.cat([inside + part * units * self.span for part in range(self.parts)])


@dataclass(frozen=True)
class Flops:
    """FLOPs (2 per multiply-add) of a forward pass: per token, per pair of tokens, per sequence, and per pass."""

    token: int = 0
    pair: int = 0
    sequence: int = 0
    forward: int = 0

    def at(self, batch: int, length: int) -> int:
        """The sum for one pass over `batch` sequences of `length` tokens."""
        return batch * (self.token * length + self.pair * length * length + self.sequence) + self.forward

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, count: int) -> Flops:
        return Flops(*(a * count for a in dataclasses.astuple(self)))


@dataclass(frozen=True)
class Site:
    """The heads or the FFN neurons of one layer: `units` units, each a block of every member.

    A unit is kept or removed in all members at once. params and flops are the cost of one unit."""

    name: str
    kind: str  # "head" or "ffn"
    layer: int
    units: int
    members: tuple[Member, ...]
    consumer: Member  # the member whose columns read the activation of the unit; scores are computed there
    params: int
    flops: Flops
    minimum: int = 0  # units that the model's code requires


@dataclass(frozen=True)
class Weight:
    """A matrix [rows, cols] among the members of the sites, whose blocks a grid masks."""

    parameter: str
    layer: int
    rows: int
    cols: int
    flops: int  # of one element per token; 0 if it is multiplied once per pass


@dataclass(frozen=True)
class Layout:
    """What can be trimmed in a model, and its costs. Shared tensors are counted once."""

    family: str
    digest: str  # of the structure and a sample of the weights, to recognize the model
    sites: tuple[Site, ...]
    hidden: int
    encoder_params: int
    total_params: int
    encoder_rest: Flops  # of the encoder, outside the sites
    model_rest: Flops  # of the model (encoder included), outside the sites
    weights: tuple[Weight, ...] = ()  # the matrices among the sites' members

    def site(self, name: str) -> Site:
        """The site with this name; SensibertError if there is none."""
        for site in self.sites:
            if site.name == name:
                return site
        raise SensibertError(f"site is {show(name)}, {one_of(name, (site.name for site in self.sites))}")


def layout_from(data: dict) -> Layout:
    """Inverse of `dataclasses.asdict` for a Layout, also after JSON; empties `data`. KeyError or TypeError for other
    entries, SensibertError for values that no layout has."""
    sites = []
    for site in data.pop("sites"):
        members = tuple(Member(**m) for m in site.pop("members"))
        consumer, flops = Member(**site.pop("consumer")), Flops(**site.pop("flops"))
        sites.append(Site(members=members, consumer=consumer, flops=flops, **site))
    encoder_rest, model_rest = Flops(**data.pop("encoder_rest")), Flops(**data.pop("model_rest"))
    weights = tuple(Weight(**weight) for weight in data.pop("weights", ()))
    made = Layout(sites=tuple(sites), weights=weights, encoder_rest=encoder_rest, model_rest=model_rest, **data)
    _check(made)
    for site in made.sites:
        _check(site)
        for part in (site.flops, site.consumer, *site.members):
            _check(part)
        if site.kind not in ("head", "ffn") or site.minimum > site.units or site.consumer not in site.members:
            raise SensibertError(f"Site: {site.name} is no axis of a layer, want kind, minimum and consumer to fit")
    for part in (*made.weights, made.encoder_rest, made.model_rest):
        _check(part)
    for names in ([site.name for site in made.sites], [weight.parameter for weight in made.weights]):
        if len(set(names)) < len(names):
            raise SensibertError("Layout: a site or weight is listed twice")
    inside = sum(site.units * site.params for site in made.sites)
    if not inside <= made.encoder_params <= made.total_params:
        raise SensibertError(
            f"Layout: its units have {inside:,} parameters, the encoder {made.encoder_params:,} and the model "
            f"{made.total_params:,}, want each at least the one before"
        )
    return made


def _check(part: Any) -> None:
    """SensibertError for a field of a dataclass that is of another type, or a number that no model has."""
    want_fields(part)
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, int) and not 0 <= value < LARGEST:
            raise SensibertError(f"{type(part).__name__}: {field.name} is {show(value)}, want 0 to {LARGEST:,}")
