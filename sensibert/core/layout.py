"""What of a model can be trimmed and what it costs: members, sites, weights. No tensors, no model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid


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


def layout_from(data: dict) -> Layout:
    sites = []
    for site in data.pop("sites"):
        members = tuple(Member(**m) for m in site.pop("members"))
        consumer, flops = Member(**site.pop("consumer")), Flops(**site.pop("flops"))
        sites.append(Site(members=members, consumer=consumer, flops=flops, **site))
    rest = {name: Flops(**data.pop(name)) for name in ("encoder_rest", "model_rest")}
    weights = tuple(Weight(**weight) for weight in data.pop("weights", ()))
    return Layout(sites=tuple(sites), weights=weights, **rest, **data)
