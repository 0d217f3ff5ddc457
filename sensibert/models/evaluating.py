"""A model in eval mode for a while, gradients allowed, and afterwards exactly as it was; what an analysis checks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import SensibertError


@contextlib.contextmanager
def evaluating(model: nn.Module, autocast: torch.dtype | None = None) -> Iterator[torch.device]:
    """Dropout off, gradients on, mixed precision if asked for; gives the model's device."""
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    model.eval()
    precision = torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()
    try:
        with torch.enable_grad(), precision:
            yield device
    finally:
        for module in training:  # one by one: a frozen part may be in eval mode on purpose
            module.training = True


def bare_copy(model: nn.Module) -> nn.Module:
    """A copy without the wrapper around `forward` that mixed precision puts there: it would call the model itself."""
    copied = copy.deepcopy(model)
    vars(copied).pop("forward", None)
    return copied


def require_finite(loss: Tensor, samples: int) -> None:
    """SensibertError if the loss after so many samples is NaN or inf."""
    if not torch.isfinite(loss):
        raise SensibertError(
            f"analyze: the loss after {samples} samples is {float(loss.detach())}, want a finite number"
        )
