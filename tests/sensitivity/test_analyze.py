"""Scores against explicit gates and hand-made sums; and analysis leaves no trace in the model."""

import copy

import pytest
import torch

from sensibert.core.artifacts import UnitPlan
from sensibert.core.budget import Budget
from sensibert.core.errors import SensibertError
from sensibert.core.grid import Grid
from sensibert.core.statistics import STATISTICS
from sensibert.models import base_of, layout_of
from sensibert.models.modules import attribute
from sensibert.sensitivity import sampled_loss
from sensibert.sensitivity.analyze import analyze
from sensibert.sensitivity.gradients import given_loss
from sensibert.sensitivity.ranking import rank_tensors
from sensibert.trimming.trim import trim
from tests.helpers import tiny_batch, tiny_model

FAMILIES = ["bert", "modernbert", "albert"]  # separate layers, fused projections, one layer shared by all


def batches(count=3, size=2, seed=0):
    for number in range(count):
        batch = tiny_batch(size, 7, seed=seed + number)
        yield {**batch, "labels": torch.arange(size) % 2}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def gate_gradients(model, loss, seed=0):
    """dL/dm of a gate m = 1 on every unit's activation, one dict a micro-batch: the definition itself."""
    layout, generator = layout_of(model), torch.Generator().manual_seed(seed)
    gates = {site.name: torch.ones(site.units, dtype=torch.float64, requires_grad=True) for site in layout.sites}
    handles = []
    for site in layout.sites:
        consumer = attribute(base_of(model), site.consumer.parameter.removesuffix(".weight"))
        gate = gates[site.name].repeat_interleave(site.consumer.span)
        handles.append(consumer.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate, *args[1:])))
    actual = []
    for batch in batches():
        grads = torch.autograd.grad(
            loss(model(**batch), batch, generator), list(gates.values()), retain_graph=True, allow_unused=True
        )
        actual.append(dict(zip(gates, grads, strict=True)))
    for handle in handles:
        handle.remove()
    return actual


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_and_taylor_are_those_of_explicit_gates(family):
    model = tiny_model(family).double()
    fisher, taylor = analyze(model, batches(), "fisher", sampled_loss), analyze(model, batches(), "taylor")
    drawn, given = gate_gradients(model, sampled_loss), gate_gradients(model, given_loss)
    assert fisher.samples == taylor.samples == 6
    for site in fisher.layout.sites:
        square = sum(batch[site.name] ** 2 for batch in drawn)
        absolute = sum(batch[site.name].abs() for batch in given)
        torch.testing.assert_close(fisher.scores[site.name].double(), square, rtol=1e-5, atol=0)
        torch.testing.assert_close(taylor.scores[site.name].double(), absolute, rtol=1e-5, atol=0)
        assert absolute.min() > 0


def sums_over_members(model, values):
    """values: parameter name -> tensor; their sum over every member of each unit."""
    actual = {}
    for site in layout_of(model).sites:
        of_unit = [
            sum(
                values[m.parameter].index_select(m.dim, m.index(torch.tensor([j]), site.units)).sum()
                for m in site.members
            )
            for j in range(site.units)
        ]
        actual[site.name] = torch.stack(of_unit)
    return actual


@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_and_magnitude_are_sums_over_all_members(family):
    model = tiny_model(family).double()
    parameters = dict(base_of(model).named_parameters())
    saliency = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for batch in batches():
        grads = torch.autograd.grad(
            model(**batch).loss, list(parameters.values()), materialize_grads=True, allow_unused=True
        )
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            saliency[name] += (parameter * grad).abs().detach()
    squares = {name: p.detach().square() for name, p in parameters.items()}
    for statistic, values in (("saliency", saliency), ("magnitude", squares)):
        scores = analyze(model, batches(), statistic).scores
        for name, expected in sums_over_members(model, values).items():
            torch.testing.assert_close(scores[name].double(), expected, rtol=1e-5, atol=0)


