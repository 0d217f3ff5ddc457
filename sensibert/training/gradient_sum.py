"""The gradients of several processes, added up in one all-reduce a step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor, nn

from .processes import Processes


class GradientSum:
    """Adds up gradients and loss over all processes, for a model at fixed structure. All have to call it together.

    The first call agrees on the parameters that have a gradient in any process. From then on a process without one,
    which had no rows, adds zeros. The others keep None, so the optimizer passes over them in every process."""

    def __init__(self, weights: Iterable[nn.Parameter], processes: Processes) -> None:
        self._weights, self._processes = list(weights), processes
        self._flat: Tensor | None = None  # all gradients and the loss: memory that is used again in every step

    @torch.no_grad()
    def __call__(self, loss: Tensor) -> Tensor:
        """loss: scalar, of this process. Returns the sum of all; the gradients are then the sums, too, in place."""
        flat = self._agree(loss.device) if self._flat is None else self._flat
        for weight in self._weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        grads = [weight.grad for weight in self._weights if weight.grad is not None]
        torch.cat([*(grad.flatten() for grad in grads), loss.reshape(1)], out=flat)
        self._processes.add_up(flat)
        *sums, total = flat.split([*(grad.numel() for grad in grads), 1])
        if grads:
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(sums, grads, strict=True)])
        return total[0].clone()

    def _agree(self, device: torch.device) -> Tensor:
        """Keep the weights that have a gradient in any process. Returns the memory for their sums: fp32, or fp64 for a
        model in fp64."""
        used = torch.tensor([weight.grad is not None for weight in self._weights], dtype=torch.int32, device=device)
        self._processes.add_up(used)
        self._weights = [weight for weight, count in zip(self._weights, used.tolist(), strict=True) if count]
        dtype = reduce(torch.promote_types, (weight.dtype for weight in self._weights), torch.float32)
        size = sum(weight.numel() for weight in self._weights) + 1
        self._flat = torch.empty(size, dtype=dtype, device=device)
        return self._flat
