"""The rivals choose as they would on their own, and land at the budget."""

import copy

import pytest
import torch
from rivals import Layers, TorchPruning

from sensibert.core.budget import Budget
from sensibert.core.cost import counts_of, limit, params
from sensibert.models import layout_of
from sensibert.saving.folder import export, load
from sensibert.trimming.trim import trim
from tests.helpers import tiny_batch, tiny_model
from tests.runs import model_folder

SIZES = {"hidden_size": 32, "intermediate_size": 256, "num_attention_heads": 8}


def batches(count=3):
    return [tiny_batch(seed=seed) | {"labels": torch.tensor([0, 1, seed % 2])} for seed in range(count)]


def layer_model(depth, **config):
    return tiny_model("bert", num_hidden_layers=depth, **config)


@pytest.mark.parametrize("share, kept", [(50, 3), (30, 2), (75, 4), (20, 1), (5, 1), (100, 6)])
def test_layers_keeps_the_lowest_that_fit_or_the_nearest_number(share, kept):
    model = layer_model(6)
    plan = Layers()(model, (), Budget.parse(f"{share}%params"))
    stays = {site.layer for site in plan.layout.sites if plan.keep[site.name].any()}
    assert stays == set(range(kept)) and all(plan.keep[s.name].all() for s in plan.layout.sites if s.layer in stays)


def test_a_shallow_folder_is_the_model_that_was_trained(tmp_path):
    model, tokenizer = load(model_folder(tmp_path / "model", head="SequenceClassification", num_hidden_layers=4))
    layers, before, batch = Layers(), layout_of(model).encoder_params, tiny_batch()
    trim(model, layers(model, (), Budget.parse("50%params")))
    export(model, tmp_path / "out", tokenizer)
    with torch.no_grad():
        trained = model(**batch).logits
        assert layers.finish(tmp_path / "out") == before // 2
        shallow = load(tmp_path / "out")[0]
        assert torch.equal(shallow(**batch).logits, trained)
    assert shallow.config.num_hidden_layers == len(shallow.bert.encoder.layer) == 2


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_torch_pruning_lands_just_below_the_budget_and_leaves_the_model_alone(importance):
    pytest.importorskip("torch_pruning")
    model = layer_model(2, **SIZES).train()
    before, layout = copy.deepcopy(model.state_dict()), layout_of(model)
    for share in (75, 50, 30):
        budget = Budget.parse(f"{share}%params")
        plan = TorchPruning(importance, step=8)(model, batches(), budget)
        counts, cheapest = counts_of(layout, plan.keep), min(8 * site.params for site in layout.sites)
        assert 0 <= limit(layout, budget) - params(layout, counts) < cheapest
        assert all(counts[site.name] % 8 == 0 for site in layout.sites if site.kind == "ffn")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    trim(model, plan)


@pytest.mark.parametrize("importance", ["GroupTaylorImportance", "GroupMagnitudeImportance"])
def test_simulated_counts_are_those_of_a_pruning_step(importance):
    tp = pytest.importorskip("torch_pruning")
    from rivals import Simulated, _accumulate_gradients

    model = layer_model(2, **SIZES)
    _accumulate_gradients(model, batches())
    pruner = Simulated(tp, model, layout_of(model), getattr(tp.importance, importance)())
    counts = pruner.counts(0.6)
    assert pruner.counts(0.3) != counts and pruner.counts(0.6) == counts  # counts() changes no state
    assert sum(counts[f"layer.{n}.head"] for n in (0, 1)) == 6  # int(16 * 0.4), whichever layers they are in
    pruner.pruner.current_step, pruner.pruner.num_heads = 0, dict(pruner.heads)
    pruner.pruner.out_channel_groups.update(pruner.heads)
    pruner.pruner.per_step_pruning_ratio = pruner.pruner.per_step_head_pruning_ratio = [0.0, 0.6]
    weights = [layer.intermediate.dense.weight.detach().clone() for layer in model.bert.encoder.layer]
    pruner.pruner.step()
    for number, (layer, weight) in enumerate(zip(model.bert.encoder.layer, weights, strict=True)):
        assert layer.intermediate.dense.out_features == counts[f"layer.{number}.ffn"]
        assert layer.attention.output.dense.in_features == 4 * counts[f"layer.{number}.head"]
        best = pruner.importance[f"layer.{number}.ffn"].argsort(descending=True)[: counts[f"layer.{number}.ffn"]]
        assert torch.equal(layer.intermediate.dense.weight, weight[best.sort().values])
