"""Model and micro-batches -> Sensitivity: one score for every unit that can be removed.

With a gate m_j = 1 on the activation of unit j, dL/dm_j is the sum of W * dL/dW over the block of the consuming weight
that reads the unit (its columns). One call of `block_sensitivity` on weights and gradients computes every gate gradient
g_j. The scores, summed over micro-batches:

    obs        rise of the loss as units are removed one by one and the remaining ones compensate (kfac_obs.py)
    layer-obs  the same for the squared error of each layer's output: needs no labels
    fisher     g_j^2, with labels sampled from the model's own prediction, so it does not vanish with the loss
    taylor     |g_j|, with the given labels
    saliency   |w * g| summed over all members of the unit, with the given labels
    magnitude  w^2 summed over all members; random: uniform numbers. Controls that need no data.
    soft_gates our reading of the Sensi-BERT abstract: gates m_j, learned with an L1 penalty in a short run

Michel et al., arXiv 1905.10650 (gates); Kwon et al., arXiv 2204.09656 (Fisher information of masks).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..core.arguments import checked, one_of
from ..core.artifacts import Sensitivity
from ..core.errors import SensibertError
from ..core.grid import Grid
from ..core.layout import Layout
from ..core.statistics import FORMER_METHODS, STATISTICS
from ..models import base_of, layout_of
from ..models.masks import masks_of
from ..models.modules import want_finite
from .gradients import Batch, Loss, collect_scores, given_loss, gradient_scores, reduce_blocks, scored_blocks
from .kfac_obs import FisherFactors, collect_factors, consumer, unit_columns
from .removal import Consumer, predicted_curves, removal_costs
from .sampled_loss import loss_of, sampled_loss
from .soft_gates import soft_gate_scores


def _removal_scores(
    model: nn.Module, layout: Layout, factors: Mapping[str, FisherFactors], predict: bool
) -> tuple[dict[str, Tensor], dict[str, list[tuple[int, float]]]]:
    consumers = []
    for site in layout.sites:
        linear = consumer(model, site.consumer.parameter)
        consumers.append(Consumer(linear.weight, linear.bias, factors[site.consumer.parameter], unit_columns(site)))
    names, costs = [site.name for site in layout.sites], removal_costs(consumers)
    scores = {name: cost.float() for name, cost in zip(names, costs, strict=True)}
    # The costs of layer-obs do not measure the loss.
    curves = dict(zip(names, predicted_curves(consumers, costs), strict=True)) if predict else {}
    return scores, curves


@checked
def analyze(
    model: nn.Module,
    batches: Iterable[Batch] = (),
    method: str | None = None,
    sampled_loss: Loss = sampled_loss,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    grid: Grid | None = None,
    factors: Mapping[str, FisherFactors] | None = None,
) -> Sensitivity:
    """Score every unit of a transformers model. Weights, gradients, mode and random state are not changed.

    batches: dicts of tensors, the inputs of the model, with 1 to 8 samples each (the gradient of each micro-batch is
    squared); not read by `magnitude` and `random`. method: one of the statistics above; None: `obs`, with a grid
    `fisher`. sampled_loss: (outputs, batch, generator) -> scalar loss with labels drawn from the prediction, for `obs`
    and `fisher`. autocast: dtype of a mixed-precision forward pass. grid: score the blocks of every weight instead of
    units; masked blocks score -inf. factors: for `obs` and `layer-obs`, if `collect_factors` was already called. Scores
    are fp32 on the model's device, summed over the samples: one [units] tensor per site, or with a grid one [blocks of
    rows, blocks of columns] tensor per weight. SensibertError for an unknown method, no data, a batch that the
    model cannot run on, or a loss that is not finite."""
    method = ("obs" if grid is None else "fisher") if method is None else FORMER_METHODS.get(method, method)
    if method not in STATISTICS:
        raise SensibertError(f"analyze: method is {method!r}, {one_of(method, STATISTICS)}")
    rule, layout, samples = STATISTICS[method], layout_of(model), 0
    curves: dict[str, list[tuple[int, float]]] = {}
    if grid is not None and rule.units_only:
        raise SensibertError(f"analyze: method {method!r} scores whole units, want another with a grid")
    loss, blocks = loss_of(model, sampled_loss) if rule.sampled else given_loss, scored_blocks(layout, rule, grid)
    device = next(model.parameters()).device
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        shapes = {b.owner: b.shape for b in blocks} if grid else {site.name: (site.units,) for site in layout.sites}
        scores = {name: torch.rand(shape, generator=generator).to(device) for name, shape in shapes.items()}
    elif not rule.data:
        want_finite(model.named_parameters(), "analyze")
        state = dict(base_of(model).named_parameters())
        weights = [state[block.parameter].detach() for block in blocks]
        scores = collect_scores(blocks, reduce_blocks(blocks, weights, None, rule, None))
    elif rule.reduce == "gates":
        scores, samples = soft_gate_scores(model, layout, batches, loss, seed, autocast)
    elif rule.reduce == "factors":
        factors = factors or collect_factors(model, layout, batches, loss if rule.sampled else None, seed, autocast)
        missing = {site.consumer.parameter for site in layout.sites} - factors.keys()
        if missing:
            raise SensibertError(f"analyze: factors lack {min(missing)}, want those of collect_factors for this model")
        scores, curves = _removal_scores(model, layout, factors, rule.sampled)
        samples = max((of_site.samples for of_site in factors.values()), default=0)
    else:
        scores, samples = gradient_scores(model, blocks, batches, rule, loss, seed, autocast)
    masks = masks_of(model)
    if masks is not None and masks.grid == grid:
        for name, keep in masks.keep.items():
            scores[name].masked_fill_(~keep.to(device), -torch.inf)
    return Sensitivity(layout, scores, method, samples, seed, curves=curves, grid=grid)
