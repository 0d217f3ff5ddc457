"""Rivals: each chooses which units are kept; everything else is the same as for ours.

A rival is called once, with the untrimmed model at the cut, the micro-batches of our analysis and the same budget. It
returns a plan. Trimming, recovery, steps and learning rates are those of `recipe`.

uniform          our statistic, the same share of every site (`--allocation uniform`)
layers           keeps the lowest layers and drops the upper ones (Sajjad et al., arXiv 2004.03844)
spread layers    keeps layers at equal distances, as the examples of sentence-transformers do
torch-pruning    Torch-Pruning (Fang et al., arXiv 2301.12900): its dependency graph, its group importance with its own
                 normalisation, its global ranking of heads and of FFN channels at one pruning ratio for both; the
                 ratio is searched so that the result is at or just below the budget. Taylor importance from gradients
                 of the given labels, summed over all samples, as its examples do it.
torch-pruning-magnitude   the same with its group L2 norm, as its BERT example does it

Widths are rounded, and the freed budget is spent, as for ours; kept units do not compensate. Torch-Pruning never
removes a complete sub-layer: one that would lose its last unit keeps all units.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sensibert.allocation.allocate import default_width_multiple
from sensibert.core.artifacts import Plan, UnitPlan
from sensibert.core.budget import Budget
from sensibert.core.cost import counts_of, limit, spent, unit_cost
from sensibert.core.errors import SensibertError
from sensibert.core.layout import Layout, Member, Site
from sensibert.models import base_of, family_of, layers, layout_of
from sensibert.models.modules import attribute
from sensibert.models.reloadable import stock_class, stock_config
from sensibert.saving.folder import load

Batches = Iterable[Mapping[str, Tensor]]
COARSE, FINE = 16, 8  # ratios tried in order, then bisections of the last interval


class Layers:
    """Keeps the lowest layers, or some at equal distances: the largest number within the budget, or the nearest one
    where that is far below it.

    The others pass their input on unchanged until `finish` writes the shallow model: a plan alone would leave their
    layer norms in place."""

    def __init__(self, tolerance: float = 0.02, spread: bool = False):
        self.tolerance = tolerance  # how far below the budget is still "close", as a share of the dense model
        self.spread = spread
        self.model: nn.Module | None = None
        self.kept: list[int] = []

    def __call__(self, model: nn.Module, batches: Batches, budget: Budget) -> Plan:
        layout, stack = layout_of(model), layers(model)
        sizes = [self._spent(layout, number, len(stack), budget) for number in range(len(stack) + 1)]
        allowed = limit(layout, budget)
        fitting = max((n for n, size in enumerate(sizes) if size <= allowed), default=0)
        if allowed - sizes[fitting] > self.tolerance * sizes[-1] or not fitting:
            fitting = min(range(1, len(sizes)), key=lambda n: abs(sizes[n] - allowed))
        self.model, self.kept = model, list(range(fitting))
        if self.spread:
            self.kept = [place * len(stack) // fitting for place in range(fitting)]
        for number, (_, layer) in enumerate(stack):
            if number not in self.kept:
                layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
        keep = {s.name: torch.full((s.units,), s.layer in self.kept) for s in layout.sites}
        for site in layout.sites:
            keep[site.name][: site.minimum] = True
        return UnitPlan(layout, keep, budget, "layers")

    @staticmethod
    def _spent(layout: Layout, kept: int, depth: int, budget: Budget) -> int:
        """The cost with `kept` of `depth` layers; all layers of an encoder have the same cost."""
        whole = {site.name: site.units for site in layout.sites}
        dense, rest = spent(layout, whole, budget), 0
        if budget.scope == "model":
            rest = dense - spent(layout, whole, Budget(1.0, budget.kind, True, "encoder", budget.length))
        return rest + (dense - rest) * kept // depth

    def finish(self, folder: str | Path) -> int:
        """Write the model without the dropped layers in place of the folder's; returns its encoder parameters."""
        path = family_of(self.model).layers.removesuffix(".*")
        owner, _, name = path.rpartition(".")
        stack = attribute(base_of(self.model), path)
        setattr(attribute(base_of(self.model), owner), name, nn.ModuleList(stack[number] for number in self.kept))
        config = stock_config(self.model.config)
        config.num_hidden_layers = len(self.kept)
        shallow = stock_class(self.model)(config)  # its layers are whole, so it is a model of transformers again
        shallow.load_state_dict(self.model.state_dict())
        tokenizer = load(str(folder))[1]
        shutil.rmtree(folder)
        shallow.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return layout_of(shallow).encoder_params


