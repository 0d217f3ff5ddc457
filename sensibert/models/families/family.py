"""The table of a model family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...core.layout import Flops


@dataclass(frozen=True)
class Axis:
    """A trimmable axis of a layer. All names are module paths, or attributes, inside the layer."""

    produces: tuple[str, ...]  # linear layers whose output rows are the units; missing ones are skipped
    consumes: str  # the linear layer whose input columns read them
    tables: tuple[str, ...] = ()  # more producers: they project a table of relative positions, once per pass
    parts: int = 1  # equal sections of the produced rows (fused q|k|v: 3, gated input: 2)
    counts: tuple[str, ...] = ()  # attributes that hold the number of units
    widths: tuple[str, ...] = ()  # attributes that hold units * span
    minimum: int = 0


@dataclass(frozen=True)
class Family:
    """The trimmable axes of a model family. Paths are inside the base model; `*` matches a list index."""

    model_type: str
    layers: str
    head: Axis
    ffn: Axis
    head_dim: str  # attribute of a layer
    encoder: str = "encoder"
    repeats: tuple[str, str] | None = None  # config names: number of layers, and of groups that share weights
    relative_flops: Callable[[Any, int], Flops] | None = None  # extra FLOPs of a head, from (config, head_dim)
    position_bias: str = ""  # attention module whose `position_bias` [B, H, S, S] needs the kept heads
    aliases: tuple[str, ...] = ()  # other model types with the same module names
