"""The budget of a run: what the model has cost before any cut, what the budget allows, and what is left."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import nn

from .core import cost
from .core.artifacts import Plan
from .core.budget import Budget
from .core.config import TrimConfig
from .core.errors import SensibertError
from .core.layout import Layout
from .core.schedule import Schedule
from .models.unfinished import reached
from .models.untrimmed import Untrimmed
from .models.wrapped import inner_model
from .size_choice import SizeChoice
from .training.run_memory import RunMemory


class BudgetOfRun:
    """The part of a TrimCallback that computes with its budget."""

    config: TrimConfig
    memory: RunMemory
    size_choice: SizeChoice | None
    _model: nn.Module | None  # that memory belongs to
    _seen: WeakKeyDictionary[nn.Module, Untrimmed]

    @property
    def schedule(self) -> Schedule:
        return self.config.schedule

    @property
    def budget(self) -> Budget:
        """With the table of its costs, where those are measured, once there is a model."""
        budget, table = self.config.parsed_budget(), self.memory.table
        return budget.with_table(table) if table is not None and table.kind == budget.kind else budget

    @property
    def layout(self) -> Layout | None:
        """Of the untrimmed model; None until there is one."""
        return None if self._model is None else self._seen[self._model].layout

    def _smallest(self, budget: Budget, model: nn.Module) -> Budget:
        """With the costs of the smallest form that the file can have."""
        return budget if self.size_choice is None else self.size_choice.smallest(budget, model)

    def left(self) -> float:
        """Fraction of the encoder's cost that remains under the budget; 1 without trimming."""
        return cost.encoder_left(self._untrimmed().layout, self.budget) if self.config.trims else 1.0

    def _target(self, progress: float) -> Budget:
        """The budget at this point of the schedule, as an absolute number: the model may have been trimmed before."""
        budget, layout = self.budget, self._untrimmed().layout
        value = budget.value * (self._cost_before() if budget.relative else 1)
        if progress < 1:  # of heads and neurons in the form of the file: 16 bits may be half of the way already
            before = cost.spent(layout, cost.counts_of(layout), budget)
            value = before * self.schedule.ratio(progress, min(1.0, value / before))
        return replace(budget, relative=False, value=float(int(value)))

    def whole_plan(self, model: nn.Module) -> Plan:
        """All cuts so far as one plan of the untrimmed model."""
        assert self.config.method is not None  # of a resolved config
        return self._untrimmed().whole_plan(inner_model(model), self.budget, self.config.method)

    def excess(self, model: nn.Module) -> str | None:
        """What the model has and what the budget allows, if that is less; None if the budget is met."""
        if not self.config.trims or (actual := reached(inner_model(model), self.budget)) <= (
            allowed := self._allowed()
        ):
            return None
        budget = self.budget
        before, most = (
            budget.amount(cost) if budget.measured else f"{cost:,}" for cost in (self._cost_before(), allowed)
        )
        return f"{budget.amount(actual)} of {before}, want at most {most} ({budget})"

    def _cost_before(self) -> int:
        """The budget's cost of the untrimmed model."""
        return cost.whole(self._untrimmed().layout, self.budget)

    def _allowed(self) -> int:
        """The budget as an absolute number."""
        budget = self.budget
        if self._model is not None and self.memory.size is None:
            budget = self._smallest(budget, self._model)
        return cost.limit(self._untrimmed().layout, budget, self.config.parsed_grid())

    def _untrimmed(self) -> Untrimmed:
        if self._model is None:
            raise SensibertError("TrimCallback: it has seen no model yet, want it among the callbacks of a Trainer")
        return self._seen[self._model]
