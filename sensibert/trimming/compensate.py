"""Model, plan and factors -> the same model, whose kept units have taken over what the dropped ones gave.

An optional step before `trim`: the least-squares solution of every consuming weight (see `sensibert.surgeon`). Its
tokens are weighted by the loss: without that, those that the loss never looks at rule the solution.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..core.artifacts import Plan
from ..core.errors import SensibertError
from ..sensitivity.kfac_obs import DAMP_WEIGHTS, FisherFactors, compensate_weights, consumer


def compensate(model: nn.Module, plan: Plan, factors: Mapping[str, FisherFactors], damp: float = DAMP_WEIGHTS) -> None:
    """Solve the consuming weights of the cut sites anew, in place; dropped columns stay for `trim` to remove.

    factors: `surgeon.collect_factors` of the same model. SensibertError if they are not finite."""
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
