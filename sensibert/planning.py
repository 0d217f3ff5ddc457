"""The command plan, from file to file. It needs no model, and imports no transformers."""

from __future__ import annotations

from functools import partial

from .allocation.allocate import allocate
from .core import cost
from .core.artifacts import BlockPlan, Plan, Sensitivity
from .core.config import TrimConfig, grid_name
from .core.errors import SensibertError, naming
from .core.files import writing
from .core.output_paths import check_file


def plan_file(
    sensitivity: str, output: str | None, config: TrimConfig, overwrite: bool, dry_run: bool
) -> tuple[dict, Plan, Sensitivity]:
    """Plan for config's budget from a sensitivity file, and write it to output. Returns (facts for `--json`, the plan,
    the scores)."""
    if output is None and not dry_run:
        raise SensibertError("output is missing, want a file to write, or --dry-run")
    if output is not None:
        check_file(output, overwrite, sensitivity=sensitivity)
    with naming("sensitivity"):
        scores = Sensitivity.load(sensitivity)
    budget = config.parsed_budget()
    cost.want_reach(scores.layout, budget, scores.grid)
    plan = allocate(scores, budget, config.width_multiple, config.allocation)
    if output is not None and not dry_run:
        with writing(output):
            plan.save(output)
    return {**plan_result(plan), "output": None if dry_run else output}, plan, scores


def plan_result(plan: Plan) -> dict:
    """The facts of a plan, under the names of result.json."""
    budget, sizes = plan.budget, {}
    for when, cost_in in (("before", partial(cost.cost_of_units, plan.layout, None)), ("after", plan.cost)):
        for name, scope in (("encoder_params", "encoder"), ("total_params", "model")):
            sizes[f"{name}_{when}"] = cost_in(scope)[0]
        sizes[f"flops_{when}"] = cost_in(budget.scope, budget.length)[1]
    grid = plan.grid if isinstance(plan, BlockPlan) else None
    facts = {"method": plan.method, "budget": str(budget), "scope": budget.scope, "grid": grid_name(grid)}
    return {**facts, **sizes, "flops_length": budget.length}
