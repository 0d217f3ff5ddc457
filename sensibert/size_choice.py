"""A budget of size is met by bits, vocabulary, heads and neurons together: at the cut, every form that the weights file
can have is made and its loss measured on held-out rows, and the form that loses least is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .core.artifacts import Plan
from .core.budget import Budget
from .core.cost import counts_of, encoder_left, spent
from .core.cost_table import CostTable
from .core.errors import SensibertError
from .core.rows import Rows
from .data.batching import micro_batches
from .deploy.costs import size_in_form
from .models import eval_mode, layout_of
from .models.modules import copy_of
from .models.weight_bits import round_weights
from .sensitivity.gradients import batch_size, model_loss, passes
from .trimming.vocabulary import Smaller, keep_pieces

ROWS = 512  # held out, at most
TOGETHER = 32  # rows of a batch


class Form(NamedTuple):
    """What a file can be beside its heads and neurons. weights: their precision. fewer: whether the embeddings keep the
    pieces of the training texts alone."""

    weights: str
    fewer: bool


class HeldOut(NamedTuple):
    """Rows with labels, and their collator. of: `validation` or `training`. whole, fewer: encoded with all pieces of
    the vocabulary, and with those of the training texts, if there is such a form."""

    of: str
    whole: tuple[Rows, Callable[[list], dict]]
    fewer: tuple[Rows, Callable[[list], dict]] | None = None


@dataclass
class SizeChoice:
    """Chooses a form at the cut. weights: the precisions to choose from, that of the measured costs first. smaller: the
    vocabulary to choose, if any. rows: to measure losses on, set before the training begins."""

    weights: Sequence[str]
    smaller: Smaller | None = None
    rows: HeldOut | None = None
    seed: int = 0
    forms: list[Form] = field(init=False)

    def __post_init__(self) -> None:
        self.forms = [Form(bits, fewer) for fewer in (False, True)[: 1 + bool(self.smaller)] for bits in self.weights]

    def _table(self, table: CostTable, model: nn.Module, form: Form) -> CostTable:
        """table: of the first precision, with the whole vocabulary."""
        pieces = len(self.smaller.kept) if form.fewer and self.smaller is not None else None
        return size_in_form(table, model, form.weights, pieces)

    def smallest(self, budget: Budget, model: nn.Module) -> Budget:
        """The budget with the costs of the smallest form: what it can reach."""
        assert budget.table is not None  # of a budget of size
        tables = [self._table(budget.table, model, form) for form in self.forms]
        layout = layout_of(model)
        return budget.with_table(min(tables, key=lambda table: _bytes(layout, budget.with_table(table))))

    def choose(
        self, model: nn.Module, budget: Budget, allocated: Callable[[Budget], Plan], tried: Callable[[Plan], nn.Module]
    ) -> tuple[CostTable, dict[str, Any]]:
        """(costs of the chosen form, what was measured).

        budget: of the whole run, with the costs of the first form. allocated: -> the plan of heads and neurons. tried:
        -> a copy of the model that is trimmed by a plan. SensibertError if no form meets the budget."""
        assert budget.table is not None and self.rows is not None
        layout, found, refused = layout_of(model), [], None
        untouched = self._loss(model, Form("fp32", False))
        tables = [self._table(budget.table, model, form) for form in self.forms]
        most = _bytes(layout, budget)
        for form, table in zip(self.forms, tables, strict=True):
            facts: dict[str, Any] = {"weights": form.weights, "vocabulary": table.vocabulary or None}
            facts["mb_saved"] = (most - _bytes(layout, budget.with_table(table))) / 1e6
            if form in self._single():
                facts["loss_alone"] = self._rise(copy_of(model), form, untouched)
            facts["heads_and_neurons"] = facts["loss"] = None
            try:
                plan = allocated(budget.with_table(table))
            except SensibertError as error:
                refused = error
            else:
                facts["heads_and_neurons"] = encoder_left(layout, budget.with_table(table))
                facts["loss"] = self._rise(tried(plan), form, untouched)
            found.append(facts)
        losses = [math.inf if facts["loss"] is None else facts["loss"] for facts in found]
        best = min(range(len(found)), key=losses.__getitem__)
        if losses[best] == math.inf:
            raise refused or SensibertError("budget: no form of the weights file has a finite loss at the cut")
        for facts in found:
            facts["chosen"] = facts is found[best]
        rows = {"rows": self._number(self.rows.whole[0]), "of": self.rows.of, "loss_before": untouched}
        return tables[best], {**rows, "forms": found}

    def _single(self) -> list[Form]:
        """The forms that differ from the first one in one thing."""
        first = self.forms[0]
        return [form for form in self.forms if (form.weights != first.weights) + (form.fewer != first.fewer) == 1]

    def _rise(self, model: nn.Module, form: Form, untouched: float) -> float | None:
        """By what the loss of a model is higher once it is brought into a form, in place; None if its weights do not
        fit, or the loss is not finite."""
        if form.fewer and self.smaller is not None:
            keep_pieces(cast(PreTrainedModel, model), self.smaller)
        if form.weights != "fp32":
            try:
                round_weights(model, form.weights)
            except SensibertError:
                return None
        rise = self._loss(model, form) - untouched
        return rise if math.isfinite(rise) else None

    def _loss(self, model: nn.Module, form: Form) -> float:
        """Mean over the held-out rows, in fp32."""
        assert self.rows is not None
        rows, collator = self.rows.fewer if form.fewer and self.rows.fewer is not None else self.rows.whole
        total, number = 0.0, 0
        with eval_mode(model) as device, torch.no_grad():
            batches = micro_batches(rows, collator, self._number(rows), TOGETHER, self.seed)
            for batch, outputs in passes(model, batches, device):
                loss = model_loss(outputs, batch)
                assert loss is not None  # the rows have labels
                total, number = total + float(loss) * batch_size(batch), number + batch_size(batch)
        return total / number

    def _number(self, rows: Rows) -> int:
        """Rows to measure on. All validation rows, which are chosen before they are encoded: a question has a row for
        each window, and not as many in another vocabulary."""
        assert self.rows is not None
        return len(rows) if self.rows.of == "validation" else min(ROWS, len(rows))


def _bytes(layout: Any, budget: Budget) -> int:
    """Of the file with all heads and neurons."""
    return spent(layout, counts_of(layout), budget)
