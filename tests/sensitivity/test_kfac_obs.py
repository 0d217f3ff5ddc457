"""Factors that do not depend on how rows are batched, and the scores made of them."""

import copy

import pytest
import torch

from sensibert.allocation.allocate import allocate
from sensibert.core.artifacts import Sensitivity
from sensibert.core.budget import Budget
from sensibert.core.errors import SensibertError
from sensibert.models import layout_of
from sensibert.sensitivity import sampled_loss
from sensibert.sensitivity.analyze import analyze
from sensibert.sensitivity.gradients import given_loss, model_loss
from sensibert.sensitivity.kfac_obs import FisherFactors, collect_factors, inner
from sensibert.sensitivity.sampled_loss import loss_of
from tests.helpers import tiny_batch, tiny_model
from tests.sensitivity.test_removal import Counting


@pytest.mark.parametrize("labelled", [True, False])
def test_obs_predicts_the_rise_of_the_loss_with_a_slope_where_there_are_labels(labelled, tmp_path):
    model = tiny_model().requires_grad_(True)
    batches = [{name: value for name, value in row.items() if labelled or name != "labels"} for row in rows(3)]

    def drawn(outputs, batch, generator):  # that of the library looks at the labels to know their kind
        return torch.nn.functional.cross_entropy(outputs.logits, batch["input_ids"][:, 1] % 2)

    actual = analyze(model, batches, "obs", drawn)
    gates = analyze(model, rows(1), "fisher", drawn).scores
    assert actual.curves.keys() == actual.scores.keys()
    actual.save(tmp_path / "s")
    assert Sensitivity.load(tmp_path / "s") == actual
    site = actual.layout.site("layer.1.ffn")
    order = actual.scores[site.name].argsort()
    sums = (actual.scores[site.name] + 0.5 * gates[site.name])[order].double().cumsum(0) / 6
    predicted = [actual.predicted_rise(site.name, gone) for gone in (0, 32, 64)]
    quadratic = [0.0, float(sums[31]), float(sums[63])]
    assert (predicted == pytest.approx(quadratic, rel=1e-4, abs=0)) is not labelled
    assert actual.predicted_rise(site.name, 8) == pytest.approx(actual.predicted_rise(site.name, 16) / 2)
    with pytest.raises(SensibertError, match="gone is 65, want 0 to 64 units of layer.1.ffn"):
        actual.predicted_rise(site.name, 65)
    with pytest.raises(SensibertError, match="site is 'x', want one of layer.0.head, "):
        actual.predicted_rise("x", 0)
    plain = analyze(model, batches, "magnitude")
    with pytest.raises(SensibertError, match="want a sensitivity of method obs"):
        plain.predicted_rise(site.name, 0)


@pytest.mark.parametrize("masked", [True, False])
def test_without_a_loss_every_token_counts_the_same_but_padding_does_not(masked):
    model, calls = tiny_model(), []
    batch = tiny_batch(3, 7)
    batch["attention_mask"][1, 4:] = 0
    batch = batch if masked else {name: value for name, value in batch.items() if name != "attention_mask"}
    consumer = model.bert.encoder.layer[1].output.dense
    handle = consumer.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    model.eval()(**batch)
    handle.remove()
    actual = collect_factors(model, layout_of(model), [batch], None)["encoder.layer.1.output.dense.weight"]
    real = batch["attention_mask"].bool() if masked else torch.ones(3, 7, dtype=torch.bool)
    h = calls[0][real].detach()
    torch.testing.assert_close(actual.second, h.T @ h)
    torch.testing.assert_close(actual.first, h.sum(0))
    assert actual.weight == len(h) and torch.equal(actual.output, len(h) * torch.eye(len(actual.output)))
    assert not actual.slope.any() and actual.samples == 3


def test_layer_obs_needs_neither_labels_nor_gradients():
    model = tiny_model().requires_grad_(False)
    actual = analyze(model, [tiny_batch(3, 7)], "layer-obs")
    assert actual.statistic == "layer-obs" and actual.samples == 3 and not actual.curves
    assert all(score.isfinite().all() and (score > 0).any() for score in actual.scores.values())


