"""A model in eval mode for a while, gradients allowed, and afterwards exactly as it was; what an analysis checks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.errors import SensibertError

# Tokens a row up to which fused attention in bf16 on a CPU is slower, forward and back, than plain matrix products: 5
# times at 18 tokens, 1.25 times at 128, half as slow at 384 (32 rows, 12 heads of 32, one AVX-512 core).
SHORT = 128
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def quick_attention(
    device: torch.device, autocast: bool = False, length: int | None = None
) -> contextlib.AbstractContextManager:
    """Inside, scaled_dot_product_attention takes what is fastest for batches of ever new shapes.

    On a GPU all but cuDNN, which makes a plan for each new shape, at tens of milliseconds; in bf16 on a CPU plain
    matrix products for rows of up to SHORT tokens. length: tokens a row, None if unknown."""
    if device.type == "cuda":
        return sdpa_kernel(WITHOUT_PLANS)
    short = device.type == "cpu" and autocast and length is not None and length <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if short else contextlib.nullcontext()


@contextlib.contextmanager
def eval_mode(model: nn.Module, autocast: torch.dtype | None = None) -> Iterator[torch.device]:
    """Dropout off, gradients on, mixed precision if asked for; gives the model's device."""
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    model.eval()
    precision = torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()
    try:
        with torch.enable_grad(), precision, quick_attention(device):
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
