"""Model and micro-batches -> sensitivity: one score for every unit that could be trimmed.

With a gate m_j = 1 on unit j's activation, dL/dm_j = sum of W * dL/dW over the block of the consuming weight that reads
the unit (its columns). So one call of `block_sensitivity` on weights and gradients gives every gate gradient g_j:

    fisher     S_j += g_j^2, labels sampled from the model's own prediction (does not vanish with the loss)
    taylor     S_j += |g_j|, given labels
    saliency   S_j += sum of |w * g| over all members of the unit, given labels
    magnitude  sum of w^2 over all members; random: a coin. Controls that need no data.
    obs        the rise of the loss as units go one after the other and the rest takes over (sensibert.surgeon)
    paper      our reading of the Sensi-BERT abstract: soft gates m_j, learned with an L1 penalty in a short run

Michel et al., arXiv 1905.10650 (gates); Kwon et al., arXiv 2204.09656 (Fisher of masks).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..core.artifacts import Sensitivity
from ..core.errors import SensibertError
from ..core.grid import Grid
from ..core.layout import Layout
from ..models import base_of, layout_of
from ..models.masks import masks_of
from .gradients import (
    STATISTICS,
    Batch,
    Loss,
    collect_scores,
    given_loss,
    gradient_scores,
    reduce_blocks,
    scored_blocks,
)
from .kfac_obs import FisherFactors, collect_factors, consumer, predicted_curve, removal_costs, unit_columns
from .soft_gates import soft_gate_scores


def _remove(
    model: nn.Module, layout: Layout, factors: Mapping[str, FisherFactors], predict: bool
) -> tuple[dict[str, Tensor], dict[str, list[tuple[int, float]]]]:
    scores, curves = {}, {}
    for site in layout.sites:
        linear, found = consumer(model, site.consumer.parameter), factors[site.consumer.parameter]
        columns = unit_columns(site)
        costs = removal_costs(linear.weight, found, linear.bias, columns)
        scores[site.name] = costs.float()
        if predict:  # else the costs are not of the loss
            curves[site.name] = predicted_curve(linear, found, costs, columns)
    return scores, curves


def analyze(
    model: nn.Module,
    batches: Iterable[Batch] = (),
    statistic: str = "fisher",
    sampled_loss: Loss | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    grid: Grid | None = None,
    factors: Mapping[str, FisherFactors] | None = None,
) -> Sensitivity:
    """Score every unit of a transformers model; weights, gradients, mode and random state stay as they are.

    batches: micro-batches as the model takes them (1 to 8 samples each; the square is taken per micro-batch); not read
    by magnitude and random. sampled_loss: (outputs, batch, generator) -> loss with labels drawn from the prediction,
    needed by fisher and obs (`sampled_loss`). autocast: dtype of a mixed-precision forward pass. grid:
    score the blocks of every weight instead of units; a block that is masked already scores -inf. factors: for obs and
    layer-obs, where they were collected already (`sensibert.surgeon.collect_factors`).
    SensibertError for an unknown statistic, no data, or a loss that is not finite."""
    if statistic not in STATISTICS:
        raise SensibertError(f"analyze: statistic is {statistic!r}, want one of {', '.join(STATISTICS)}")
    rule, layout, samples, curves = STATISTICS[statistic], layout_of(model), 0, {}
    if rule.sampled and sampled_loss is None:
        raise SensibertError(f"analyze: {statistic} samples labels, want sampled_loss (see sensibert.sensitivity)")
    if grid is not None and rule.reduce in ("gates", "factors"):
        raise SensibertError(f"analyze: statistic {statistic!r} is of whole units, want another with a grid")
    loss, blocks = sampled_loss if rule.sampled else given_loss, scored_blocks(layout, rule, grid)
    if statistic == "random":
        generator = torch.Generator().manual_seed(seed)
        shapes = {b.owner: b.shape for b in blocks} if grid else {site.name: (site.units,) for site in layout.sites}
        scores = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    elif not rule.data:
        state = dict(base_of(model).named_parameters())
        weights = [state[block.parameter].detach() for block in blocks]
        scores = collect_scores(blocks, reduce_blocks(blocks, weights, None, rule, None))
    elif statistic == "paper":
        scores, samples = soft_gate_scores(model, layout, batches, loss, seed, autocast)
    elif rule.reduce == "factors":
        factors = factors or collect_factors(model, layout, batches, loss if rule.sampled else None, seed, autocast)
        scores, curves = _remove(model, layout, factors, rule.sampled)
        samples = max((found.samples for found in factors.values()), default=0)
    else:
        scores, samples = gradient_scores(model, blocks, batches, rule, loss, seed, autocast)
    masks = masks_of(model)
    if masks is not None and masks.grid == grid:
        for name, keep in masks.keep.items():
            scores[name].masked_fill_(~keep, -torch.inf)
    return Sensitivity(layout, scores, statistic, samples, seed, curves=curves, grid=grid)
