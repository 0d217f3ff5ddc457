"""Model, plan and factors -> the same model, with kept weights that compensate for the dropped units.

An optional step before `trim`. It computes the kept columns of each consuming weight by least squares (see
`sensitivity.kfac_obs`). Tokens are weighted by their influence on the loss; others would dominate the solution.
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
    """Adjust the consuming weights of the sites to cut, in place. `trim` removes the dropped columns later.

    factors: `kfac_obs.collect_factors` of the same model. SensibertError if they are not finite."""
    for site in plan.layout.sites:
        of_site = factors[site.consumer.parameter]
        if plan.keep[site.name].all():
            continue
        if not of_site.second.isfinite().all():
            raise SensibertError(f"compensate: the factors of {site.name} are not finite, want finite activations")
        if not of_site.weight > 0:  # the loss does not depend on this output
            continue
        kept = site.consumer.index(plan.kept(site.name).to(of_site.first.device), site.units)
        compensate_weights(consumer(model, site.consumer.parameter), of_site, kept, damp)
