"""Shares of the layers by trial: coefficients on the scores of every site, kept when the true loss after the cut falls.

A random local search, (1 + 1) as evolutionary searches over layers go (EvoPress, arXiv 2410.14649), over few numbers:
the order inside a site stays that of its scores. Pure: what a plan is worth is for the caller to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..core.artifacts import Plan, Sensitivity

SITES_A_TRIAL = 2
SPREAD = 1.0  # standard deviation of the change of log2 of a coefficient


def search_shares(
    sensitivity: Sensitivity,
    allocate: Callable[[Sensitivity], Plan],
    loss_of: Callable[[Plan], float],
    trials: int,
    seed: int = 0,
) -> Plan:
    """The plan with the lowest loss among that of the scores as they are and `trials` others.

    Each trial scales the scores of two sites of the best plan so far by a random factor; a plan that was seen before,
    or a loss that is not finite, counts as a trial that failed."""
    generator = torch.Generator().manual_seed(seed)
    names = [site.name for site in sensitivity.layout.sites]
    best, plan = torch.zeros(len(names), dtype=torch.float64), allocate(sensitivity)
    lowest, seen = loss_of(plan), {_kept(plan)}
    for _ in range(trials):
        trial = best.clone()
        places = torch.randperm(len(names), generator=generator)[:SITES_A_TRIAL]
        trial[places] += SPREAD * torch.randn(len(places), generator=generator, dtype=torch.float64)
        factors = dict(zip(names, (2.0**trial).tolist(), strict=True))
        scores = {name: score * factors[name] for name, score in sensitivity.scores.items()}
        other = allocate(replace(sensitivity, scores=scores))
        if _kept(other) in seen:
            continue
        seen.add(_kept(other))
        loss = loss_of(other)
        if loss < lowest:
            best, plan, lowest = trial, other, loss
    return plan


def _kept(plan: Plan) -> tuple[int, ...]:
    """The order inside a site never changes, so the counts tell two plans apart."""
    return tuple(int(keep.sum()) for keep in plan.keep.values())
