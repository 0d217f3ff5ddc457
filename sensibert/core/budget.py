"""Upper bounds on parameters or FLOPs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .arguments import one_of, show, want_fields
from .errors import SensibertError

_SCALE = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SCOPES = ("encoder", "model")
KINDS = ("params", "flops")
_WANT = "want for example 50%params, 30%flops, 5.3Mparams or 1.2Gflops"


@dataclass(frozen=True)
class Budget:
    """An upper bound on the parameters or FLOPs of the encoder or the whole model.

    value: a fraction of the untrimmed size in (0, 1] if relative, else an absolute number. `parse` reads a text.
    SensibertError names an invalid field."""

    value: float
    kind: str = ""  # "params" or "flops"
    relative: bool = False
    scope: str = "encoder"
    length: int = 128  # tokens per sequence, for FLOPs

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
        if self.length < 1:
            raise SensibertError(f"Budget: length is {self.length}, want at least 1")

    @classmethod
    def parse(cls, text: str, scope: str = "encoder", length: int = 128) -> Budget:
        """Parse a text such as `50%params`, `30%flops`, `5.3Mparams` or `1.2Gflops`.

        SensibertError if the text is not a budget or is outside (0 %, 100 %], or if the scope is unknown."""
        pattern = r"\s*([0-9]*\.?[0-9]+)\s*(%|[KMGT]?)\s*(params|flops)\s*"
        match = re.fullmatch(pattern, text) if isinstance(text, str) else None
        if not match:
            raise SensibertError(f"budget: {show(text)} is not a budget, {_WANT}")
        number, unit, kind = float(match[1]), match[2], match[3]
        relative = unit == "%"
        if number <= 0 or (relative and number > 100):
            raise SensibertError(f"budget: {text!r} is outside (0 %, 100 %], {_WANT}")
        return cls(number / 100 if relative else number * _SCALE[unit], kind, relative, scope, length)

    def check_grid(self, elements: bool) -> None:
        """SensibertError for FLOPs on a grid of single elements, which no model can meet."""
        if self.kind == "flops" and elements:
            raise SensibertError(f"budget: {self}, but no kernel skips single elements, want params for grid element")

    def __str__(self) -> str:
        if self.relative:
            return f"{self.value * 100:g}%{self.kind}"
        for unit in ("T", "G", "M", "K"):
            if self.value >= _SCALE[unit]:
                return f"{self.value / _SCALE[unit]:.12g}{unit}{self.kind}"
        return f"{self.value:.12g}{self.kind}"