def test_tensors_are_ranked_by_their_mean_product(model):
    expected = {}
    for site in layout_of(model).sites:
        expected |= {m.parameter: 0.0 for m in site.members if m.parameter.endswith("weight")}
    parameters = dict(base_of(model).named_parameters())
    for batch in batches():
        grads = torch.autograd.grad(model(**batch).loss, [parameters[name] for name in expected])
        for name, grad in zip(expected, grads, strict=True):
            expected[name] += float((parameters[name] * grad).abs().mean().detach()) / 3
    actual = rank_tensors(model, batches())
    assert list(actual) == sorted(actual, key=lambda name: -actual[name])
    assert actual == pytest.approx(expected, rel=1e-4)
    drawn = [rank_tensors(model, batches(), sampled_loss, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("statistic", ["random", "fisher"])
def test_chance_is_reproducible_by_seed(model, statistic):
    first, again, other = (analyze(model, batches(), statistic, sampled_loss, seed) for seed in (1, 1, 2))
    assert first == again
    assert any(not torch.equal(first.scores[name], other.scores[name]) for name in first.scores)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_analysis_leaves_no_trace(statistic):
    model = tiny_model().train()
    base_of(model).embeddings.eval()  # frozen on purpose
    base_of(model).encoder.layer[0].output.dense.weight.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    before, hooks = copy.deepcopy(model), sum(len(m._forward_pre_hooks) for m in model.modules())
    random = torch.get_rng_state()
    scores = analyze(model, batches(), statistic, sampled_loss)
    if STATISTICS[statistic].data:
        rank_tensors(model, batches(), sampled_loss)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then) and now.requires_grad == then.requires_grad, name
        assert (now.grad is None) == (name != "classifier.weight"), name
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert all(values.shape == (site.units,) for site, values in zip(scores.layout.sites, scores.scores.values()))
    assert scores.scores["layer.0.ffn"].min() >= 0 and scores.scores["layer.0.ffn"].max() > 0  # frozen or not


def test_dropout_is_off_while_scores_are_taken():
    model = tiny_model(hidden_dropout_prob=0.5).train()
    assert analyze(model, batches(), "taylor") == analyze(model, batches(), "taylor")


@pytest.mark.parametrize("statistic", ["fisher", "taylor", "saliency", "soft_gates"])
def test_a_unit_that_does_nothing_scores_lowest(statistic):
    model = tiny_model(initializer_range=0.3)  # so that the loss outweighs the penalty on the gates
    layer = base_of(model).encoder.layer[0]
    with torch.no_grad():
        layer.output.dense.weight[:, 5] = 0
        layer.attention.output.dense.weight[:, 8:16] = 0  # head 1 of span 8
        if statistic == "saliency":  # it counts the producing weights too
            for linear, rows in ((layer.intermediate.dense, slice(5, 6)), (layer.attention.self.value, slice(8, 16))):
                linear.weight[rows], linear.bias[rows] = 0, 0
            for linear in (layer.attention.self.query, layer.attention.self.key):
                linear.weight[8:16], linear.bias[8:16] = 0, 0
        batch = tiny_batch()
        batch["labels"] = model(**batch).logits.argmax(-1)  # what the units say is right
    scores = analyze(model, [batch] * 6, statistic, sampled_loss).scores
    for site, unit in (("layer.0.ffn", 5), ("layer.0.head", 1)):
        if statistic == "soft_gates":  # the penalty alone: it falls as fast as Adam goes
            assert scores[site][unit] == pytest.approx(1 - 6 * 0.02, abs=1e-3)
            assert scores[site][unit] < scores[site].min() + 0.01 < scores[site].max() - 0.05
        else:
            assert scores[site][unit] == 0 < scores[site].sum()


def test_soft_gates_move_with_the_loss(model):
    """One step of Adam is 0.02 towards what the sign of loss + penalty says."""
    scores = analyze(model, list(batches(1)), "soft_gates").scores
    grads = gate_gradients(copy.deepcopy(model).double(), given_loss)[0]
    total = sum(len(values) for values in scores.values())
    for name, gates in scores.items():
        expected = 1 - 0.02 * torch.sign(grads[name] + 0.5 / total)
        torch.testing.assert_close(gates.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_layer_without_units_has_no_scores(statistic):
    model = tiny_model()
    layout = layout_of(model)
    keep = {site.name: torch.arange(site.units) % 2 == 0 for site in layout.sites}
    keep["layer.0.head"][:] = False
    keep["layer.1.ffn"][:] = False
    trim(model, UnitPlan(layout, keep, Budget.parse("50%params"), "random"))
    scores = analyze(model, batches(), statistic, sampled_loss).scores
    sizes = {name: len(values) for name, values in scores.items()}
    assert sizes == {"layer.0.head": 0, "layer.0.ffn": 32, "layer.1.head": 2, "layer.1.ffn": 0}
    assert all(values.isfinite().all() for values in scores.values())


def test_mixed_precision_changes_little(model):
    exact, mixed = (analyze(model, batches(), "taylor", autocast=dtype) for dtype in (None, torch.bfloat16))
    a, b = (torch.cat(list(actual.scores.values())) for actual in (exact, mixed))
    assert not torch.equal(a, b) and torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98


def test_what_cannot_be_scored_is_said(model):
    with pytest.raises(SensibertError, match="method is 'best', want one of obs, layer-obs, fisher"):
        analyze(model, batches(), "best")
    assert analyze(model, batches()).statistic == "obs"  # of a run too; blocks of a grid: fisher
    assert analyze(model, batches(), grid=Grid.element()).statistic == "fisher"
    assert analyze(model, batches(), seed=3) == analyze(model, batches(), "obs", sampled_loss, 3)
    with pytest.raises(SensibertError, match="method 'soft_gates' scores whole units, want another with a grid"):
        analyze(model, batches(), "paper", grid=Grid.element())
    for statistic in ("taylor", "soft_gates"):
        with pytest.raises(SensibertError, match="batches is empty, want at least one"):
            analyze(model, (), statistic)
        with pytest.raises(SensibertError, match="returned no loss, want labels in the batch"):
            analyze(model, [tiny_batch()], statistic)
    with pytest.raises(SensibertError, match="batches is empty"):
        rank_tensors(model, ())
    broken = copy.deepcopy(model)
    broken.classifier.bias.data[0] = float("nan")
    for statistic in ("fisher", "taylor", "soft_gates"):
        with pytest.raises(SensibertError, match="the loss after 0 samples is nan, want a finite number"):
            analyze(broken, batches(), statistic, sampled_loss)
    assert not broken.training and not any(m._forward_pre_hooks for m in broken.modules())
