"""What is different after the last cut: dropout and frozen embeddings, and how it is put back at the end."""

from __future__ import annotations

import torch
from torch import nn

from ..core.schedule import Schedule
from ..models import embeddings_of


class Recovery:
    """Applies a schedule's dropout and frozen embeddings to a model, and restores what they were."""

    def __init__(self) -> None:
        self._before: list[tuple[object, str, object]] = []  # (owner, attribute, former value)

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, left: float) -> None:
        """left: fraction of the encoder's cost that is left. The optimizer forgets the moments of frozen embeddings."""
        p = schedule.dropout()
        for module in model.modules() if p is not None else ():
            name = "p" if isinstance(module, nn.Dropout) else "attention_dropout"  # a number in ModernBERT
            if isinstance(getattr(module, name, None), float):
                self._set(module, name, p)
        if schedule.freezes(left):
            for weight in embeddings_of(model).parameters():
                self._set(weight, "requires_grad", False)
                optimizer.state.pop(weight, None)  # half of the memory of MiniLM's AdamW

    def end(self) -> None:
        for owner, name, value in self._before:
            setattr(owner, name, value)
        self._before.clear()

    def _set(self, owner: object, name: str, value: object) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)
