"""A result, a sensitivity and plans of the tiny model: what reports are made of."""

import torch

from sensibert.core.artifacts import BlockPlan, Sensitivity, UnitPlan
from sensibert.core.budget import Budget
from sensibert.core.grid import Grid
from sensibert.core.layout import Layout
from sensibert.report.history import Moment

RESULT = {
    "task": "text-classification",
    "budget": "50%params",
    "scope": "encoder",
    "flops_length": 128,
    "method": "fisher",
    "encoder_params_before": 1_000_000,
    "encoder_params_after": 500_000,
    "total_params_before": 3_000_000,
    "total_params_after": 2_500_000,
    "flops_before": 4e9,
    "flops_after": 1e9,
    "metrics": {"accuracy": 0.9, "f1": 0.8},
    "metrics_at_cut": {"accuracy": 0.95},
}

# Of a run of six steps that was cut after the third.
MOMENTS = [
    Moment(2, "log", 0.9, 1e-4, 1_000_000),
    Moment(3, "cut", encoder_params=500_000, score=0.95),
    Moment(4, "log", 0.7, 1e-4, 500_000),
    Moment(6, "log", 0.5, 0.0, 500_000),
    Moment(6, "end", encoder_params=500_000, score=0.9),
]


def unit_plan(layout: Layout) -> UnitPlan:
    """Half of everything, and no attention in layer 1."""
    keep = {site.name: torch.arange(site.units) % 2 == 0 for site in layout.sites}
    keep["layer.1.head"][:] = False
    return UnitPlan(layout, keep, Budget.parse("50%params"), "fisher")


def block_plan(layout: Layout) -> BlockPlan:
    grid = Grid.block(8, 8)
    keep = {w.parameter: torch.zeros(grid.shape(w.rows, w.cols), dtype=torch.bool) for w in layout.weights}
    for kept in keep.values():
        kept[::2] = True
    return BlockPlan(layout, keep, Budget.parse("50%params"), "fisher", grid=grid)


def ranked(layout: Layout) -> Sensitivity:
    names = sorted({m.parameter for site in layout.sites for m in site.members if m.parameter.endswith("weight")})
    scores = {site.name: torch.ones(site.units) for site in layout.sites}
    tensors = {name: 1.0 / (rank + 1) for rank, name in enumerate(names)}
    return Sensitivity(layout, scores, "fisher", 64, tensors=tensors)
