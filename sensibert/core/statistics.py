"""The statistics a unit or block can be scored by: one row each. What computes them is in sensibert/sensitivity."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Statistic:
    """How a score is computed: from which labels, which members of a unit, and by which reduction of w and g."""

    reduce: str
    finish: str = "none"
    data: bool = True
    sampled: bool = False  # labels are drawn from the model's own prediction
    all_members: bool = False  # otherwise only the consuming weight
    units_only: bool = False  # has no meaning for single blocks of a weight
    compensates: bool = False  # chosen in view of what the kept units can compensate


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
