"""The sampled loss: shapes, determinism, and labels that come from the model's own distribution."""

import pytest
import torch
import torch.nn.functional as F

from sensibert.core.errors import SensibertError
from sensibert.sensitivity import sampled_loss
from sensibert.sensitivity.sampled_loss import loss_of
from tests.helpers import tiny_batch, tiny_model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_gradient(logits, batch, name="logits", seed=0):
    logits = logits.clone().requires_grad_()
    loss = sampled_loss({name: logits}, batch, generator(seed))
    loss.backward()
    return loss.item(), logits.grad


def test_a_sure_model_draws_its_own_class():
    logits = torch.tensor([[50.0, 0.0, 0.0], [0.0, 0.0, 50.0]])
    loss, grad = loss_gradient(logits, {"labels": torch.tensor([1, 1])})
    assert loss < 1e-6 and grad.abs().max() < 1e-6  # against the gold labels both would be about 50


def test_classes_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([1.0, 2.0, 0.5]).log().expand(20_000, 3)
    _, grad = loss_gradient(logits, {"labels": torch.zeros(20_000, dtype=torch.long)})
    # gradient = (softmax - one-hot) / rows: its column sums vanish if and only if the shares agree
    assert grad.sum(0).abs().max() < 0.012  # three standard errors


def test_equal_generators_give_equal_losses_and_different_ones_do_not():
    logits, batch = torch.randn(64, 5), {"labels": torch.zeros(64, dtype=torch.long)}
    losses = [loss_gradient(logits, batch, seed=seed)[0] for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_regression_draws_around_the_prediction_with_unit_variance():
    logits = torch.linspace(-5, 5, 40_000)[:, None]
    loss, grad = loss_gradient(logits, {"labels": torch.zeros(40_000)})
    noise = -grad * 40_000  # prediction - target
    assert loss == pytest.approx(0.5, abs=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02) and float(noise.std()) == pytest.approx(1, abs=0.02)


def test_token_classification_draws_only_where_there_is_a_label():
    labels = torch.tensor([[-100, 1, 0, -100], [-100, 2, -100, -100]])
    _, grad = loss_gradient(torch.randn(2, 4, 3), {"labels": labels})
    assert torch.equal(grad.abs().sum(-1) > 0, labels != -100)


def test_labels_are_not_needed_to_draw_some():
    logits, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 1], [1, 0, 0]])
    _, grad = loss_gradient(logits, {"attention_mask": mask})
    assert torch.equal(grad.abs().sum(-1) > 0, mask.bool())
    with_labels = loss_gradient(logits[:, 0], {"labels": torch.tensor([0, 1])})[0]
    assert loss_gradient(logits[:, 0], {})[0] == with_labels


def test_no_labelled_token_is_a_loss_of_zero():
    loss, grad = loss_gradient(torch.randn(1, 3, 2), {"labels": torch.full((1, 3), -100)})
    assert loss == 0.0 and grad.abs().max() == 0.0


def test_question_answering_draws_both_ends_outside_the_padding():
    start, end = torch.zeros(500, 6, requires_grad=True), torch.zeros(500, 6, requires_grad=True)
    mask = torch.tensor([1, 1, 1, 1, 0, 0]).expand(500, 6)
    loss = sampled_loss({"start_logits": start, "end_logits": end}, {"attention_mask": mask}, generator())
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item())  # uniform over four tokens
    for grad in (start.grad, end.grad):
        assert grad[:, 4:].abs().max() == 0 and grad[:, :4].abs().min() > 0
    assert not torch.equal(start.grad, end.grad)


def test_half_precision_is_raised_to_float32():
    logits = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    loss = sampled_loss({"logits": logits}, {"labels": torch.zeros(4, dtype=torch.long)}, generator())
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


def test_nan_logits_give_a_nan_loss_that_can_be_named():
    loss = sampled_loss({"logits": torch.full((2, 3), torch.nan)}, {"labels": torch.zeros(2, dtype=torch.long)})
    assert loss.isnan()


def test_without_an_attention_mask_no_token_is_padding():
    logits = torch.randn(2, 3, 4)
    ids, mask = {"input_ids": torch.ones(2, 3)}, {"attention_mask": torch.ones(2, 3)}
    assert loss_gradient(logits, ids)[0] == loss_gradient(logits, mask)[0]
    ends = {"start_logits": logits[..., 0], "end_logits": logits[..., 1]}
    assert sampled_loss(ends, ids, generator()) == sampled_loss(ends, mask, generator())


def test_a_model_without_a_task_head_is_refused_in_words():
    with pytest.raises(
        SensibertError, match="returns last_hidden_state, pooler_output and no logits; want a model with a"
    ):
        sampled_loss({"last_hidden_state": torch.ones(2, 3, 4), "pooler_output": torch.ones(2, 4)}, {})


def binary_loss(model):
    return loss_of(model, sampled_loss)


def multi_label_model():
    return tiny_model(num_labels=3, problem_type="multi_label_classification")


def test_squared_gradients_of_independent_labels_estimate_the_curvature_of_the_training_loss():
    weight, x = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def training_loss(weight):
        return F.binary_cross_entropy_with_logits(weight.view(3, 4) @ x, torch.zeros(3, dtype=torch.float64))

    curvature = torch.autograd.functional.hessian(training_loss, weight.flatten()).diagonal()  # the same for all labels
    rows = 20_000
    logits = (weight.float() @ x.float()).expand(rows, 3).clone().requires_grad_()
    binary_loss(multi_label_model())({"logits": logits}, {}, generator()).backward()
    gradients = (rows * logits.grad)[:, :, None] * x.float()  # of the rows, [rows, 3, 4]
    assert gradients.square().mean(0).flatten().tolist() == pytest.approx(curvature.tolist(), rel=0.05)


def test_what_a_model_notes_in_its_first_pass_counts():
    model, batch = tiny_model(num_labels=3), tiny_batch() | {"labels": torch.zeros(3, 3)}
    loss = binary_loss(model)
    assert model.config.problem_type is None
    outputs = model(**batch)
    expected = binary_loss(multi_label_model())(outputs, batch, generator())
    assert torch.equal(loss(outputs, batch, generator()), expected)
    assert not torch.equal(sampled_loss(outputs, batch, generator()), expected)


@pytest.mark.parametrize(
    "outputs, message",
    [
        ((torch.ones(2, 3),), "the model returns a tuple, want a mapping with logits"),
        ({"logits": None}, "logits is None, want a tensor"),
        ({"logits": torch.ones(3)}, r"logits are \(3,\), want \[B, C\] or \[B, S, C\]"),
        ({"logits": torch.ones(1, 2, 3, 4)}, r"logits are \(1, 2, 3, 4\), want"),
    ],
)
def test_outputs_without_a_known_loss_are_named(outputs, message):
    for loss in (sampled_loss, binary_loss(multi_label_model())):
        with pytest.raises(SensibertError, match=message):
            loss(outputs, {})
