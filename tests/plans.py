"""Random plans, and batches for the task head of any model."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sensibert.core.artifacts import Plan, UnitPlan
from sensibert.core.budget import Budget
from sensibert.core.layout import Layout
from tests.helpers import tiny_batch


def random_plan(layout: Layout, seed: int = 0, empty: Iterable[str] = (), share: float = 0.5) -> Plan:
    """Every unit stays with probability `share`; sites in `empty` keep the minimum of their family."""
    generator, keep = torch.Generator().manual_seed(seed), {}
    for site in layout.sites:
        kept = torch.rand(site.units, generator=generator) < share
        if site.name in empty:
            kept[:] = False
        for unit in torch.randperm(site.units, generator=generator):
            if int(kept.sum()) < site.minimum:
                kept[unit] = True
        keep[site.name] = kept
    return UnitPlan(layout, keep, Budget(1.0, "params", True), "random")


def batch_for(model: nn.Module, choices: int = 2, **sizes) -> dict[str, Tensor]:
    """tiny_batch, with an axis of choices where the task head reads one."""
    batch = tiny_batch(**sizes)
    if type(model).__name__.endswith("MultipleChoice"):
        batch = {name: value[:, None].repeat(1, choices, 1) for name, value in batch.items()}
    return batch


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """All outputs of a forward pass as one vector."""
    return torch.cat([value.flatten() for value in model(**batch).values() if isinstance(value, Tensor)])
