"""What a sub-layer costs by the units it keeps, as measured: microseconds of a forward pass, or bytes of a file."""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import one_of, show, want_fields
from .errors import SensibertError
from .files import write_atomically
from .json_text import parse_json
from .text import number_of

if TYPE_CHECKING:
    from .layout import Layout

Points = tuple[tuple[int, int], ...]  # (units kept, cost), ascending, from 0 units at cost 0
MEASURED = {"latency": "ms", "size": "MB"}  # kind of a budget -> its unit
RUNTIMES = ("torch", "onnx", "onnx-int8", "openvino", "cuda")
WEIGHTS = {"fp32": 4, "fp16": 2, "bf16": 2}  # precision of the weights in a file -> bytes of one
FORMAT = "sensibert.costs"


@dataclass(frozen=True)
class CostTable:
    """Costs of the sub-layers of a model in a runtime, between measured points by linear interpolation.

    kind: `latency`, in microseconds of one forward pass, or `size`, in bytes. rest: cost of everything but heads and
    FFN neurons. heads, ffn: points (units kept, cost of one sub-layer), the first (0, 0); costs never decrease. family,
    hidden: of the model. device, threads, batch, length: what was measured, for latency. offset: cost of a trimmed
    model beyond the sum of its parts, as far as it was measured. For size: weights, their precision in the file;
    vocabulary, rows of the embeddings, 0 for those of the model; whole, bytes of the untrimmed model's file in 32 bits,
    of which a relative budget is a fraction, 0 for the sum of all parts. SensibertError for a field that does not
    fit."""

    kind: str
    runtime: str
    rest: int
    heads: Points
    ffn: Points
    family: str
    hidden: int
    device: str = ""
    threads: int = 1
    batch: int = 1
    length: int = 128
    offset: int = 0
    weights: str = "fp32"
    vocabulary: int = 0
    whole: int = 0

    def __post_init__(self) -> None:
        want_fields(self)
        for name, known in (("kind", MEASURED), ("runtime", RUNTIMES), ("weights", WEIGHTS)):
            if (value := getattr(self, name)) not in known:
                raise SensibertError(f"CostTable: {name} is {show(value)}, {one_of(value, known)}")
        for name in ("heads", "ffn"):
            points = getattr(self, name)
            counts, costs = zip(*points) if points else ((), ())
            if not points or points[0] != (0, 0) or list(counts) != sorted(set(counts)) or list(costs) != sorted(costs):
                raise SensibertError(
                    f"CostTable: {name} is {show(str(points))}, want points (units, cost) from (0, 0) on, ascending"
                )
        for name in ("rest", "threads", "batch", "length"):
            if getattr(self, name) < (0 if name == "rest" else 1):
                raise SensibertError(f"CostTable: {name} is {getattr(self, name)}, want a positive number")

    def cost(self, kind: str, count: int) -> int:
        """Cost of one sub-layer ("head" or "ffn") that keeps `count` units. SensibertError beyond the last point."""
        points = self.heads if kind == "head" else self.ffn
        at = bisect_left(points, count, key=lambda point: point[0])
        if at == len(points):
            raise SensibertError(f"costs: a layer has {count} units, and the table ends at {points[-1][0]}")
        units, cost = points[at]
        if units == count:
            return cost
        below, least = points[at - 1]
        return least + (cost - least) * (count - below) // (units - below)

    def want_fit(self, layout: Layout) -> None:
        """SensibertError if the table is of another kind of model than the layout."""
        most = {"head": self.heads[-1][0], "ffn": self.ffn[-1][0]}
        if (self.family, self.hidden) != (layout.family, layout.hidden) or any(
            site.units > most[site.kind] for site in layout.sites
        ):
            raise SensibertError(
                f"latency_table: it is of a {self.family} with hidden size {self.hidden}, at most {most['head']} heads "
                f"and {most['ffn']} neurons; the model is a {layout.family} with hidden size {layout.hidden}"
            )

    def corrected(self, predicted: float, measured: float) -> CostTable:
        """The table that predicts for a trimmed model what was measured."""
        return dataclasses.replace(self, offset=self.offset + round(measured - predicted))

    def in_form(self, weights: str, removed: int, others: int, vocabulary: int = 0) -> CostTable:
        """Sizes of the same model in another form, computed from those with all rows of the embeddings.

        removed: elements of rows that the embeddings lose. others: elements outside of heads and neurons that change
        their precision, for the graph of a runtime those of the embeddings alone. vocabulary: rows that are left."""
        each = 1 if self.runtime.endswith("int8") else WEIGHTS[weights]
        saved = (WEIGHTS[self.weights] - WEIGHTS[weights]) * others + each * removed
        halved = WEIGHTS[self.weights] // WEIGHTS[weights] if self.runtime == "torch" else 1
        heads, ffn = (tuple((n, -(-cost // halved)) for n, cost in points) for points in (self.heads, self.ffn))
        rest = max(0, self.rest - saved)
        return dataclasses.replace(self, weights=weights, vocabulary=vocabulary, rest=rest, heads=heads, ffn=ffn)

    def described(self) -> str:
        """What was measured, in words."""
        if self.kind == "size":
            return f"the weights file for {self.runtime}" + f" in {self.weights}" * (self.weights != "fp32")
        where = f" on {self.device}" if self.device else ""
        threads = number_of(self.threads, "thread")
        return f"one forward pass of {self.batch} x {self.length} tokens in {self.runtime}, {threads}{where}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostTable:
        """Inverse of `to_dict`, also after JSON. SensibertError for anything else."""
        try:
            heads, ffn = (tuple((count, cost) for count, cost in data[name]) for name in ("heads", "ffn"))
            return cls(**{**data, "heads": heads, "ffn": ffn})
        except (KeyError, TypeError, ValueError) as error:
            raise SensibertError(f"costs: not a table of costs ({error!r})") from None

    def save(self, path: str | Path) -> None:
        """Write a JSON file, atomically."""
        text = json.dumps({"format": FORMAT, **self.to_dict()}, indent=1)
        write_atomically(path, lambda part: Path(part).write_text(text + "\n", encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """Read a file of `save`. SensibertError for any other file."""
        try:
            data = parse_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or f"it is not JSON: {error}"
            raise SensibertError(f"latency_table: {path} cannot be read ({reason})") from None
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise SensibertError(f"latency_table: {path} is no table of costs, want a file of sensibert latency")
        return cls.from_dict(data)
