"""Kept units compensate for dropped ones: exactly where that is possible, else by least squares."""

import copy

import pytest
import torch

from sensibert.core.artifacts import UnitPlan
from sensibert.core.budget import Budget
from sensibert.core.errors import SensibertError
from sensibert.models import base_of, layout_of
from sensibert.models.modules import attribute
from sensibert.sensitivity.gradients import given_loss
from sensibert.sensitivity.kfac_obs import collect_factors
from sensibert.trimming.compensate import compensate
from sensibert.trimming.trim import trim
from tests.helpers import tiny_batch, tiny_model

FAMILIES = ["bert", "modernbert", "albert"]  # separate layers, gated and without biases, one layer shared by all
SITE = "layer.0.ffn"


def batches(count=4, size=3, seed=0):
    for number in range(count):
        yield {**tiny_batch(size, 7, seed=seed + number), "labels": torch.arange(size) % 2}


def half_plan(model, site_name=SITE):
    """Every site whole but one, which keeps the first half of its units."""
    layout = layout_of(model)
    keep = {site.name: torch.ones(site.units, dtype=torch.bool) for site in layout.sites}
    keep[site_name][len(keep[site_name]) // 2 :] = False
    return UnitPlan(layout, keep, Budget.parse("50%params"), "test")


def consumer_of(model, plan, site_name=SITE):
    return attribute(base_of(model), plan.layout.site(site_name).consumer.parameter.removesuffix(".weight"))


def compensated(model, plan, damp=1e-2, **options):
    compensate(model, plan, collect_factors(model, plan.layout, batches(**options), given_loss), damp)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_duplicate_units_does_not_change_the_output(family):
    model = tiny_model(family).double()
    plan = half_plan(model)
    site = plan.layout.site(SITE)
    with torch.no_grad():
        for member in site.members:
            if member != site.consumer:  # the second half of the neurons computes what the first does
                parameter = attribute(base_of(model), member.parameter)
                for part in parameter.chunk(member.parts, member.dim):
                    part[site.units // 2 :] = part[: site.units // 2]
    batch = tiny_batch(3, 7, seed=9)
    expected = model(**batch).logits
    plain = trim(copy.deepcopy(model), plan)(**batch).logits
    actual = trim(compensated(model, plan, damp=1e-12), plan)(**batch).logits
    assert (plain - expected).abs().max() > 1e-6
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_the_solution_is_the_weighted_least_squares_one():
    model = tiny_model().double()
    plan = half_plan(model)
    consumer, calls = consumer_of(model, plan), []

    def watch(module, args, out):
        out.retain_grad()
        calls.append((args[0], out))

    handle = consumer.register_forward_hook(watch)
    for batch in batches():
        model(**batch).loss.backward()
    handle.remove()
    h = torch.cat([h.detach().flatten(0, 1) for h, _ in calls])  # [tokens, K]
    root = torch.cat([out.grad.flatten(0, 1).norm(dim=-1, keepdim=True) for _, out in calls])
    kept = plan.kept(SITE)
    want = torch.linalg.lstsq(
        root * torch.cat([h[:, kept], torch.ones(len(h), 1)], 1), root * consumer(h).detach()
    ).solution.T
    # lstsq has no damping and 84 tokens for 33 unknowns: well determined
    compensated(model, plan, damp=1e-13)
    torch.testing.assert_close(consumer.weight[:, kept], want[:, :-1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(consumer.bias, want[:, -1], rtol=1e-3, atol=1e-6)


def test_nothing_but_the_consumers_of_cut_sites_changes():
    model = tiny_model()
    before, plan = copy.deepcopy(model), half_plan(model)
    model.train()
    random = torch.random.get_rng_state()
    compensated(model, plan)
    assert torch.equal(random, torch.random.get_rng_state())
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    name = "bert." + plan.layout.site(SITE).consumer.parameter.removesuffix("weight")
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[key])}
    assert changed == {name + "weight", name + "bias"}


def test_the_bias_gets_the_mean_of_a_removed_sub_layer():
    model = tiny_model().double()
    plan = half_plan(model)
    plan.keep[SITE][:] = False
    bias = consumer_of(model, plan).bias.clone()
    compensated(model, plan)
    assert not torch.allclose(consumer_of(model, plan).bias, bias)
    trim(model, plan)


def test_a_frozen_encoder_is_compensated_too():
    free, frozen = tiny_model(), tiny_model()
    base_of(frozen).requires_grad_(False)
    plan = half_plan(free)
    compensated(free, plan), compensated(frozen, plan)
    torch.testing.assert_close(consumer_of(free, plan).weight, consumer_of(frozen, plan).weight)
    assert not any(p.requires_grad for p in base_of(frozen).parameters())


def test_activations_that_are_not_finite_are_refused():
    model = tiny_model()
    plan = half_plan(model)
    factors = collect_factors(model, plan.layout, batches(), given_loss)
    factors[plan.layout.site(SITE).consumer.parameter].second[0, 0] = torch.nan
    with pytest.raises(SensibertError, match=rf"compensate: the factors of {SITE} are not finite"):
        compensate(model, plan, factors)