def test_slopes_are_the_gradients_of_weight_and_bias():
    model, whole = tiny_model().eval(), next(rows(6))
    actual = collect_factors(model, layout_of(model), rows(3), sampled_loss)
    linear = model.bert.encoder.layer[0].output.dense
    expected = torch.autograd.grad(model(**whole).loss * 6, (linear.weight, linear.bias))
    factors = actual["encoder.layer.0.output.dense.weight"]
    torch.testing.assert_close(factors.slope, expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(factors.bias_slope, expected[1], rtol=1e-4, atol=1e-6)


def rows(size, count=6):
    whole = {**tiny_batch(count, 7), "labels": torch.arange(count) % 2}
    whole["attention_mask"][:] = 1
    for begin in range(0, count, size):
        yield {name: value[begin : begin + size] for name, value in whole.items()}


@pytest.mark.parametrize("family", ["bert", "modernbert", "albert"])
def test_moments_do_not_depend_on_the_size_of_a_batch(family):
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    all_at_once, by_two = (collect_factors(model, layout_of(model), rows(size), given_loss) for size in (6, 2))
    for name, factors in by_two.items():
        assert factors.samples == 6
        for field in ("weight", "first", "second", "output"):
            expected = getattr(all_at_once[name], field)
            torch.testing.assert_close(
                getattr(factors, field), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max())
            )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def ragged(size, head, count=18):
    """Rows of 3 to 12 tokens in batches of `size`, each padded to its own longest row."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 13, (count,), generator=generator)
    ids = torch.randint(5, 64, (count, 12), generator=generator)
    labels = torch.randint(3, (count, 12), generator=generator)
    labels[torch.rand(count, 12, generator=generator) < 0.4] = -100
    for begin in range(0, count, size):
        rows = slice(begin, begin + size)
        longest = int(lengths[rows].max())
        mask = (torch.arange(longest) < lengths[rows, None]).long()
        batch = {"input_ids": ids[rows, :longest] * mask, "attention_mask": mask}
        if head == "TokenClassification":
            batch["labels"] = labels[rows, :longest].masked_fill(mask == 0, -100)
        elif head == "QuestionAnswering":
            batch |= {"start_positions": lengths[rows] // 3, "end_positions": lengths[rows] // 2}
        else:
            batch["labels"] = labels[rows, 0].clamp(min=0)
        yield batch


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_no_sum_depends_on_batches_or_padding(head):
    """Neither do the drawn labels, so processes with smaller batches choose the same units."""
    model = tiny_model(head=head, num_labels=2 if head == "QuestionAnswering" else 3).double().eval()
    at_once, by_four = (collect_factors(model, layout_of(model), ragged(n, head), sampled_loss, 3) for n in (18, 4))
    for name, factors in by_four.items():
        for actual, expected in zip(factors._sums(), at_once[name]._sums(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


def test_an_answer_within_the_padding_is_finite_and_one_outside_does_not_count():
    start, end = torch.randn(2, 4), torch.randn(2, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    batch = {"attention_mask": mask, "start_positions": torch.tensor([3, 9]), "end_positions": torch.tensor([[1], [2]])}
    actual = model_loss({"loss": torch.ones(()), "start_logits": start, "end_logits": end}, batch)
    of_start = start[0, [0, 1, 3]].logsumexp(0) - start[0, 3]
    of_end = (end[0, :2].logsumexp(0) - end[0, 1] + end[1].logsumexp(0) - end[1, 2]) / 2
    torch.testing.assert_close(actual, (of_start + of_end) / 2)


def test_obs_scores_every_unit_and_can_be_allocated():
    model = tiny_model()
    actual = analyze(model, rows(3), "obs", sampled_loss)
    assert actual.samples == 6 and actual.statistic == "obs"
    assert all(score.isfinite().all() and (score >= 0).all() for score in actual.scores.values())
    plan = allocate(actual, Budget.parse("50%params"), width_multiple=1)
    assert plan.params <= 0.5 * actual.layout.encoder_params


def test_wide_layers_are_added_up_in_panels_and_in_half_precision_too():
    """A width of 300 has panels, the last of them smaller."""
    config = {"intermediate_size": 300, "num_attention_heads": 2}
    model = tiny_model(**config).eval()
    name, calls = "encoder.layer.0.output.dense.weight", []
    linear = model.bert.encoder.layer[0].output.dense
    linear.register_forward_pre_hook(lambda module, args: calls.append(args[0].detach().flatten(0, 1)))
    actual = collect_factors(model, layout_of(model), rows(3), None)[name]
    h = torch.cat(calls)
    torch.testing.assert_close(actual.second, h.T @ h)
    assert torch.equal(actual.second, actual.second.T)
    scores = analyze(model, rows(3), "obs", sampled_loss).scores
    half = analyze(tiny_model(**config).bfloat16(), rows(3), "obs", sampled_loss).scores
    for site, expected in scores.items():
        assert half[site].isfinite().all() and torch.corrcoef(torch.stack([expected, half[site]]))[0, 1] > 0.95


def test_sums_of_half_precision_inputs_are_in_single_precision():
    """Rounded to bf16 once a batch they would be off by 0.4 %, and C would have negative eigenvalues."""
    generator, factors = torch.Generator().manual_seed(0), FisherFactors(300, 8, torch.device("cpu"))
    h, delta = (torch.randn(64, size, generator=generator).bfloat16() for size in (300, 8))
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    before = getattr(settings, "fp32_precision", None)
    for tokens in range(0, 64, 16):
        factors.add(h[tokens : tokens + 16], delta[tokens : tokens + 16])
    factors.complete()
    assert getattr(settings, "fp32_precision", None) == before
    h, a = h.double(), delta.double().square().sum(1, keepdim=True)
    torch.testing.assert_close(factors.output.double(), delta.double().T @ delta.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(factors.second.double(), h.T @ (a * h), rtol=1e-2, atol=1.0)
    assert torch.linalg.eigvalsh(inner([factors], True, 1e-3)[1][0]).min() > 0


def test_means_in_autocast_are_in_single_precision():
    """In bf16 they would be off by 0.2 %: inputs that hardly vary would then have a C with negative eigenvalues."""
    generator, factors = torch.Generator().manual_seed(0), FisherFactors(40, 8, torch.device("cpu"))
    h = (torch.randn(1, 40, generator=generator) + 0.05 * torch.randn(64, 40, generator=generator)).bfloat16()
    delta = torch.randn(64, 8, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        factors.add(h, delta)
    factors.complete()
    root = delta.double().square().sum(1, keepdim=True).sqrt()
    rounded = (root.float() * h).bfloat16().double()  # as in `second`
    torch.testing.assert_close(factors.first.double(), (root * rounded).sum(0), rtol=1e-5, atol=1e-5)
    mean, C = (part[0] for part in inner([factors], True, 0.0))
    assert torch.linalg.eigvalsh(C).min() > -1e-5 * C.diagonal().max()


def counted(function):
    with Counting() as counting:
        function()
    return counting


def test_sums_launch_little_beside_the_passes_and_read_nothing_from_the_device():
    """Layers are added up together: six add little more than two. What they add is above all stacking."""
    batches, ops = list(rows(2, 8)), {}
    for layers in (2, 6):
        model = tiny_model(num_hidden_layers=layers).eval()
        layout = layout_of(model)
        weights = [model.bert.embeddings.LayerNorm.weight]

        def passes(model=model, weights=weights):
            for batch in batches:
                outputs = model(**batch)
                torch.autograd.grad(outputs.loss, weights, retain_graph=True)
                torch.autograd.grad(sampled_loss(outputs, batch, torch.Generator()), weights)

        alone = counted(passes)
        ours = counted(lambda: collect_factors(model, layout, batches, sampled_loss))  # noqa: B023
        ops[layers] = (ours.launched - alone.launched) / len(batches)
        assert ours.read == alone.read
    assert ops[2] <= 50 and ops[6] <= ops[2] + 20


def test_no_data_and_a_loss_that_is_not_finite_are_refused():
    model = tiny_model()
    with pytest.raises(SensibertError, match="batches is empty, want at least one micro-batch"):
        collect_factors(model, layout_of(model), [], sampled_loss)
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    with pytest.raises(SensibertError, match="the loss after 0 samples is nan, want a finite number"):
        collect_factors(model, layout_of(model), rows(3), sampled_loss)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("method", ["obs", "fisher"])
def test_binary_cross_entropy_draws_zeros_and_ones(labels, method):
    """A model that is sure of its answer has nothing to lose, as with classes; a Gaussian would add its noise."""
    batch, scores = tiny_batch(4, 7), {}
    for problem in ("regression", "multi_label_classification"):
        model = tiny_model(num_labels=labels, problem_type=problem)
        torch.nn.init.constant_(model.classifier.bias, 25.0)
        found = analyze(model, [{**batch, "labels": torch.ones(4, labels)}], method).scores
        scores[problem] = max(float(score.max()) for score in found.values())
    assert scores["multi_label_classification"] < 1e-6 * scores["regression"]


def test_zeros_and_ones_are_drawn_as_often_as_they_are_likely():
    model = tiny_model(num_labels=2, problem_type="multi_label_classification")
    logits = torch.tensor([0.2, 0.9]).logit().expand(20_000, 2).clone().requires_grad_()
    loss = loss_of(model, sampled_loss)({"logits": logits}, {}, torch.Generator().manual_seed(0))
    loss.backward()
    # gradient ~ probability - label: its column sums vanish if and only if the shares agree
    assert logits.grad.sum(0).abs().max() < 0.005 * 2**0.5 and logits.grad.unique().numel() == 4
    assert loss_of(model, given_loss) is given_loss
