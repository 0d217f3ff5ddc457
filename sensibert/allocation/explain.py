"""Why a plan kept what it kept, in words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.arguments import checked
from ..core.artifacts import BlockPlan, Plan, Sensitivity
from ..core.cost import counts_of, element_cost, spent
from ..core.errors import SensibertError
from ..core.layout import Site
from ..core.text import share
from .allocate import RANKED_BY_SCORE, limit, ranks_of, threshold_counts

KINDS = {"params": "parameters", "flops": "FLOPs"}
WORDS = {"head": ("attention", "head", "heads"), "ffn": ("FFN", "neuron", "neurons")}


@checked
def explain(plan: Plan, sensitivity: Sensitivity) -> str:
    """Say of every layer what the plan kept, which scores decided it, and what rounding changed.

    sensitivity: the one that the plan was made from; that of a run is of the model as it was at the cut. SensibertError
    for one of a model with other sizes, or of another grid."""
    grid = plan.grid if isinstance(plan, BlockPlan) else None
    if sensitivity.layout.sites != plan.layout.sites or sensitivity.grid != grid:
        raise SensibertError("explain: sensitivity is of another model or grid than the plan, want that of the plan")
    before = spent(plan.layout, {site.name: site.units for site in plan.layout.sites}, plan.budget)
    after, named = _cost(plan), f"{plan.budget} of the {plan.budget.scope}"
    if plan.budget.measured:
        title = f"{named}: {plan.budget.amount(after)} of {plan.budget.amount(before)} ({share(after, before)})."
    else:
        title = f"{named}: {after:,} of {before:,} {KINDS[plan.budget.kind]} are left ({share(after, before)})."
    lines = _of_blocks(plan, sensitivity) if isinstance(plan, BlockPlan) else _of_units(plan, sensitivity)
    return "\n".join([title, *lines])


def _cost(plan: Plan) -> int:
    """Of what is kept, in the unit of the budget."""
    if plan.budget.measured:
        return spent(plan.layout, counts_of(plan.layout, plan.keep), plan.budget)
    return plan.params if plan.budget.kind == "params" else plan.flops


def _of_units(plan: Plan, sensitivity: Sensitivity) -> list[str]:
    layout, budget = plan.layout, plan.budget
    ranks = ranks_of(sensitivity, budget)
    lines = [f"Scores are those of {sensitivity.statistic}, {_per(sensitivity, plan)}."]
    counts = counts_of(layout, plan.keep)
    if budget.measured:
        lines.append("Costs are measured, and the plan has the largest sum of scores that fits.")
    else:
        smallest = {site.name: site.minimum for site in layout.sites}
        counts = threshold_counts(layout, ranks, budget, limit(layout, budget) - spent(layout, smallest, budget))
        taken = [ranks[s.name].sort(descending=True)[0][s.minimum : counts[s.name]] for s in layout.sites]
        if len(scores := torch.cat(taken)):
            lines.append(f"The threshold that spends this budget, before rounding, is {float(scores.min()):.3e}.")
    multiple = _width_multiple(plan)
    for site in layout.sites:
        keep, part = plan.keep[site.name].cpu(), WORDS[site.kind][0]
        words = [f"layer {site.layer}, {part}: {_kept(site, int(keep.sum()))}", _range(ranks[site.name], keep)]
        words += [_rounding(site, int(keep.sum()), counts[site.name], multiple)]
        gone = site.units - int(keep.sum())
        if gone and site.name in sensitivity.curves:
            rise = sensitivity.predicted_rise(site.name, gone)
            words.append(f"Alone, this is predicted to change the loss by {rise:+.1e}.")
        lines.append(" ".join(filter(None, words)))
    return lines


def _of_blocks(plan: BlockPlan, sensitivity: Sensitivity) -> list[str]:
    lines = [
        f"Scores are those of {sensitivity.statistic} for blocks of the grid {plan.grid}, {_per(sensitivity, plan)}."
    ]
    for weight in plan.layout.weights:
        keep = plan.keep[weight.parameter].cpu().flatten()
        rows, cols = plan.grid.block_size(weight.rows, weight.cols)
        price = 1 if sensitivity.statistic in RANKED_BY_SCORE else element_cost(weight, plan.budget) * rows * cols
        ranks = sensitivity.scores[weight.parameter].cpu().double().flatten() / max(1, price)
        kept = f"{int(keep.sum()):,} of {len(keep):,} blocks kept."
        lines.append(f"{weight.parameter}: {kept} {_range(ranks, keep)}".rstrip())
    return lines


def _per(sensitivity: Sensitivity, plan: Plan) -> str:
    if sensitivity.statistic in RANKED_BY_SCORE:
        return "whatever they cost"
    return f"divided by their {'mean cost' if plan.budget.measured else KINDS[plan.budget.kind]}"


def _kept(site: Site, count: int) -> str:
    _, one, many = WORDS[site.kind]
    units = one if site.units == 1 else many
    if count == site.units:
        return f"all {count:,} {units} kept."
    return f"{count:,} of {site.units:,} {units} kept." if count else f"none of {site.units:,} {units} kept."


def _range(ranks: Tensor, keep: Tensor) -> str:
    parts = []
    if keep.any():
        parts.append(f"lowest score kept {float(ranks[keep].min()):.3e}")
    if not keep.all():
        parts.append(f"highest dropped {float(ranks[~keep].max()):.3e}")
    return f"{', '.join(parts).capitalize()}." if parts else ""


def _rounding(site: Site, kept: int, counted: int, multiple: int) -> str:
    """What made the count differ from that of the threshold."""
    if kept == counted:
        return ""
    words = f"One threshold alone would keep {counted:,}"
    if kept > counted:
        return f"{words}; the budget left over paid for {kept - counted:,} more."
    return f"{words}, rounded down to a multiple of {multiple}." if site.kind == "ffn" and multiple > 1 else f"{words}."


def _width_multiple(plan: Plan) -> int:
    """The largest number that all cut FFN widths are multiples of; 1 if none is cut."""
    cut = [int(plan.keep[s.name].sum()) for s in plan.layout.sites if s.kind == "ffn"]
    whole = {s.units for s in plan.layout.sites if s.kind == "ffn"}
    return math.gcd(*(width for width in cut if width not in whole)) or 1
