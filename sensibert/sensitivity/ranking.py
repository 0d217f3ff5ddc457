"""The ranking of whole parameter tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..core.arguments import checked
from ..core.errors import SensibertError
from ..core.grid import Grid
from ..models import base_of, eval_mode, layout_of, require_finite
from ..ops import block_sensitivity
from .gradients import Batch, Loss, batch_size, given_loss, passes


@checked
def rank_tensors(
    model: nn.Module,
    batches: Iterable[Batch],
    sampled_loss: Loss | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Parameter name -> mean |w * g| of every trimmable weight matrix, the most sensitive first.

    The mean is over elements and micro-batches; g is the gradient of a micro-batch's mean loss. To first order |w * g|
    is the change of the loss if only that weight is set to 0. The mean does not favour large tensors. Arguments as for
    `analyze`; without sampled_loss the labels of the batches are used."""
    layout, state = layout_of(model), dict(base_of(model).named_parameters())
    names = {m.parameter for site in layout.sites for m in site.members if state[m.parameter].dim() == 2}
    used = [name for name in sorted(names) if state[name].requires_grad and state[name].numel()]
    weights, out = [state[name] for name in used], None
    generator, samples, count = torch.Generator().manual_seed(seed), 0, 0
    with eval_mode(model, autocast) as device:
        for batch, outputs in passes(model, batches, device):
            value = (sampled_loss or given_loss)(outputs, batch, generator)
            require_finite(value, samples)
            grads = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
            out = block_sensitivity([w.detach() for w in weights], grads, Grid.tensor(), "abs", out=out)
            samples, count = samples + batch_size(batch), count + 1
    if out is None:
        raise SensibertError("rank_tensors: batches is empty, want at least one micro-batch")
    means = {name: float(o) / w.numel() / count for name, w, o in zip(used, weights, out, strict=True)}
    return dict(sorted(means.items(), key=lambda item: (-item[1], item[0])))
