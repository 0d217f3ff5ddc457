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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..artifacts import Grid, Layout, Sensitivity
from ..errors import SensibertError
from ..models import base_of, describe, evaluating, require_finite
from ..models.base import attribute
from ..models.masks import masks_of
from ..ops import block_sensitivity
from ..surgeon import Moments, collect_moments, consumer, predicted_curve, removal_costs, unit_columns

Batch = Mapping[str, Tensor]
Loss = Callable[[object, Batch, torch.Generator], Tensor]


@dataclass(frozen=True)
class Statistic:
    """How a score comes about: from which labels, which members, and by which reduction of w and g."""

    reduce: str
    finish: str = "none"
    data: bool = True
    sampled: bool = False  # labels drawn from the model's prediction
    all_members: bool = False  # else only the consuming weight


STATISTICS = {
    "obs": Statistic("moments", sampled=True),
    "layer-obs": Statistic("moments"),
    "fisher": Statistic("signed", "square", sampled=True),
    "taylor": Statistic("signed", "abs"),
    "saliency": Statistic("abs", all_members=True),
    "magnitude": Statistic("weight_square", data=False, all_members=True),
    "random": Statistic("random", data=False),
    "paper": Statistic("gates"),
}
GATE_RATE, GATE_PENALTY = 0.02, 0.5  # Adam's step for the gates; weight of the mean |gate| against the loss


def given_loss(outputs: object, batch: Batch, generator: torch.Generator) -> Tensor:
    """The loss the model itself computed from the labels in the batch."""
    loss = getattr(outputs, "loss", None)
    if loss is None:
        raise SensibertError(f"analyze: the model gave no loss, want labels in the batch (it has {sorted(batch)})")
    return loss


class _Scored(NamedTuple):
    """A parameter whose blocks are scored, and whose score that is: a site's (its units), or the parameter's own."""

    owner: str
    parameter: str
    grid: Grid
    dim: int = 0
    parts: int = 1  # sections along dim, each with one block a unit
    shape: tuple[int, ...] = (-1,)  # of the owner's scores

    def sections(self, parameter: Tensor) -> list[Tensor]:
        return list(parameter.chunk(self.parts, self.dim)) if self.parts > 1 else [parameter]


def _blocks(layout: Layout, statistic: Statistic, grid: Grid | None) -> list[_Scored]:
    if grid is not None:
        shapes = [(w.parameter, grid.shape(w.rows, w.cols)) for w in layout.weights]
        return [_Scored(name, name, grid, shape=shape) for name, shape in shapes]
    chosen = [(site, site.members if statistic.all_members else (site.consumer,)) for site in layout.sites]
    return [_Scored(site.name, m.parameter, m.grid, m.dim, m.parts) for site, members in chosen for m in members]


def _reduce(
    blocks: list[_Scored],
    weights: list[Tensor],
    grads: list[Tensor] | None,
    statistic: Statistic,
    out: list[Tensor] | None,
) -> list[Tensor]:
    """One op call over all weights; out holds one tensor per section, as its grid cuts it."""
    parts, part_grads, grids = [], [], []
    for number, block in enumerate(blocks):
        sections = block.sections(weights[number])
        parts += sections
        part_grads += block.sections(grads[number]) if grads is not None else []
        grids += [block.grid] * len(sections)
    return block_sensitivity(parts, part_grads, grids, statistic.reduce, statistic.finish, out=out)


