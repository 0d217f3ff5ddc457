"""The search for shares of the layers: what it tries, and that it keeps the best of it."""

import math

import pytest
import torch

from sensibert.allocation.allocate import allocate
from sensibert.allocation.search import search_shares
from sensibert.core.artifacts import Sensitivity
from sensibert.core.budget import Budget
from sensibert.models import layout_of
from tests.helpers import tiny_model


@pytest.fixture(scope="module")
def sensitivity():
    layout, generator = layout_of(tiny_model()), torch.Generator().manual_seed(0)
    scores = {site.name: torch.rand(site.units, generator=generator) for site in layout.sites}
    return Sensitivity(layout, scores, "fisher", 1)


def halved(scores):
    return allocate(scores, Budget.parse("50%params"), 4)


def first_ffn(plan):
    return int(plan.keep["layer.0.ffn"].sum())


def test_it_keeps_the_plan_with_the_lowest_loss_of_all_it_has_seen(sensitivity):
    seen = []

    def loss_of(plan):
        assert plan.params <= sensitivity.layout.encoder_params / 2
        seen.append((first_ffn(plan), plan))
        return seen[-1][0]

    best = search_shares(sensitivity, halved, loss_of, 30, seed=1)
    assert seen[0][1] == halved(sensitivity)
    assert first_ffn(best) == min(loss for loss, _ in seen) < seen[0][0]
    counts = {tuple(len(plan.kept(name)) for name in plan.keep) for _, plan in seen}
    assert len(counts) == len(seen) <= 31
    order = sensitivity.scores["layer.0.ffn"].argsort(descending=True)
    assert sorted(order[: first_ffn(best)].tolist()) == best.kept("layer.0.ffn").tolist()


def test_the_same_seed_finds_the_same_and_no_trial_changes_nothing(sensitivity):
    def tried(seed):
        seen = []
        search_shares(sensitivity, halved, lambda plan: seen.append(plan) or first_ffn(plan), 20, seed)
        return seen

    assert tried(3) == tried(3) != tried(4)
    assert search_shares(sensitivity, halved, lambda plan: 0.0, 0) == halved(sensitivity)


def test_a_loss_that_is_not_finite_never_wins(sensitivity):
    losses = iter([1.0] + [math.nan] * 50)
    assert search_shares(sensitivity, halved, lambda plan: next(losses), 10) == halved(sensitivity)
