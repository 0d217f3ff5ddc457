"""Model, plan and factors -> the same model, whose kept units compensate for the dropped ones.

An optional step before `trim`: it solves each consuming weight anew by least squares (see `sensitivity.kfac_obs`).
Tokens are weighted by the loss; otherwise those without influence on it would dominate the solution.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..core.artifacts import UnitPlan
from ..core.errors import SensibertError
from ..sensitivity.kfac_obs import DAMP_WEIGHTS, FisherFactors, compensate_weights, consumer


def compensate(
    model: nn.Module, plan: UnitPlan, factors: Mapping[str, FisherFactors], damp: float = DAMP_WEIGHTS
) -> None:
    """Solve the consuming weights of the sites to cut, in place; dropped columns stay, for `trim` to remove.

    factors: `kfac_obs.collect_factors` of the same model. SensibertError if they are not finite."""
    for site in plan.layout.sites:
        found = factors[site.consumer.parameter]
        if plan.keep[site.name].all():
            continue
        if not found.second.isfinite().all():
            raise SensibertError(f"compensate: the factors of {site.name} are not finite, want finite activations")
        if not found.weight > 0:  # the loss does not depend on this output
            continue
        kept = site.consumer.index(plan.kept(site.name).to(found.first.device), site.units)
        compensate_weights(consumer(model, site.consumer.parameter), found, kept, damp)
