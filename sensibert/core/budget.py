"""Upper bounds on parameters or FLOPs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import SensibertError

_SCALE = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SCOPES = ("encoder", "model")


@dataclass(frozen=True)
class Budget:
    """An upper bound on the parameters or FLOPs of the encoder or the whole model.

    value: a fraction of the untrimmed size in (0, 1] if relative, else an absolute number."""

    value: float
    kind: str  # "params" or "flops"
    relative: bool
    scope: str = "encoder"
    length: int = 128  # tokens per sequence, for FLOPs

    @classmethod
    def parse(cls, text: str, scope: str = "encoder", length: int = 128) -> Budget:
        """Parse a text such as `50%params`, `30%flops`, `5.3Mparams` or `1.2Gflops`.

        SensibertError if the text is not a budget or is outside (0 %, 100 %], or if the scope is unknown."""
        want = "want for example 50%params, 30%flops, 5.3Mparams or 1.2Gflops"
        if scope not in SCOPES:
            raise SensibertError(f"budget: scope is {scope!r}, want encoder or model")
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[KMGT]?)\s*(params|flops)\s*", text)
        if not match:
            raise SensibertError(f"budget: {text!r} is not a budget, {want}")
        number, unit, kind = float(match[1]), match[2], match[3]
        relative = unit == "%"
        if number <= 0 or (relative and number > 100):
            raise SensibertError(f"budget: {text!r} is outside (0 %, 100 %], {want}")
        return cls(number / 100 if relative else number * _SCALE[unit], kind, relative, scope, length)

    def __str__(self) -> str:
        if self.relative:
            return f"{self.value * 100:g}%{self.kind}"
        for unit in ("T", "G", "M", "K"):
            if self.value >= _SCALE[unit]:
                return f"{self.value / _SCALE[unit]:.12g}{unit}{self.kind}"
        return f"{self.value:.12g}{self.kind}"
