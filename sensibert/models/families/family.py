"""The table a model family fills in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...core.layout import Flops


@dataclass(frozen=True)
class Axis:
    """One trimmable axis of a layer, as module paths inside the layer."""

    produces: tuple[str, ...]  # linear layers whose output rows are the units; absent ones are skipped
    consumes: str  # the linear layer whose input columns read them
    tables: tuple[str, ...] = ()  # further producers, of a table of relative positions: they run once a pass
    parts: int = 1  # equal sections of the produced rows (fused q|k|v: 3, gated input: 2)
    counts: tuple[str, ...] = ()  # attributes that hold the number of units
    widths: tuple[str, ...] = ()  # attributes that hold units * span
    minimum: int = 0


@dataclass(frozen=True)
class Family:
    """Where one model family keeps its trimmable axes. Paths are inside the base model; `*` matches a list index."""

    model_type: str
    layers: str
    head: Axis
    ffn: Axis
    head_dim: str  # attribute of a layer
    encoder: str = "encoder"
    repeats: tuple[str, str] | None = None  # config names whose quotient says how often a shared layer runs
    relative_flops: Callable[[object, int], Flops] | None = None  # extra FLOPs of a head, from (config, head_dim)
    position_bias: str = ""  # attention module whose `position_bias` [B, H, S, S] must follow the kept heads
    aliases: tuple[str, ...] = ()  # other model types with the very same modules
