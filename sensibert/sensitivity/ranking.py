"""The ranking of whole parameter tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..core.arguments import checked
from ..core.errors import SensibertError
from ..core.grid import Grid
from ..models import Losses, base_of, eval_mode, layout_of
from ..ops import block_sensitivity
from ..optim import MaskedAdamW
from .gradients import Batch, Loss, batch_size, given_loss, passes
from .sampled_loss import loss_of


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
    loss = given_loss if sampled_loss is None else loss_of(model, sampled_loss)
    ranked, out = _ranked(model), None
    weights = list(ranked.values())
    generator, losses, count = torch.Generator().manual_seed(seed), Losses(), 0
    with eval_mode(model, autocast) as device:
        for batch, outputs in passes(model, batches, device):
            value = loss(outputs, batch, generator)
            losses.add(value, batch_size(batch))
            grads = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
            out = block_sensitivity([w.detach() for w in weights], grads, Grid.tensor(), "abs", out=out)
            count += 1
    if out is None:
        raise SensibertError("rank_tensors: batches is empty, want at least one micro-batch")
    losses.check()
    return _ranking(ranked, out, count)


def _ranked(model: nn.Module) -> dict[str, Tensor]:
    """The trimmable matrices that have a gradient, by name."""
    layout, state = layout_of(model), dict(base_of(model).named_parameters())
    names = {m.parameter for site in layout.sites for m in site.members if state[m.parameter].dim() == 2}
    return {name: state[name] for name in sorted(names) if state[name].requires_grad and state[name].numel()}


def _ranking(ranked: dict[str, Tensor], sums: Sequence[Tensor], count: int) -> dict[str, float]:
    """sums: sum of |w * g| of each tensor over `count` gradients."""
    totals = torch.cat([total.flatten() for total in sums]).tolist() if sums else []
    means = {name: total / w.numel() / count for (name, w), total in zip(ranked.items(), totals, strict=True)}
    return dict(sorted(means.items(), key=lambda item: (-item[1], item[0])))


class StepRanking:
    """The ranking by the gradients of one step of a training, which takes no pass of its own.

    Made before the step. MaskedAdamW adds up |w * g| in its step (`track`); after the step of another optimizer, and
    before its gradients are deleted, `read_gradients` is called."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.ranked = {name: w for name, w in _ranked(model).items() if id(w) in held}
        self.optimizer = optimizer if isinstance(optimizer, MaskedAdamW) else None
        self.sums = [torch.zeros(1, 1, device=w.device) for w in self.ranked.values()]
        if self.optimizer is not None:
            grid = Grid.tensor()
            self.optimizer.track({w: (total, grid) for w, total in zip(self.ranked.values(), self.sums, strict=True)})

    @torch.no_grad()
    def read_gradients(self) -> None:
        if self.optimizer is None:
            weights = list(self.ranked.values())
            grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
            block_sensitivity(weights, grads, Grid.tensor(), "abs", out=self.sums)

    def end(self) -> dict[str, float]:
        """Parameter name -> mean |w * g|, the most sensitive first. Empty if the gradients were not finite."""
        if self.optimizer is not None:
            self.optimizer.track({})
        ranking = _ranking(self.ranked, self.sums, 1)
        return ranking if all(map(math.isfinite, ranking.values())) else {}
