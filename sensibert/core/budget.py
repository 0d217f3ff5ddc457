"""Upper bounds on parameters, FLOPs, milliseconds of a forward pass, or megabytes of the weights file."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from .arguments import one_of, show, want_fields
from .cost_table import MEASURED, CostTable
from .errors import SensibertError

_SCALE = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SCOPES = ("encoder", "model")
KINDS = ("params", "flops", *MEASURED)
_WANT = "want for example 50%params, 30%flops, 5.3Mparams, 1.2Gflops, 8ms or 12MB"
_PER_UNIT = {"ms": ("latency", 1e3), "MB": ("size", 1e6), "KB": ("size", 1e3), "GB": ("size", 1e9)}
_PATTERN = re.compile(
    rf"\s*([0-9]*\.?[0-9]+)\s*(?:(%|[KMGT]?)\s*(params|flops)|(%)\s*({'|'.join(MEASURED)})|({'|'.join(_PER_UNIT)}))\s*"
)


@dataclass(frozen=True)
class Budget:
    """An upper bound on the parameters or FLOPs of the encoder or the whole model, on the microseconds of a forward
    pass, or on the bytes of the weights file.

    value: a fraction of the untrimmed cost in (0, 1] if relative, else an absolute number. kind: `params`, `flops`,
    `latency` or `size`; the last two are of the whole model. table: measured costs, which they need to be met. `parse`
    reads a text. SensibertError names an invalid field."""

    value: float
    kind: str = ""
    relative: bool = False
    scope: str = "encoder"
    length: int = 128  # tokens per sequence, for FLOPs
    table: CostTable | None = None

    def __post_init__(self) -> None:
        if isinstance(self.value, str):
            raise SensibertError(f"Budget: value is {show(self.value)}, want a number; Budget.parse reads a text")
        want_fields(self)
        for name, known in (("kind", KINDS), ("scope", SCOPES)):
            if (value := getattr(self, name)) not in known:
                raise SensibertError(f"Budget: {name} is {value!r}, {one_of(value, known)}")
        if not 0 < self.value < math.inf or (self.relative and self.value > 1):
            limits = "a fraction in (0, 1]" if self.relative else "more than 0"
            raise SensibertError(f"Budget: value is {self.value}, want {limits}")
        if self.table is not None and self.table.kind != self.kind:
            raise SensibertError(f"Budget: kind is {self.kind!r}, and table is of {self.table.kind}")
        if self.kind in MEASURED:
            object.__setattr__(self, "scope", "model")
        if self.length < 1:
            raise SensibertError(f"Budget: length is {self.length}, want at least 1")

    @classmethod
    def parse(cls, text: str, scope: str = "encoder", length: int = 128) -> Budget:
        """Parse a text such as `50%params`, `30%flops`, `5.3Mparams`, `1.2Gflops`, `8ms`, `50%latency` or `12MB`.

        SensibertError if the text is not a budget or is outside (0 %, 100 %], or if the scope is unknown."""
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if not match:
            raise SensibertError(f"budget: {show(text)} is not a budget, {_WANT}")
        number, relative = float(match[1]), "%" in (match[2], match[4])
        if number <= 0 or (relative and number > 100):
            raise SensibertError(f"budget: {text!r} is outside (0 %, 100 %], {_WANT}")
        kind, scale = _PER_UNIT[match[6]] if match[6] else (match[3] or match[5], _SCALE.get(match[2] or "", 1.0))
        return cls(number / 100 if relative else number * scale, kind, relative, scope, length)

    @property
    def measured(self) -> bool:
        """Whether costs are measured, not counted."""
        return self.kind in MEASURED

    def with_table(self, table: CostTable | None) -> Budget:
        """The same budget with measured costs."""
        return replace(self, table=table)

    def in_unit(self, cost: float) -> float:
        """A measured cost in the unit of the budget's text: ms or MB."""
        return cost / _PER_UNIT[MEASURED[self.kind]][1]

    def amount(self, cost: float) -> str:
        """A cost in the unit of the budget, for messages."""
        if self.measured:
            return f"{self.in_unit(cost):.4g} {MEASURED[self.kind]}"
        return f"{cost:,.0f} {self.kind}"

    def check_grid(self, elements: bool) -> None:
        """SensibertError for a budget that masks cannot meet: of measured costs, or of FLOPs on a grid of elements."""
        if self.measured:
            raise SensibertError(f"budget: {self}, but masked weights cost what they did, want grid unit")
        if self.kind == "flops" and elements:
            raise SensibertError(f"budget: {self}, but no kernel skips single elements, want params for grid element")

    def __str__(self) -> str:
        if self.relative:
            return f"{self.value * 100:g}%{self.kind}"
        if self.measured:
            return f"{self.in_unit(self.value):.12g}{MEASURED[self.kind]}"
        for unit in ("T", "G", "M", "K"):
            if self.value >= _SCALE[unit]:
                return f"{self.value / _SCALE[unit]:.12g}{unit}{self.kind}"
        return f"{self.value:.12g}{self.kind}"
