"""Model and plan -> smaller model. Physical trimming cuts the tensors; masked trimming silences the same units.

Both are the same function of the input, and trimming proves it: one batch goes through the masked and the trimmed
encoder, and if they differ the model is put back as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..core.artifacts import Plan, UnitPlan
from ..core.budget import Budget
from ..core.errors import SensibertError
from ..core.layout import Member, Site
from ..models import base_of, family_of, layers, layout_of
from ..models.families.family import Axis
from ..models.masks import Masks, set_masks
from ..models.modules import attribute
from ..models.structure import PickHeads, set_structure, structure_of
from ..nn import MaskedLinear, replace, restore
from ..optim.state import slice_state
from .mask import mask_blocks
from .self_check import check_same, probe, silenced


def _cut(parameter: nn.Parameter, member: Member, kept: Tensor, units: int) -> tuple[nn.Parameter, dict[int, Tensor]]:
    index = member.index(kept.to(parameter.device), units)
    new = nn.Parameter(parameter.detach().index_select(member.dim, index).clone(), parameter.requires_grad)
    if parameter.grad is not None:
        new.grad = parameter.grad.index_select(member.dim, index)
    return new, {member.dim: index}


class _Undo(list):
    """Callables that put back what was changed, newest last."""

    def run(self) -> None:
        while self:
            self.pop()()


def _assign(owner: object, name: str, value: object, undo: _Undo) -> None:
    old = getattr(owner, name)
    undo.append(lambda: setattr(owner, name, old))
    setattr(owner, name, value)


def _cut_site(model: nn.Module, site: Site, kept: Tensor, on_cut: Callable, undo: _Undo) -> None:
    base = base_of(model)
    for member in site.members:
        path, _, name = member.parameter.rpartition(".")
        linear = attribute(base, path)
        old = getattr(linear, name)
        new, index = _cut(old, member, kept, site.units)
        _assign(linear, name, new, undo)
        if name == "weight":
            _assign(linear, "in_features" if member.dim else "out_features", new.shape[member.dim], undo)
        on_cut(old, new, index)


def _set_attributes(layer: nn.Module, axis: Axis, count: int, span: int, undo: _Undo) -> None:
    for names, value in ((axis.counts, count), (axis.widths, count * span)):
        for path in names:
            owner, _, name = path.rpartition(".")
            _assign(attribute(layer, owner) if owner else layer, name, value, undo)


def _without_heads(layer: nn.Module, undo: _Undo) -> None:
    """Fused attention need not take 0 heads (torch 2.11 on CUDA does not), the plain formula does."""
    for module in layer.modules():
        if hasattr(module, "config"):
            config = copy.copy(module.config)
            config._attn_implementation = "eager"
            _assign(module, "config", config, undo)


def _end_masks(model: nn.Module, undo: _Undo) -> None:
    for module in model.modules():
        if isinstance(module, MaskedLinear):
            undo.append(_mask_again(module))
    restore(model)


def _mask_again(layer: MaskedLinear) -> Callable[[], None]:
    weight, keep, grid = layer.weight.detach().clone(), layer.keep, layer.grid

    @torch.no_grad()
    def again() -> None:
        MaskedLinear.from_linear(layer, keep, grid).weight.copy_(weight)

    return again


def _refuse(model: nn.Module, plan: Plan) -> None:
    """SensibertError if the plan is of another model, or leaves less than the family's code can do without."""
    layout = layout_of(model)
    if (layout.family, layout.sites) != (plan.layout.family, plan.layout.sites):
        raise SensibertError(
            f"trim: the plan was made for another model ({plan.layout.family}, {len(plan.layout.sites)} sites, "
            f"{plan.layout.encoder_params:,} encoder parameters), this one is {layout.family}, {len(layout.sites)} "
            f"sites, {layout.encoder_params:,}"
        )
    for site in layout.sites if plan.grid is None else ():
        keep = plan.keep[site.name]
        if keep.shape != (site.units,) or int(keep.sum()) < site.minimum:
            raise SensibertError(
                f"trim: {site.name} keeps {int(keep.sum())} of {len(keep)} units, want at least {site.minimum} of "
                f"{site.units} ({layout.family})"
            )


