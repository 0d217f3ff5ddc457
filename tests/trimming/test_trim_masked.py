"""Masked trimming: the same function as the physical cut, with the tensors still whole."""

import pytest
import torch

from sensibert.allocation.allocate import allocate
from sensibert.core.artifacts import Plan, Sensitivity
from sensibert.core.budget import Budget
from sensibert.models import layout_of
from sensibert.nn import MaskedLinear, restore
from sensibert.trimming.trim import trim
from tests.helpers import tiny_batch, tiny_model


def random_plan(model, budget: str, seed: int = 0) -> Plan:
    layout, generator = layout_of(model), torch.Generator().manual_seed(seed)
    scores = {site.name: torch.rand(site.units, generator=generator) for site in layout.sites}
    return allocate(Sensitivity(layout, scores, "random"), Budget.parse(budget), width_multiple=4)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "albert", "modernbert", "deberta-v2", "mpnet"])
def test_masked_and_physical_trimming_are_the_same_function(model_type):
    model = tiny_model(model_type).double()
    plan, batch = random_plan(model, "50%params"), tiny_batch()
    before = {name: p.clone() for name, p in model.named_parameters()}
    cut = trim(model, plan, copy_model=True)(**batch).logits
    masked = trim(model, plan, masked=True)
    torch.testing.assert_close(masked(**batch).logits, cut, atol=1e-12, rtol=0)
    assert {name: p.shape for name, p in masked.named_parameters()} == {name: p.shape for name, p in before.items()}
    assert all(torch.equal(p, before[name]) for name, p in masked.named_parameters())


def test_another_plan_brings_units_back():
    model = tiny_model()
    batch = tiny_batch()
    dense = model(**batch).logits
    trim(model, random_plan(model, "30%params"), masked=True)
    assert not torch.allclose(model(**batch).logits, dense)
    trim(model, random_plan(model, "100%params"), masked=True)
    torch.testing.assert_close(model(**batch).logits, dense)


def test_dropped_units_get_no_gradient_and_kept_ones_do():
    model = tiny_model()
    plan = random_plan(model, "50%params")
    trim(model, plan, masked=True)
    model(**tiny_batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
    state = dict(model.base_model.named_parameters())
    for site in plan.layout.sites:
        grad = state[site.consumer.parameter].grad.view(-1, site.units, site.consumer.span)
        keep = plan.keep[site.name]
        assert not grad[:, ~keep].any()
        assert grad[:, keep].any() or not keep.any()


def test_a_physical_trim_ends_the_masks():
    model = tiny_model().double()
    plan, batch = random_plan(model, "50%params"), tiny_batch()
    masked = trim(model, plan, masked=True)(**batch).logits
    trim(model, plan)
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())
    assert layout_of(model).encoder_params == plan.params
    torch.testing.assert_close(model(**batch).logits, masked, atol=1e-12, rtol=0)


def test_restore_keeps_the_function_with_zeros_in_the_weights():
    model = tiny_model().double()
    plan, batch = random_plan(model, "50%params"), tiny_batch()
    masked = trim(model, plan, masked=True)(**batch).logits
    restore(model)
    torch.testing.assert_close(model(**batch).logits, masked, atol=1e-12, rtol=0)
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())
