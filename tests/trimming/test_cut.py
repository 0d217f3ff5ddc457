"""All tensors of a trim are gathered in one launch, bit for bit; an optimizer that cannot follow changes nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.optimization import Adafactor

from sensibert.models import base_of, layout_of
from sensibert.optim import MaskedAdamW
from sensibert.trimming.trim import restructure, trim
from tests.helpers import tiny_batch, tiny_model
from tests.plans import random_plan

OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "MaskedAdamW": MaskedAdamW,
    "momentum": lambda params: torch.optim.SGD(params, 1e-2, momentum=0.9),
    "torch Adafactor": torch.optim.Adafactor,
    "Adafactor": Adafactor,
}


class Counted(TorchDispatchMode):
    """How often gather_kept was launched, and how often index_select on a float tensor."""

    gathers = selects = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.gathers += func is torch.ops.sensibert.gather_kept_.default
        self.selects += func is torch.ops.aten.index_select.default and args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(**tiny_batch(), labels=torch.tensor([0, 1, 1])).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [None, *OPTIMIZERS])
def test_a_trim_is_one_launch_with_and_without_an_optimizer(kind):
    model, optimizer = tiny_model(), None
    if kind is not None:
        optimizer = OPTIMIZERS[kind](model.parameters())
        step(model, optimizer)
    plan = random_plan(layout_of(model))
    with Counted() as counted:
        trim(model, plan, optimizer, check=False)
    assert (counted.gathers, counted.selects) == (1, 0)
    with Counted() as counted:
        trim(model, random_plan(layout_of(model), seed=1), optimizer)
    assert (counted.gathers, counted.selects) == (1, 0)


def test_so_is_the_cut_to_a_stored_structure():
    small = trim(tiny_model(), random_plan(layout_of(tiny_model())))
    with Counted() as counted:
        restructure(tiny_model(), {name: torch.tensor(kept) for name, kept in units(small).items()})
    assert (counted.gathers, counted.selects) == (1, 0)


def units(model: nn.Module) -> dict[str, list[int]]:
    return {name: kept.tolist() for name, kept in base_of(model).sensibert_structure.items()}


def kept_by_hand(plan, name: str, tensor: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """index_select along each axis of a state tensor of parameter `name` that is as long as the parameter's."""
    for site in plan.layout.sites:
        for member in site.members:
            if member.parameter == name:
                dim, size = member.dim, full.shape[member.dim]
                if tensor.dim() == full.dim():
                    fits = tensor.shape[dim] == size
                else:  # a factor of Adafactor: of the rows or of the columns
                    fits, dim = tensor.shape == (size,), 0
                if fits:
                    tensor = tensor.index_select(dim, member.index(plan.kept(site.name), site.units))
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_all_that_is_gathered_is_what_index_select_gives(kind, dtype):
    # In float64 the op's reference runs in its place: kernels compute in 32 bits. Heads 8 rows wide, widths uneven.
    model = tiny_model(intermediate_size=72).to(dtype)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(2):
        step(model, optimizer)
    plan = random_plan(layout_of(model), empty=("layer.1.head",))
    before = dict(base_of(model).named_parameters())
    expected = {}
    for name, p in before.items():
        actual = {"": p.detach(), "grad": p.grad, **optimizer.state[p]}
        square = name.endswith("weight") and p.dim() == 2 and p.shape[0] == p.shape[1]
        for part, value in actual.items():
            if isinstance(value, torch.Tensor) and not (square and value.dim() == 1):  # of which axis is not to be seen
                expected[name, part] = value if value.numel() == 1 else kept_by_hand(plan, name, value.clone(), p)
    trim(model, plan, optimizer)
    after, cut = dict(base_of(model).named_parameters()), 0
    for (name, part), value in expected.items():
        p = after[name]
        actual = {"": p.detach(), "grad": p.grad, **optimizer.state[p]}[part]
        assert actual.dtype == value.dtype and torch.equal(actual, value), (name, part)
        cut += actual.shape != (before[name].shape if actual.dim() == before[name].dim() else actual.shape)
    assert cut > 20


def test_an_optimizer_that_cannot_follow_changes_neither_itself_nor_the_model():
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    spoiled = model.bert.encoder.layer[1].output.dense.weight  # the last one that is cut
    optimizer.state[spoiled]["absmax"] = torch.zeros(3)
    groups, states = [*optimizer.param_groups[0]["params"]], {p: dict(s) for p, s in optimizer.state.items()}
    before, plan = copy.deepcopy(model.state_dict()), random_plan(layout_of(model))
    with pytest.raises(ValueError, match="AdamW keeps absmax"):
        trim(model, plan, optimizer)
    assert all(a is b for a, b in zip(groups, optimizer.param_groups[0]["params"], strict=True))
    assert all(optimizer.state[p][name] is value for p, state in states.items() for name, value in state.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {id(p) for p in groups} == {id(p) for p in model.parameters()} and "sensibert" not in str(type(model))
    del optimizer.state[spoiled]["absmax"]
    trim(model, plan, optimizer)
    step(model, optimizer)
