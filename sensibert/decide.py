"""One decision: factors -> scores -> plan, for one cut of a model in training, or of one that is not trained at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .allocation import allocate
from .core import cost
from .core.arguments import checked
from .core.artifacts import Plan, Sensitivity, UnitPlan
from .core.budget import Budget
from .core.config import TrimConfig, parse_shape
from .core.errors import SensibertError
from .core.statistics import STATISTICS
from .deploy.costs import Target, measure_costs, settle
from .models import base_of, layout_of
from .models.modules import copy_of
from .models.unfinished import note_budget
from .models.wrapped import has_classes, inner_model, is_wrapped
from .sensitivity import analyze, collect_factors, sampled_loss
from .sensitivity.gradients import Batch, Loss
from .sensitivity.kfac_obs import FisherFactors
from .trimming import compensate, trim

Batches = Callable[[int, int], Iterator[dict]]  # (samples, rows a batch) -> batches of the training data
Choose = Callable[[nn.Module, Iterator[dict], Budget], Plan]
Allocated = Callable[[Budget], Plan]  # of heads and neurons
Tried = Callable[[Plan], nn.Module]  # a copy of the model that is trimmed by the plan


class Analysis(NamedTuple):
    """What a model and its data tell about every unit, whatever the budget."""

    sensitivity: Sensitivity | None  # None where `choose` makes the plan
    factors: Mapping[str, FisherFactors] | None  # None where nothing needs them


class Decision(NamedTuple):
    plan: Plan
    analysis: Analysis


def with_costs(budget: Budget, model: nn.Module, config: TrimConfig) -> Budget:
    """A budget of latency or size with a table of the model's costs: the one it has, or one that is measured now. Other
    budgets are unchanged."""
    if not budget.measured or not config.trims:
        return budget
    if budget.table is None:
        shape = parse_shape(config.latency_shape)
        target = Target(budget.kind, config.runtime, *shape, config.latency_threads, config.weights or "fp32")
        budget = budget.with_table(measure_costs(_whole(model), target))
    assert budget.table is not None
    budget.table.want_fit(layout_of(model))
    return budget


def _whole(model: nn.Module) -> PreTrainedModel:
    """The transformers model with its head, or the encoder of an embedding model."""
    whole = model if isinstance(model, PreTrainedModel) else base_of(model)
    assert isinstance(whole, PreTrainedModel)  # as every base model in transformers
    return whole


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
    analysis: Analysis | None = None,
    fitted: Callable[[Allocated, Tried], Budget] | None = None,
) -> Decision:
    """Analyze the model, unless its analysis is given, and allocate the budget. With `compensate`, adjust the kept
    weights in place.

    config: resolved. budget: of this cut; a cubic schedule has several. samples: rows that the analysis reads.
    batch_size: rows a batch, where the size does not change the result (factors).
    choose: (model, micro-batches, budget) -> Plan, in place of analyze and allocate. fitted: the budget in place of the
    given one, chosen by what plans can be made and what they do to the model.

    Costs measured on this device are measured again for the plan: where they are not what the table says, it is
    corrected, and the plan chosen again. The plan's budget has the corrected table."""
    assert config.method is not None  # of a resolved config
    few = batches(samples, config.micro_batch)
    if analysis is None:
        rule, factors, sensitivity = None if choose is not None else STATISTICS[config.method], None, None
        if config.compensate or (rule is not None and rule.reduce == "factors"):
            drawn = None if config.method == "layer-obs" else loss
            factors = collect_factors(model, layout_of(model), batches(samples, batch_size), drawn, seed, autocast)
        if choose is None:
            sensitivity = analyze(model, few, config.method, loss, seed, autocast, config.parsed_grid(), factors)
        analysis = Analysis(sensitivity, factors)
    if choose is not None:
        plan = choose(model, few, budget)
    else:
        scores, known = analysis
        assert scores is not None  # without `choose`

        def allocated(budget: Budget) -> Plan:
            return allocate(scores, budget, config.width_multiple, config.allocation)

        def tried(plan: Plan) -> nn.Module:
            made = copy_of(model)
            if config.compensate:
                assert isinstance(plan, UnitPlan) and known is not None
                compensate(made, plan, known)
            return trim(made, plan)

        budget = budget if fitted is None else fitted(allocated, tried)
        plan = allocated(budget)
        if budget.table is not None and (target := Target.of(budget.table)) is not None:
            plan = settle(_whole(model), plan, allocated, target)
    if config.compensate:
        if not isinstance(plan, UnitPlan):
            raise SensibertError("choose: returned a plan of blocks, and compensate is True; want compensate=False")
        assert analysis.factors is not None  # of an analysis for `compensate`
        compensate(model, plan, analysis.factors)
    return Decision(plan, analysis)


@checked
def trim_model(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrimConfig | str = "50%params",
    loss: Loss = sampled_loss,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> nn.Module:
    """Trim a model to a budget without training it: analyze, allocate, compensate, trim. In place; returns the model.

    model: of transformers, or a SentenceTransformer, SparseEncoder or CrossEncoder. batches: dicts of tensors, inputs
    of the (inner) model, no labels needed by the default method; some hundred rows are enough. For `fisher` 1 to 8 rows
    each. config: a `TrimConfig`, whose schedule and samples are not used, or a budget as text; its method is by default
    `obs`, and `layer-obs` for a model without a head of classes. loss, seed, autocast: see `analyze`. SensibertError
    for a budget that the model cannot meet, or what `analyze` refuses; the model is then unchanged."""
    config = config if isinstance(config, TrimConfig) else TrimConfig(config)
    inner = inner_model(model)
    headless = base_of(inner) is inner or not has_classes(model)
    config = config.resolved(labels=not headless or loss is not sampled_loss)
    if not config.trims:
        raise SensibertError(f"trim_model: method is {config.method!r}, which trims nothing, want another")
    rows = [dict(batch) if isinstance(batch, Mapping) else batch for batch in batches]
    for batch in rows if is_wrapped(model) else ():  # whose features hold more than tensors
        for name in [name for name, value in batch.items() if not isinstance(value, Tensor)]:
            del batch[name]
    cut_once(inner, config, lambda *_: iter(rows), 0, 0, seed, loss, autocast)  # as many rows as there are
    return model


def cut_once(
    model: nn.Module,
    config: TrimConfig,
    batches: Batches,
    samples: int,
    batch_size: int,
    seed: int,
    loss: Loss = sampled_loss,
    autocast: torch.dtype | None = None,
) -> Plan:
    """Decide and trim, in place, to the whole budget. Arguments as for `decide`."""
    layout, grid = layout_of(model), config.parsed_grid()
    budget = with_costs(config.parsed_budget(), model, config)
    cost.want_reach(layout, budget, grid)
    plan = decide(model, config, budget, batches, samples, batch_size, seed, loss, autocast).plan
    trim(model, plan)
    budget = budget.with_table(plan.budget.table)
    note_budget(model, budget, cost.limit(layout, budget, grid))
    return plan
