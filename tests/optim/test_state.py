"""Optimizer state is cut with its parameter, and what does not fit is named."""

import copy
import gc
import weakref

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers.optimization import Adafactor

from sensibert.core.grid import Grid
from sensibert.optim.masked_adamw import MaskedAdamW
from sensibert.optim.state import slice_state
from tests.optim.test_masked_adamw import make_params, train


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "accelerate"])
@pytest.mark.parametrize("kind", [MaskedAdamW, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_sliced_parameter_trains_on_like_the_rows_and_columns_it_keeps(kind, wrapped):
    whole, small = make_params()[0], None
    settings = {"lr": 1e-2, **({"momentum": 0.9} if kind is torch.optim.SGD else {})}
    reference, optimizer = kind([whole], **settings), None
    train(reference, 3)
    small = nn.Parameter(whole.detach().clone())
    optimizer = kind([{"params": [small]}], **settings)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    optimizer = Accelerator(cpu=True).prepare(optimizer) if wrapped else optimizer
    rows, cols = torch.tensor([4, 0, 1]), torch.tensor([3, 1])
    new = nn.Parameter(small.detach()[rows][:, cols].clone())
    slice_state(optimizer, small, new, {0: rows, 1: cols})
    assert optimizer.param_groups[0]["params"][0] is new and list(optimizer.state) == [new]
    whole.grad = torch.randn(6, 4)
    new.grad = whole.grad[rows][:, cols]
    reference.step()
    optimizer.step()
    torch.testing.assert_close(new, whole.detach()[rows][:, cols], rtol=1e-6, atol=1e-7)


def test_a_mask_is_sliced_with_its_parameter_and_removed_if_it_drops_nothing():
    weight, bias = make_params()[:2]
    optimizer = MaskedAdamW([weight, bias])
    optimizer.set_keep(weight, torch.tensor([[True, False], [True, True]]), Grid.block(3, 3))  # ragged: 3 + 3 by 3 + 1
    optimizer.set_keep(bias, torch.arange(5)[:, None] != 2, Grid.row())
    working_copy = torch.zeros(6, 4, dtype=torch.bfloat16)
    optimizer.set_working_copy(weight, working_copy)
    train(optimizer, 2)
    new_weight, new_bias = nn.Parameter(weight.detach()[2:5].clone()), nn.Parameter(bias.detach()[[0, 4]].clone())
    slice_state(optimizer, weight, new_weight, {0: torch.arange(2, 5)})
    slice_state(optimizer, bias, new_bias, {0: torch.tensor([0, 4])})
    train(optimizer, 1)
    assert new_weight.eq(0).nonzero().tolist() == [[0, 3]]
    assert "keep" not in optimizer.state[new_bias]


def test_slicing_before_the_first_step_only_swaps_the_parameter():
    weight = make_params()[0]
    optimizer = torch.optim.AdamW([weight])
    new = nn.Parameter(weight.detach()[:2].clone())
    slice_state(optimizer, weight, new, {0: torch.tensor([0, 1])})
    assert optimizer.param_groups[0]["params"] == [new] and not optimizer.state


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, Adafactor])
def test_the_factors_of_adafactor_are_sliced_with_their_rows_and_columns(kind):
    def factors(parameter):
        return [v.flatten().clone() for v in optimizer.state[parameter].values() if torch.is_tensor(v) and v.dim()]

    weight = nn.Parameter(torch.randn(6, 4))
    optimizer = kind([weight])
    train(optimizer, 2)
    (of_rows, of_cols), rows, cols = factors(weight), torch.tensor([4, 0, 1]), torch.tensor([3, 1])
    new = nn.Parameter(weight.detach()[rows][:, cols].clone())
    slice_state(optimizer, weight, new, {0: rows, 1: cols})
    for factor, expected in zip(factors(new), (of_rows[rows], of_cols[cols]), strict=True):
        assert torch.equal(factor, expected)
    train(optimizer, 1)


def test_what_cannot_be_sliced_is_named():
    weight, other = make_params()[:2]
    optimizer = torch.optim.AdamW([weight])
    with pytest.raises(ValueError, match=r"slice_state: old \(5,\) is in none of the optimizer's param_groups"):
        slice_state(optimizer, other, other, {})
    with pytest.raises(ValueError, match=r"slice_state: new is \(6, 4\), want \(2, 4\)"):
        slice_state(optimizer, weight, weight, {0: torch.tensor([0, 1])})
    optimizer.state[weight]["absmax"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"AdamW keeps absmax \(3,\) for a parameter \(6, 4\), want a state that can"):
        slice_state(optimizer, weight, nn.Parameter(weight.detach()[:2]), {0: torch.tensor([0, 1])})


def test_a_slice_that_fails_leaves_the_optimizer_as_it_was():
    weight = make_params()[0]
    optimizer = MaskedAdamW([weight])
    train(optimizer)
    before = copy.copy(optimizer.state[weight])
    with pytest.raises(IndexError):
        slice_state(optimizer, weight, nn.Parameter(torch.zeros(2, 4)), {0: torch.tensor([0, 6])})
    assert optimizer.param_groups[0]["params"] == [weight]
    assert all(optimizer.state[weight][name] is value for name, value in before.items())


def test_a_replaced_state_is_not_kept_alive():
    params = make_params()
    optimizer = MaskedAdamW(params)
    train(optimizer, 3)
    old = weakref.ref(params[0])
    rows = torch.tensor([0, 1])
    slice_state(optimizer, params[0], nn.Parameter(params[0].detach()[rows].clone()), {0: rows})
    del params[0]
    gc.collect()
    assert old() is None