def _collect(blocks: list[_Scored], out: list[Tensor]) -> dict[str, Tensor]:
    """Sum the sections and members of each owner: name -> fp32 [units], or as the grid cuts the weight."""
    scores: dict[str, Tensor] = {}
    rest = iter(out)
    for block in blocks:
        for _ in range(block.parts):
            found = next(rest).float().cpu().reshape(block.shape)
            scores[block.owner] = scores[block.owner] + found if block.owner in scores else found
    return scores


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _gradient_scores(
    model: nn.Module, blocks: list[_Scored], batches: Iterable[Batch], statistic: Statistic, loss: Loss, seed, autocast
) -> tuple[dict[str, Tensor], int]:
    state = dict(base_of(model).named_parameters())
    weights = [state[block.parameter] for block in blocks]
    frozen = [p for p in weights if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    generator, out, samples = torch.Generator().manual_seed(seed), None, 0
    try:
        with evaluating(model, autocast) as device:
            for batch in batches:
                batch = {name: value.to(device) for name, value in batch.items()}
                value = loss(model(**batch), batch, generator)
                # Asking for these gradients alone skips the embeddings and leaves every .grad as it is.
                grads = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
                require_finite(value, samples)
                out = _reduce(blocks, [w.detach() for w in weights], list(grads), statistic, out)
                samples += _size(batch)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    if out is None:
        raise SensibertError("analyze: no batches came, want at least one micro-batch")
    return _collect(blocks, out), samples


def _gate_scores(
    model: nn.Module, layout: Layout, batches: Iterable[Batch], loss: Loss, seed: int, autocast
) -> tuple[dict[str, Tensor], int]:
    """|m_j| after a short run of Adam on the gates alone: loss + penalty * mean |m|, weights fixed."""
    base, device = base_of(model), next(model.parameters()).device
    gates = {site.name: torch.ones(site.units, device=device, requires_grad=True) for site in layout.sites}
    handles = []
    for site in layout.sites:
        consumer = attribute(base, site.consumer.parameter.removesuffix(".weight"))

        def gated(module: nn.Module, args: tuple, gate: Tensor = gates[site.name], span: int = site.consumer.span):
            return (args[0] * gate.repeat_interleave(span).to(args[0].dtype), *args[1:])

        handles.append(consumer.register_forward_pre_hook(gated))
    used = [gate for gate in gates.values() if gate.numel()]
    if not used:
        raise SensibertError("analyze: no unit is left to be scored, want a model that has some")
    optimizer = torch.optim.Adam(used, lr=GATE_RATE)
    generator, samples = torch.Generator().manual_seed(seed), 0
    try:
        with evaluating(model, autocast):
            for batch in batches:
                batch = {name: value.to(device) for name, value in batch.items()}
                value = loss(model(**batch), batch, generator)
                total = value + GATE_PENALTY * torch.cat(used).abs().mean()
                require_finite(total, samples)
                for gate, grad in zip(used, torch.autograd.grad(total, used), strict=True):
                    gate.grad = grad
                optimizer.step()
                samples += _size(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not samples:
        raise SensibertError("analyze: no batches came, want at least one micro-batch")
    return {name: gate.detach().abs().cpu() for name, gate in gates.items()}, samples


def _remove(
    model: nn.Module, layout: Layout, moments: Mapping[str, Moments], predict: bool
) -> tuple[dict[str, Tensor], dict[str, list[tuple[int, float]]]]:
    scores, curves = {}, {}
    for site in layout.sites:
        linear, found = consumer(model, site.consumer.parameter), moments[site.consumer.parameter]
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
    moments: Mapping[str, Moments] | None = None,
) -> Sensitivity:
    """Score every unit of a transformers model; weights, gradients, mode and random state stay as they are.

    batches: micro-batches as the model takes them (1 to 8 samples each; the square is taken per micro-batch); not read
    by magnitude and random. sampled_loss: (outputs, batch, generator) -> loss with labels drawn from the prediction,
    needed by fisher and obs (`sensibert.tasks.sampled_loss`). autocast: dtype of a mixed-precision forward pass. grid:
    score the blocks of every weight instead of units; a block that is masked already scores -inf. moments: for obs and
    layer-obs, where they were collected already (`sensibert.surgeon.collect_moments`).
    SensibertError for an unknown statistic, no data, or a loss that is not finite."""
    if statistic not in STATISTICS:
        raise SensibertError(f"analyze: statistic is {statistic!r}, want one of {', '.join(STATISTICS)}")
    rule, layout, samples, curves = STATISTICS[statistic], describe(model), 0, {}
    if rule.sampled and sampled_loss is None:
        raise SensibertError(f"analyze: {statistic} samples labels, want sampled_loss (see sensibert.tasks)")
    if grid is not None and rule.reduce in ("gates", "moments"):
        raise SensibertError(f"analyze: statistic {statistic!r} is of whole units, want another with a grid")
    loss, blocks = sampled_loss if rule.sampled else given_loss, _blocks(layout, rule, grid)
    if statistic == "random":
        generator = torch.Generator().manual_seed(seed)
        shapes = {b.owner: b.shape for b in blocks} if grid else {site.name: (site.units,) for site in layout.sites}
        scores = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    elif not rule.data:
        state = dict(base_of(model).named_parameters())
        weights = [state[block.parameter].detach() for block in blocks]
        scores = _collect(blocks, _reduce(blocks, weights, None, rule, None))
    elif statistic == "paper":
        scores, samples = _gate_scores(model, layout, batches, loss, seed, autocast)
    elif rule.reduce == "moments":
        moments = moments or collect_moments(model, layout, batches, loss if rule.sampled else None, seed, autocast)
        scores, curves = _remove(model, layout, moments, rule.sampled)
        samples = max((found.samples for found in moments.values()), default=0)
    else:
        scores, samples = _gradient_scores(model, blocks, batches, rule, loss, seed, autocast)
    masks = masks_of(model)
    if masks is not None and masks.grid == grid:
        for name, keep in masks.keep.items():
            scores[name].masked_fill_(~keep, -torch.inf)
    return Sensitivity(layout, scores, statistic, samples, seed, curves=curves, grid=grid)


def rank_tensors(
    model: nn.Module,
    batches: Iterable[Batch],
    sampled_loss: Loss | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Mean |w * g| of every trimmable weight matrix: the ranking of whole parameter tensors, most sensitive first.

    The mean is over elements and micro-batches, g the gradient of a micro-batch's mean loss: |w * g| is what the loss
    changes by, to first order, if the weight goes on its own, and large tensors do not win by size. Arguments as for
    `analyze`; labels are sampled where `sampled_loss` is given."""
    layout, state = describe(model), dict(base_of(model).named_parameters())
    names = {m.parameter for site in layout.sites for m in site.members if state[m.parameter].dim() == 2}
    used = [name for name in sorted(names) if state[name].requires_grad and state[name].numel()]
    weights, out = [state[name] for name in used], None
    generator, samples, passes = torch.Generator().manual_seed(seed), 0, 0
    with evaluating(model, autocast) as device:
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            value = (sampled_loss or given_loss)(model(**batch), batch, generator)
            require_finite(value, samples)
            grads = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
            out = block_sensitivity([w.detach() for w in weights], grads, Grid.tensor(), "abs", out=out)
            samples, passes = samples + _size(batch), passes + 1
    if out is None:
        raise SensibertError("rank_tensors: no batches came, want at least one micro-batch")
    means = {name: float(o) / w.numel() / passes for name, w, o in zip(used, weights, out, strict=True)}
    return dict(sorted(means.items(), key=lambda item: (-item[1], item[0])))
