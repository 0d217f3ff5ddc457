"""The statistics that score units or blocks, one row each. sensibert/sensitivity computes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Statistic:
    """How a score is computed: the reduction of w and g, the labels, and the members of a unit."""

    reduce: str
    finish: str = "none"
    data: bool = True
    sampled: bool = False  # labels are drawn from the model's own prediction
    all_members: bool = False  # sums over all members of the unit, not only the consuming weight
    units_only: bool = False  # has no meaning for single blocks of a weight
    compensates: bool = False  # the score assumes that kept units compensate for removed ones


STATISTICS: dict[str, Statistic] = {
    "obs": Statistic("factors", sampled=True, units_only=True, compensates=True),
    "layer-obs": Statistic("factors", units_only=True, compensates=True),
    "fisher": Statistic("signed", "square", sampled=True),
    "taylor": Statistic("signed", "abs"),
    "saliency": Statistic("abs", all_members=True),
    "magnitude": Statistic("weight_square", data=False, all_members=True),
    "random": Statistic("random", data=False),
    "soft_gates": Statistic("gates", units_only=True),
}
FORMER_METHODS = {"paper": "soft_gates", "dense": "baseline"}
