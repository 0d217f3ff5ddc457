"""The first step at which a value was not finite, noted without reading from the device."""

from __future__ import annotations

import torch
from torch import Tensor


class FirstNonFinite:
    """Of the values that `note` is given, one or more a step."""

    def __init__(self) -> None:
        self._step: Tensor | None = None  # 0: none so far
        self._value = torch.zeros(())

    def note(self, step: int, value: Tensor) -> None:
        """value: a scalar of this step, on any device."""
        value = value.detach()
        if self._step is None:
            self._step, self._value = torch.zeros((), dtype=torch.int64, device=value.device), value
        first = (self._step == 0) & ~torch.isfinite(value)
        self._step = torch.where(first, step, self._step)
        self._value = torch.where(first, value, self._value)

    def read(self) -> tuple[int, float]:
        """(the step, 0 if all were finite; its value). This reads from the device."""
        return (0, 0.0) if self._step is None else (int(self._step), float(self._value))