def _slice_optimizer(optimizer: torch.optim.Optimizer, cuts: list[tuple[Tensor, Tensor, dict[int, Tensor]]]) -> None:
    """Parameters the optimizer never held (frozen ones) stay out of it; SensibertError if it held none of them."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    ours = [cut for cut in cuts if id(cut[0]) in held]
    if cuts and not ours:
        raise SensibertError("trim: the optimizer holds none of the tensors to cut, want the optimizer of this model")
    for cut in ours:
        slice_state(optimizer, *cut)


def trim(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None = None,
    copy_model: bool = False,
    check: bool = True,
    masked: bool = False,
) -> nn.Module:
    """Remove the plan's dropped units from the tensors of a transformers model, in place, and return it.

    optimizer: its parameters and state are cut along. copy_model: leave `model` alone and trim a copy. check: compare
    masked and trimmed hidden states of one batch. masked: the tensors stay whole and the layers become MaskedLinear, so
    that another plan can bring units back; `restore` or a physical trim ends it. A plan with a grid always masks, and
    keeps what it drops at 0 in training (`mask_blocks`). SensibertError if the plan is of another model or the check
    fails; the model is then as it was before."""
    _refuse(model, plan)
    if copy_model and optimizer is not None:
        raise SensibertError("trim: copy_model cuts a copy, which no optimizer holds: want optimizer=None")
    if copy_model:
        model = copy.deepcopy(model)
    if plan.grid is not None:
        return mask_blocks(model, plan.keep, plan.grid, optimizer)
    if masked:
        return _mask(model, plan)
    family, structure, undo, cuts = family_of(model), structure_of(model), _Undo(), []
    expected = None
    try:
        _end_masks(model, undo)
        if check:
            with silenced(model, plan):
                expected = probe(model)
            if not expected.isfinite().all():
                raise SensibertError("trim: the model's hidden states are NaN or inf, so the cut cannot be checked")
        layer_of = [layer for _, layer in layers(model)]
        for site in plan.layout.sites:
            kept, layer = plan.kept(site.name), layer_of[site.layer]
            if len(kept) == site.units:
                continue
            _cut_site(model, site, kept, lambda *cut: cuts.append(cut), undo)
            axis = family.head if site.kind == "head" else family.ffn
            _set_attributes(layer, axis, len(kept), site.consumer.span, undo)
            if site.kind == "head" and not len(kept):
                _without_heads(layer, undo)
            if site.kind == "head" and family.position_bias:
                undo.append(PickHeads.attach(attribute(layer, family.position_bias), kept))
            structure[site.name] = structure[site.name][kept]
        if expected is not None:
            check_same(model, expected)
        if optimizer is not None:
            _slice_optimizer(optimizer, cuts)
    except BaseException:
        undo.run()
        raise
    set_structure(model, structure)
    return model


def _mask(model: nn.Module, plan: Plan) -> nn.Module:
    """The same function by masks: rows of the producing layers, columns of the consuming one, kept unit by unit."""
    masks = {}
    for site in plan.layout.sites:
        for member in site.members:
            path, _, name = member.parameter.rpartition(".")
            if name == "weight":
                keep = plan.keep[site.name].repeat(member.parts)
                masks[path] = (keep[:, None] if member.dim == 0 else keep[None], member.grid)
    replace(base_of(model), masks)
    return model


def restructure(model: nn.Module, structure: Mapping[str, Tensor] | Masks) -> nn.Module:
    """Cut a model to the shapes of a stored structure (kept units of the base model), or mask it; its weights come
    next."""
    if isinstance(structure, Masks):
        set_masks(model, structure)
        return model
    have, layout = structure_of(model), layout_of(model)
    missing = [name for name in have if name not in structure or not torch.isin(structure[name], have[name]).all()]
    if missing or len(structure) != len(have):
        raise SensibertError(f"structure: does not fit this {layout.family} model (at {(missing or ['its sites'])[0]})")
    keep = {name: torch.isin(have[name], structure[name]) for name in have}
    return trim(model, UnitPlan(layout, keep, Budget(1.0, "params", True), "structure"), check=False)
