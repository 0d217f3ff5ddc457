"""How an analysis runs a model: in eval mode with gradients, in the fastest attention, with a loss that is checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.errors import SensibertError

# In rows of up to so many tokens, fused attention in bf16 on a CPU is slower than plain matrix products, forward and
# backward: 5 times at 18 tokens, 1.25 times at 128; at 384 twice as fast (32 rows, 12 heads of 32, one AVX-512 core).
SHORT = 128
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def quick_attention(
    device: torch.device, autocast: bool = False, length: int | None = None
) -> contextlib.AbstractContextManager:
    """A context in which scaled_dot_product_attention is fast for batches whose shapes keep changing.

    On a GPU it excludes cuDNN, which spends tens of milliseconds on a plan for each new shape; in bf16 on a CPU it
    selects plain matrix products for rows of up to SHORT tokens. length: tokens in a row, None if unknown."""
    if device.type == "cuda":
        return sdpa_kernel(WITHOUT_PLANS)
    short = device.type == "cpu" and autocast and length is not None and length <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if short else contextlib.nullcontext()


@contextlib.contextmanager
def eval_mode(model: nn.Module, autocast: torch.dtype | None = None) -> Iterator[torch.device]:
    """A context with dropout off, gradients on and mixed precision in `autocast`; its value is the model's device.

    On exit each module is in the mode it was in."""
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


def require_finite(loss: Tensor, samples: int) -> None:
    """SensibertError if the loss, computed after `samples` samples, is NaN or inf."""
    if not torch.isfinite(loss):
        raise SensibertError(
            f"analyze: the loss after {samples} samples is {float(loss.detach())}, want a finite number"
        )
