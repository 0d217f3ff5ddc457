"""The rank bench: its gradients, its predictions and its measurements on a tiny model."""

import copy

import bench_rank as bench
import pytest
import torch
import torch.nn.functional as F

from sensibert.core.artifacts import UnitPlan
from sensibert.core.budget import Budget
from sensibert.models import layout_of
from sensibert.sensitivity import sampled_loss
from sensibert.sensitivity.analyze import analyze
from sensibert.sensitivity.kfac_obs import collect_factors
from sensibert.trimming.compensate import compensate
from sensibert.trimming.trim import trim
from tests.helpers import tiny_batch, tiny_model


@pytest.fixture
def model():
    return tiny_model("bert")


def batches():
    return [tiny_batch(seed=seed) | {"labels": torch.tensor([0, 1, seed])} for seed in range(2)]


def one_by_one():
    for batch in batches():
        for row in range(len(batch["labels"])):
            yield {name: value[row : row + 1] for name, value in batch.items()}


def test_gate_gradients_of_a_batch_are_those_of_its_samples_alone(model):
    """analyze gets at them through the weight gradients, one sample at a time."""
    layout = layout_of(model)
    actual = bench.gate_gradients(model, layout, batches(), sampled=False)
    shipped = analyze(model, one_by_one(), "taylor").scores
    for site in layout.sites:
        assert actual[site.name].shape == (6, site.units)
        torch.testing.assert_close(actual[site.name].abs().sum(0), shipped[site.name], rtol=1e-4, atol=1e-7)


def test_sampled_labels_are_those_of_the_seed_and_differ_from_the_given(model):
    layout = layout_of(model)
    first, again, other, given = (
        bench.gate_gradients(model, layout, batches(), sampled, seed)["layer.0.ffn"]
        for sampled, seed in ((True, 0), (True, 0), (True, 5), (False, 0))
    )
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, given)


def test_the_loss_falls_as_the_slope_says_when_little_is_removed(model):
    """All gates of a site a hundredth lower: its consuming weight a hundredth smaller."""
    layout, step = layout_of(model), 1e-2
    site = layout.site("layer.1.ffn")
    gradients = bench.gate_gradients(model, layout, batches(), sampled=False)
    drop = bench.Drop(site.name, site.kind, 1.0, torch.arange(site.units))
    before = bench.losses_of(model, batches()).mean()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight *= 1 - step
    change = float(bench.losses_of(model, batches()).mean() - before)
    assert change == pytest.approx(bench.slope(gradients)(drop) * step, rel=0.05, abs=1e-6)
    assert bench.plus(bench.slope(gradients), bench.alone(gradients), 2.0)(drop) == pytest.approx(
        bench.slope(gradients)(drop) + 2 * bench.alone(gradients)(drop)
    )


def test_units_that_cancel_are_worth_nothing_together():
    gradients = {"s": torch.tensor([[1.0, -1.0, 2.0], [-3.0, 3.0, 0.0]])}
    drop = bench.Drop("s", "ffn", 0.5, torch.tensor([0, 1]))
    assert bench.together(gradients)(drop) == 0 and bench.alone(gradients)(drop) == (2 + 18) / 4
    assert bench.grouped(gradients["s"], 2).tolist() == [[-1.0, 1.0, 1.0]]


def test_each_site_loses_its_lowest_units_and_the_measurement_is_the_masked_models(model):
    layout = layout_of(model)
    scores = {site.name: torch.arange(site.units, 0, -1).float() for site in layout.sites}
    expected = bench.drops(layout, scores)
    assert [(drop.site, len(drop.units)) for drop in expected[:5]] == [
        *(("layer.0.head", count) for count in (1, 2, 3, 4)),
        ("layer.0.ffn", 16),
    ]
    assert expected[1].units.tolist() == [3, 2]
    above = next(drop for drop in expected if drop.site == "layer.1.head" and drop.share == 0.5)
    actual = bench.measured(model, layout, [above, expected[1]], batches()).mean(1).tolist()
    before = float(bench.losses_of(model, batches()).mean())
    with torch.no_grad():
        weight = model.bert.encoder.layer[1].attention.output.dense.weight
        old = weight.clone()
        weight[:, 16:] = 0
        assert actual[0] == pytest.approx(float(bench.losses_of(model, batches()).mean()) - before, abs=1e-6)
        weight.copy_(old)
        model.bert.encoder.layer[0].attention.output.dense.weight[:, 16:] = 0
        after = sum(
            float(F.cross_entropy(model(**{k: v for k, v in b.items() if k != "labels"}).logits, b["labels"]))
            for b in batches()
        )
    assert actual[1] == pytest.approx(after / 2 - before, abs=1e-6)


def test_with_moments_the_kept_units_take_over_for_as_long_as_it_takes(model):
    layout = layout_of(model)
    factors = collect_factors(model, layout, batches(), sampled_loss)
    drop = bench.Drop("layer.1.ffn", "ffn", 0.5, torch.arange(32))
    before = copy.deepcopy(model.state_dict())
    plain, helped = (bench.measured(model, layout, [drop], batches(), m)[0] for m in (None, factors))
    assert not torch.allclose(plain, helped)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    keep = {site.name: torch.ones(site.units, dtype=torch.bool) for site in layout.sites}
    keep["layer.1.ffn"][:32] = False
    dense = bench.losses_of(model, batches())
    plan = UnitPlan(layout, keep, Budget.parse("50%params"), "test")
    compensate(model, plan, factors)
    torch.testing.assert_close(bench.losses_of(trim(model, plan), batches()) - dense, helped, atol=1e-5, rtol=1e-4)


def test_all_predictors_become_rows_and_the_best_is_drawn_beside_ours(tmp_path, monkeypatch):
    rows = {}
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "record", lambda name, case, metric, value, unit, **rival: rows.update({case: value}))
    drop = [bench.Drop("s", kind, share, torch.arange(2)) for kind in ("head", "ffn") for share in bench.SHARES]
    by_row = torch.arange(8.0)[:, None] + torch.tensor([0.0, 1.0, 5.0, 9.0])
    place = {id(one): float(number) for number, one in enumerate(drop)}
    actual = {
        "fisher": lambda drop: drop.share,
        "worse": lambda drop: -drop.share,
        "best": lambda drop: place[id(drop)],
    }
    bench.report("toy seed 1", drop, by_row, actual)
    assert rows["toy seed 1 best"] == rows["toy seed 1 measured on the other half of the rows"] == pytest.approx(1)
    assert rows["toy seed 1 worse"] == -rows["toy seed 1 fisher"] < 0
    assert (tmp_path / "bench_rank_toy_seed_1.png").stat().st_size > 1000
