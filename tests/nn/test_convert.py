"""replace and restore: the model stays itself, and restored it computes what the masked one did."""

import copy

import pytest
import torch
from torch import nn

from sensibert.core.grid import Grid
from sensibert.nn import MaskedLinear, replace, restore
from tests.helpers import tiny_batch, tiny_model

FAMILIES = ["bert", "distilbert", "albert", "modernbert"]


def make_model():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4, bias=False))


def half(model, grid):
    """{name: (keep, grid)} with about half of the blocks of every nn.Linear."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {n: (torch.rand(grid.shape(m.out_features, m.in_features)) < 0.5, grid) for n, m in linears.items()}


def kinds(model):
    return [type(module) for module in model.modules()]


def test_replace_keeps_parameters_hooks_and_outputs():
    model, x = make_model(), torch.randn(3, 6)
    parameters, want, calls = list(model.parameters()), model(x), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    assert replace(model) is model
    assert kinds(model) == [nn.Sequential, MaskedLinear, nn.GELU, MaskedLinear]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(model(x), want) and calls == [1]


@pytest.mark.parametrize("grid", [Grid.element(), Grid.row(), Grid.column(), Grid.block(3, 2)], ids=str)
def test_restore_sets_dropped_weights_to_zero(grid):
    model, x = make_model().double(), torch.randn(3, 6, dtype=torch.float64)
    parameters = list(model.parameters())
    replace(model, half(model, grid))
    dropped = ~grid.expand(model[0].keep, 8, 6)
    model[0].weight.data[dropped] = float("nan")
    want = model(x)
    assert restore(model) is model
    assert kinds(model) == [nn.Sequential, nn.Linear, nn.GELU, nn.Linear]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    torch.testing.assert_close(model(x), want, rtol=1e-13, atol=1e-13)
    assert not model[0].weight[dropped].any() and not hasattr(model[0], "keep") and not hasattr(model[0], "grid")


def test_both_are_idempotent():
    model = make_model()
    keep = half(model, Grid.row())
    replace(model, keep)
    once = model[0].keep.clone()
    replace(model, keep)
    replace(model)
    assert torch.equal(model[0].keep, once) and kinds(model).count(MaskedLinear) == 2
    restore(model)
    weights = [p.clone() for p in model.parameters()]
    restore(model)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))


def test_only_the_named_layers_are_replaced():
    model = replace(make_model(), {"2": (None, Grid.column())})
    assert kinds(model) == [nn.Sequential, nn.Linear, nn.GELU, MaskedLinear] and model[2].grid == Grid.column()


def test_a_model_that_is_one_layer():
    layer = nn.Linear(6, 8)
    assert replace(layer) is layer and type(layer) is MaskedLinear
    assert restore(layer) is layer and type(layer) is nn.Linear


def test_a_module_under_two_names_is_one_layer():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    replace(model, {"b": (torch.zeros(4, 1, dtype=torch.bool), Grid.row())})
    assert type(model["a"]) is MaskedLinear and not model["a"].keep.any()


def test_an_optimizer_from_before_trains_the_masked_model():
    model, x = make_model(), torch.randn(3, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace(model, half(model, Grid.row()))
    before = copy.deepcopy(model)
    model(x).square().sum().backward()
    optimizer.step()
    wide = model[0].grid.expand(model[0].keep, 8, 6)
    assert not torch.equal(model[0].weight[wide], before[0].weight[wide])
    assert torch.equal(model[0].weight[~wide], before[0].weight[~wide])


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_computes_something_else_is_left_alone():
    model = nn.ModuleList([Scaled(4, 4), nn.Linear(4, 4)])
    model[1].forward = lambda x: x
    assert kinds(replace(model)) == [nn.ModuleList, Scaled, nn.Linear]


def own_forward(model):
    model[0].forward = model[0].forward


@pytest.mark.parametrize(
    "name,mask,spoil,message",
    [
        ("5", None, None, r"replace: keep names '5', which the model does not have"),
        ("1", None, None, r"replace: '1' is GELU, want a plain nn.Linear"),
        ("0", None, own_forward, r"replace: '0' is Linear with a forward of its own, want a plain nn.Linear"),
        (
            "0",
            torch.ones(7, 1, dtype=torch.bool),
            None,
            r"replace: '0': .*keep is .* \(7, 1\), want .*\(8, 1\)",
        ),
    ],
)
def test_a_bad_entry_is_named_and_nothing_changes(name, mask, spoil, message):
    model = make_model()
    if spoil:
        spoil(model)
    with pytest.raises(ValueError, match=message):
        replace(model, {"2": (None, Grid.row()), name: (mask, Grid.row())})
    assert kinds(model) == kinds(make_model())


def test_from_linear_refuses_a_subclass():
    with pytest.raises(ValueError, match="linear is Scaled, want a plain nn.Linear"):
        MaskedLinear.from_linear(Scaled(4, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformers_model_is_replaced_and_restored(family):
    model, batch = tiny_model(family), tiny_batch()
    keys, want = list(model.state_dict()), model(**batch).logits
    replace(model)
    assert torch.equal(model(**batch).logits, want) and list(model.state_dict()) == keys
    replace(model, half(model, Grid.rows(8)))
    masked = model(**batch).logits
    assert not torch.allclose(masked, want)
    restore(model)
    torch.testing.assert_close(model(**batch).logits, masked, rtol=1e-5, atol=1e-6)
    assert MaskedLinear not in kinds(model) and list(model.state_dict()) == keys
