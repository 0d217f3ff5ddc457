"""Model and plan -> smaller model: heads and FFN neurons are removed from the tensors.

Every trim checks itself: it runs one batch through the encoder with the dropped units masked, and through the trimmed
encoder. If the outputs differ, the model is restored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..core.arguments import checked
from ..core.artifacts import BlockPlan, Plan, UnitPlan
from ..core.budget import Budget
from ..core.errors import SensibertError
from ..models import family_of, layers, layout_of
from ..models.families.family import Axis
from ..models.masks import Masks, set_masks
from ..models.modeling_sensibert import EmptyLinear
from ..models.modules import attribute, is_linear
from ..models.reloadable import reloadable
from ..models.structure import PickHeads, structure_of
from ..nn import MaskedLinear, restore
from .cut import Undo, assign, cuts_of, gather, hand_over, put
from .mask import mask_blocks
from .self_check import check_same, probe, silenced


def _set_attributes(layer: nn.Module, axis: Axis, count: int, span: int, undo: Undo) -> None:
    for names, value in ((axis.counts, count), (axis.widths, count * span)):
        for path in names:
            owner, _, name = path.rpartition(".")
            assign(attribute(layer, owner) if owner else layer, name, value, undo)


def _without_heads(layer: nn.Module, undo: Undo) -> None:
    """Fused attention may refuse 0 heads (torch 2.11 on CUDA does); eager attention accepts them."""
    for module in layer.modules():
        if hasattr(module, "config"):
            config = copy.copy(attribute(module, "config"))
            config._attn_implementation = "eager"
            assign(module, "config", config, undo)


def _without_units(layer: nn.Module, axis: Axis, undo: Undo) -> None:
    names = dict(layer.named_modules())
    for linear in map(names.get, (*axis.produces, *axis.tables, axis.consumes)):
        if is_linear(linear):
            assign(linear, "__class__", EmptyLinear, undo)


def _end_masks(model: nn.Module, undo: Undo) -> None:
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
    """SensibertError if the plan is of another model, or keeps fewer units than the family's code requires."""
    layout = layout_of(model)
    if (layout.family, layout.sites) != (plan.layout.family, plan.layout.sites):
        raise SensibertError(
            f"trim: the plan was made for another model ({plan.layout.family}, {len(plan.layout.sites)} sites, "
            f"{plan.layout.encoder_params:,} encoder parameters), this one is {layout.family}, {len(layout.sites)} "
            f"sites, {layout.encoder_params:,}"
        )
    for site in layout.sites if isinstance(plan, UnitPlan) else ():
        keep = plan.keep[site.name]
        if keep.shape != (site.units,) or int(keep.sum()) < site.minimum:
            raise SensibertError(
                f"trim: {site.name} keeps {int(keep.sum())} of {len(keep)} units, want at least {site.minimum} of "
                f"{site.units} ({layout.family})"
            )


@checked
def trim(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None = None,
    copy_model: bool = False,
    check: bool = True,
) -> nn.Module:
    """Remove the plan's dropped units from the tensors of a transformers model, in place, and return it.

    The class of the model changes from transformers' X to SensibertX, and it gets a new config: `save_pretrained` then
    writes a folder that `from_pretrained` loads, with sensibert imported or with trust_remote_code=True. The same holds
    for a model with a head whose base model is trimmed. A model that holds the trimmed encoder in another way gets a
    `save_pretrained` that raises SensibertError.
    A plan of blocks removes nothing: dropped weights are set to 0 and masked (`mask_blocks`).

    optimizer: its parameters and their state are trimmed too. copy_model: trim a copy and do not change `model`. check:
    compare the hidden states of the masked and the trimmed model on one batch. SensibertError if the plan is of another
    model, the model is wrapped (DataParallel, torch.compile), or the check fails; the model is then unchanged."""
    _refuse(model, plan)
    if copy_model and optimizer is not None:
        raise SensibertError("trim: copy_model cuts a copy, which no optimizer holds: want optimizer=None")
    if copy_model:
        model = copy.deepcopy(model)
    if isinstance(plan, BlockPlan):
        return mask_blocks(model, plan.keep, plan.grid, optimizer)
    assert isinstance(plan, UnitPlan)  # there are no other plans
    return _trim(model, plan, optimizer, check, {"budget": str(plan.budget), "method": plan.method})


def _trim(
    model: nn.Module, plan: UnitPlan, optimizer: torch.optim.Optimizer | None, check: bool, origin: dict[str, str]
) -> nn.Module:
    family, undo, expected = family_of(model), Undo(), None
    structure = {name: kept[plan.keep[name]] for name, kept in structure_of(model).items()}
    try:
        _end_masks(model, undo)
        if check:
            with silenced(model, plan):
                expected = probe(model)
            if not expected.isfinite().all():
                raise SensibertError("trim: the model's hidden states are NaN or inf, so the cut cannot be checked")
        for owner, name, value in reloadable(model, structure, origin):
            assign(owner, name, value, undo)
        cuts = cuts_of(model, plan)
        gather(cuts, optimizer)
        for cut in cuts:
            put(cut, undo)
        layer_of = [layer for _, layer in layers(model)]
        for site in plan.layout.sites:
            kept, layer = plan.kept(site.name), layer_of[site.layer]
            axis = family.head if site.kind == "head" else family.ffn
            if not len(kept):
                _without_units(layer, axis, undo)
            if len(kept) == site.units:
                continue
            _set_attributes(layer, axis, len(kept), site.consumer.span, undo)
            if site.kind == "head" and not len(kept):
                _without_heads(layer, undo)
            if site.kind == "head" and family.position_bias:
                undo.append(PickHeads.attach(attribute(layer, family.position_bias), kept))
        if expected is not None:
            check_same(model, expected)
    except BaseException:
        undo.run()
        raise
    hand_over(cuts, optimizer)
    return model


def restructure(model: nn.Module, structure: Mapping[str, Tensor] | Masks) -> nn.Module:
    """Trim a model to a saved structure (kept units of the original model), or mask it, in place; return it. Saved
    weights can be loaded afterwards. SensibertError if the structure is of another model."""
    if isinstance(structure, Masks):
        set_masks(model, structure)
        return model
    current, layout = structure_of(model), layout_of(model)
    missing = [n for n in current if n not in structure or not torch.isin(structure[n], current[n]).all()]
    if missing or len(structure) != len(current):
        raise SensibertError(f"structure: does not fit this {layout.family} model (at {(missing or ['its sites'])[0]})")
    keep = {name: torch.isin(current[name], structure[name]) for name in current}
    return _trim(model, UnitPlan(layout, keep, Budget(1.0, "params", True), "structure"), None, False, {})
