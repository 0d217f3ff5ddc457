"""The changes of a trim: tensors, gathered in one launch, and a list of callables that undo all changes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.artifacts import UnitPlan
from ..core.errors import SensibertError
from ..models import base_of
from ..models.modules import attribute
from ..optim.state import Index, state_cuts, swap, take_kept


class Undo(list):
    """Callables that restore what was changed, the newest last."""

    def run(self) -> None:
        while self:
            self.pop()()


def assign(owner: nn.Module, name: str, value: object, undo: Undo) -> None:
    if name in vars(owner) or name in owner._parameters or name == "__class__":
        old = getattr(owner, name)
        undo.append(lambda: setattr(owner, name, old))
    else:
        undo.append(lambda: delattr(owner, name))
    setattr(owner, name, value)


@dataclass(eq=False)
class Cut:
    """A parameter to cut, its owner, and the positions to keep along each axis. `gather` fills in `new` and `state`."""

    owner: nn.Linear
    name: str
    old: nn.Parameter
    index: dict[int, Tensor] = field(default_factory=dict)
    new: nn.Parameter | None = None
    state: dict[str, Tensor] | None = None  # the new optimizer state, if an optimizer has the parameter


def cuts_of(model: nn.Module, plan: UnitPlan) -> list[Cut]:
    """The cuts of a plan, one per parameter. Members of a site share index tensors where possible."""
    base = base_of(model)
    cuts: dict[str, Cut] = {}
    indices: dict[tuple, Tensor] = {}
    for site in plan.layout.sites:
        kept = plan.kept(site.name)
        for member in site.members if len(kept) < site.units else ():
            path, _, name = member.parameter.rpartition(".")
            owner = attribute(base, path)
            cut = cuts.setdefault(member.parameter, Cut(owner, name, getattr(owner, name)))
            key = site.name, member.span, member.parts, cut.old.device
            if key not in indices:
                indices[key] = member.index(kept, site.units).to(cut.old.device)
            cut.index[member.dim] = indices[key]
    return list(cuts.values())


def gather(cuts: list[Cut], optimizer: torch.optim.Optimizer | None) -> None:
    """Compute the new parameters, gradients and optimizer state of all cuts, in one launch.

    Parameters that the optimizer does not have (frozen ones) get no state. SensibertError if it has none of them."""
    held: set[int] = set()
    if optimizer is not None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if cuts and not any(id(cut.old) in held for cut in cuts):
            raise SensibertError(
                "trim: the optimizer holds none of the tensors to cut, want the optimizer of this model"
            )
    requests: list[tuple[Tensor, Index]] = []
    states: dict[Cut, dict[str, tuple[Tensor, Index]]] = {}
    for cut in cuts:
        requests += [(tensor, cut.index) for tensor in (cut.old.detach(), cut.old.grad) if tensor is not None]
        if optimizer is not None and id(cut.old) in held:
            states[cut] = state_cuts(optimizer, cut.old, cut.index)
            requests += states[cut].values()
    taken = iter(take_kept(requests))
    for cut in cuts:
        cut.new = nn.Parameter(next(taken), cut.old.requires_grad)
        if cut.old.grad is not None:
            cut.new.grad = next(taken)
        if cut in states:
            cut.state = {name: next(taken) for name in states[cut]}


def put(cut: Cut, undo: Undo) -> None:
    assert cut.new is not None  # filled in by `gather`
    assign(cut.owner, cut.name, cut.new, undo)
    if cut.name == "weight":
        for dim, size in ((0, "out_features"), (1, "in_features")):
            if dim in cut.index:
                assign(cut.owner, size, cut.new.shape[dim], undo)


def hand_over(cuts: list[Cut], optimizer: torch.optim.Optimizer | None) -> None:
    """Replace the parameters and their state in the optimizer. Cannot fail after `gather`."""
    for cut in cuts:
        if cut.state is not None:
            assert optimizer is not None and cut.new is not None  # filled in by `gather`, with this optimizer
            swap(optimizer, cut.old, cut.new, cut.state)
