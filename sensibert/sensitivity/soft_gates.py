"""Scores from learnable soft gates with an L1 penalty: our reading of the Sensi-BERT abstract."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..core.errors import SensibertError
from ..core.layout import Layout
from ..models import Losses, eval_mode
from .gradients import Batch, Loss, batch_size, passes
from .kfac_obs import consumer

GATE_RATE, GATE_PENALTY = 0.02, 0.5  # Adam's step for the gates; weight of the mean |gate| against the loss


def soft_gate_scores(
    model: nn.Module,
    layout: Layout,
    batches: Iterable[Batch],
    loss: Loss,
    seed: int,
    autocast: torch.dtype | None,
) -> tuple[dict[str, Tensor], int]:
    """(site -> |m_j| [units], number of samples). Adam minimizes loss + penalty * mean |m| over the gates only, in a
    short run."""
    device = next(model.parameters()).device
    gates = {site.name: torch.ones(site.units, device=device, requires_grad=True) for site in layout.sites}
    handles = []
    for site in layout.sites:

        def gated(
            module: nn.Module, args: tuple, gate: Tensor = gates[site.name], span: int = site.consumer.span
        ) -> tuple:
            return (args[0] * gate.repeat_interleave(span).to(args[0].dtype), *args[1:])

        handles.append(consumer(model, site.consumer.parameter).register_forward_pre_hook(gated))
    used = [gate for gate in gates.values() if gate.numel()]
    if not used:
        raise SensibertError("analyze: the model has no unit to score, want one with heads or FFN neurons")
    optimizer = torch.optim.Adam(used, lr=GATE_RATE)
    generator, losses = torch.Generator().manual_seed(seed), Losses()
    try:
        with eval_mode(model, autocast):
            for batch, outputs in passes(model, batches, device):
                value = loss(outputs, batch, generator)
                losses.add(value, batch_size(batch))
                total = value + GATE_PENALTY * torch.cat(used).abs().mean()
                for gate, grad in zip(used, torch.autograd.grad(total, used), strict=True):
                    gate.grad = grad
                optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    if not losses.samples:
        raise SensibertError("analyze: batches is empty, want at least one micro-batch")
    losses.check()
    return {name: gate.detach().abs() for name, gate in gates.items()}, losses.samples