class TorchPruning:
    """importance: `taylor` or `magnitude`. Needs torch-pruning (the extra `bench`)."""

    def __init__(self, importance: str = "taylor", step: int | None = None):
        self.importance, self.step = importance, step

    def __call__(self, model: nn.Module, batches: Batches, budget: Budget) -> Plan:
        import torch_pruning as tp

        layout = layout_of(model)
        taylor = self.importance == "taylor"
        scorer = tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance()
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            if taylor:
                _accumulate_gradients(model, batches)
            return self._search(tp, model, layout, scorer, budget)
        finally:
            model.zero_grad(set_to_none=True)
            for module in training:
                module.training = True

    def _search(self, tp, model: nn.Module, layout: Layout, scorer, budget: Budget) -> Plan:
        pruner = Simulated(tp, model, layout, scorer)
        allowed = limit(layout, budget)

        def fits(ratio: float) -> bool:
            return spent(layout, pruner.counts(ratio), budget) <= allowed

        # No bisection at first: a sub-layer that would vanish keeps all units, so more pruning may give a larger model.
        high = next((n / COARSE for n in range(1, COARSE + 1) if fits(n / COARSE)), None)
        if high is None:
            raise SensibertError(f"torch-pruning: no ratio meets {budget} (it never removes a whole sub-layer)")
        low = high - 1 / COARSE
        for _ in range(FINE):
            ratio = (low + high) / 2
            low, high = (low, ratio) if fits(ratio) else (ratio, high)
        counts, step = pruner.counts(high), self.step or default_width_multiple(layout.hidden)
        for site in layout.sites:
            if site.kind == "ffn" and counts[site.name] < site.units:
                counts[site.name] = max(site.minimum, counts[site.name] // step * step)
        order = {name: imp.argsort(descending=True, stable=True) for name, imp in pruner.importance.items()}
        while True:  # spend the budget that rounding freed on the best dropped units, as for ours
            room, options = allowed - spent(layout, counts, budget), []
            for site in layout.sites:
                count = counts[site.name]
                size = min(1 if site.kind == "head" else step - count % step, site.units - count)
                if size and size * unit_cost(site, budget) <= room:
                    best = order[site.name][count : count + size]
                    options.append((float(pruner.importance[site.name][best].mean()), site.name, size))
            if not options:
                break
            _, name, size = max(options)
            counts[name] += size
        keep = {site.name: torch.zeros(site.units, dtype=torch.bool) for site in layout.sites}
        for name, count in counts.items():
            keep[name][order[name][:count]] = True
        return UnitPlan(layout, keep, budget, f"torch-pruning-{self.importance}")


def _accumulate_gradients(model: nn.Module, batches: Batches) -> None:
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        for batch in batches:
            model(**{name: value.to(device) for name, value in batch.items()}).loss.backward()


class Simulated:
    """Torch-Pruning's pruner over the heads and FFN channels of a layout. Reports what it would prune; never prunes."""

    def __init__(self, tp, model: nn.Module, layout: Layout, scorer):
        self.layout, self.heads, roots = layout, {}, set()
        self.owner: dict[tuple[nn.Module, int], tuple[Site, Member]] = {}
        for site in layout.sites:
            for member in site.members:
                linear = attribute(base_of(model), member.parameter.rpartition(".")[0])
                self.owner[linear, member.dim] = site, member
                if member.dim == 0:
                    roots.add(linear)
                    self.heads |= {linear: site.units} if site.kind == "head" else {}
        ids = torch.arange(8, device=next(model.parameters()).device)[None]
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            self.pruner = tp.pruner.BasePruner(
                model,
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                scorer,
                global_pruning=True,
                prune_num_heads=True,
                prune_head_dims=False,
                num_heads=dict(self.heads),
                in_channel_groups={},
                out_channel_groups={},
                output_transform=lambda out: sum(value.sum() for value in out.values()),
                ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear) and m not in roots],
            )
        self.importance = {}
        for group in self.pruner.DG.get_all_groups(self.pruner.ignored_layers, self.pruner.root_module_types):
            group = self.pruner._downstream_node_as_root_if_attention(group) or group
            site, _ = self._site(group)
            self.importance[site.name] = self.pruner.estimate_importance(group).view(site.units, -1).mean(1).cpu()

    def _site(self, group) -> tuple[Site, Member]:
        root = group[0].dep
        entry = self.owner.get((root.target.module, 0 if self.pruner.DG.is_out_channel_pruning_fn(root.handler) else 1))
        if entry is None:
            raise SensibertError(f"torch-pruning: it wants to prune {root.target.name}, which is no site of the layout")
        return entry

    def counts(self, ratio: float) -> dict[str, int]:
        """Units it would leave of every site at this pruning ratio."""
        self.pruner.current_step, self.pruner.num_heads = 0, dict(self.heads)
        self.pruner.out_channel_groups.update(self.heads)  # step() changes both
        self.pruner.per_step_pruning_ratio = self.pruner.per_step_head_pruning_ratio = [0.0, ratio]
        counts = counts_of(self.layout)
        for group in self.pruner.step(interactive=True):
            site, member = self._site(group)
            counts[site.name] -= len(set(group[0].idxs)) // member.span
        return counts


RIVALS = {
    "layers": Layers,
    "spread layers": lambda: Layers(spread=True),
    "torch-pruning": lambda: TorchPruning("taylor"),
    "torch-pruning-magnitude": lambda: TorchPruning("magnitude"),
}
