"""Settings after the last cut (dropout, frozen embeddings), which are restored at the end."""

from __future__ import annotations

import torch
from torch import nn

from ..core.schedule import Schedule
from ..models import embeddings_of


class Recovery:
    """Applies a schedule's dropout and frozen embeddings to a model, and restores the former values."""

    def __init__(self) -> None:
        self._before: list[tuple[object, str, object]] = []  # (owner, attribute, former value)

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, left: float) -> None:
        """left: fraction of the encoder's cost that is left. The moments of frozen embeddings are deleted from the
        optimizer."""
        p = schedule.dropout()
        for module in model.modules() if p is not None else ():
            name = "p" if isinstance(module, nn.Dropout) else "attention_dropout"  # a number in ModernBERT
            if isinstance(getattr(module, name, None), float):
                self._set(module, name, p)
        if schedule.freezes(left):
            for weight in embeddings_of(model).parameters():
                self._set(weight, "requires_grad", False)
                optimizer.state.pop(weight, None)  # saves half of the optimizer's memory for MiniLM

    def end(self) -> None:
        for owner, name, value in self._before:
            setattr(owner, name, value)
        self._before.clear()

    def _set(self, owner: object, name: str, value: object) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)
