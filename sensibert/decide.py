"""One decision: factors -> scores -> plan, for one cut of a model in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from .allocation import allocate
from .core.artifacts import Plan, Sensitivity, UnitPlan
from .core.budget import Budget
from .core.config import TrimConfig
from .core.errors import SensibertError
from .core.statistics import STATISTICS
from .models import layout_of
from .sensitivity import analyze, collect_factors
from .sensitivity.gradients import Loss
from .trimming import compensate

Batches = Callable[[int, int], Iterator[dict]]  # (samples, rows a batch) -> batches of the training data
Choose = Callable[[nn.Module, Iterator[dict], Budget], Plan]


class Decision(NamedTuple):
    plan: Plan
    sensitivity: Sensitivity | None  # None where `choose` made the plan


def decide(
    model: nn.Module,
    config: TrimConfig,
    budget: Budget,
    batches: Batches,
    samples: int,
    batch_size: int,
    seed: int,
    loss: Loss,
    autocast: torch.dtype | None = None,
    choose: Choose | None = None,
) -> Decision:
    """Analyze the model and allocate the budget. With `compensate`, adjust the kept weights in place.

    config: resolved. budget: of this cut; a cubic schedule has several. samples: rows that the analysis reads.
    batch_size: rows a batch, where the size does not change the result (factors).
    choose: (model, micro-batches, budget) -> Plan, in place of analyze and allocate."""
    assert config.method is not None  # of a resolved config
    rule = None if choose is not None else STATISTICS[config.method]
    factors = None
    if config.compensate or (rule is not None and rule.reduce == "factors"):
        drawn = None if config.method == "layer-obs" else loss
        factors = collect_factors(model, layout_of(model), batches(samples, batch_size), drawn, seed, autocast)
    few = batches(samples, config.micro_batch)
    if choose is not None:
        plan, sensitivity = choose(model, few, budget), None
    else:
        sensitivity = analyze(model, few, config.method, loss, seed, autocast, config.parsed_grid(), factors)
        plan = allocate(sensitivity, budget, config.width_multiple, config.allocation)
    if config.compensate:
        if not isinstance(plan, UnitPlan):
            raise SensibertError("choose: returned a plan of blocks, and compensate is True; want compensate=False")
        assert factors is not None  # collected above
        compensate(model, plan, factors)
    return Decision(plan, sensitivity)
