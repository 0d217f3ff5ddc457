"""How an analysis runs a model: in eval mode with gradients, with the fastest attention, and with checked losses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.arguments import show
from ..core.errors import SensibertError

# Up to this many tokens per row, fused attention in bf16 on a CPU is slower than plain matrix products, forward and
# backward: 5 times at 18 tokens, 1.25 times at 128. At 384 it is twice as fast (32 rows, 12 heads of 32, one AVX-512
# core).
SHORT = 128
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def quick_attention(
    device: torch.device, autocast: bool = False, length: int | None = None
) -> contextlib.AbstractContextManager:
    """A context in which scaled_dot_product_attention is fast for batches whose shapes keep changing.

    On a GPU it excludes cuDNN, which spends tens of milliseconds on a plan for each new shape; in bf16 on a CPU it
    selects plain matrix products for rows of up to SHORT tokens. length: tokens per row, None if unknown."""
    if device.type == "cuda":
        return sdpa_kernel(WITHOUT_PLANS)
    short = device.type == "cpu" and autocast and length is not None and length <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if short else contextlib.nullcontext()


@contextlib.contextmanager
def eval_mode(model: nn.Module, autocast: torch.dtype | None = None) -> Iterator[torch.device]:
    """A context without dropout, with gradients, and with mixed precision in `autocast`. Yields the model's device.

    On exit the mode of each module is restored."""
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


class Losses:
    """The losses of an analysis. They are read all at once (`check`), so that no batch waits for the one before."""

    def __init__(self) -> None:
        self.samples = 0
        self._losses: list[tuple[int, Tensor]] = []  # samples before it, and the loss

    def add(self, loss: Tensor, samples: int) -> None:
        """samples: rows of the batch. SensibertError if the loss is no scalar tensor, or has no gradient."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else show(loss)
            raise SensibertError(f"analyze: the loss is {came}, want a scalar tensor")
        if not loss.requires_grad:
            raise SensibertError("analyze: the loss has no gradient, want one of the model's outputs, not detached")
        self._losses.append((self.samples, loss.detach().flatten()))
        self.samples += samples

    def check(self) -> None:
        """SensibertError for the first loss that is NaN or inf."""
        if not self._losses:
            return
        values = torch.cat([loss.double() for _, loss in self._losses]).tolist()
        for value, (samples, _) in zip(values, self._losses, strict=True):
            if not math.isfinite(value):
                raise SensibertError(f"analyze: the loss after {samples} samples is {value}, want a finite number")
