"""What a teacher adds to the loss, by hand, and the average of a student that teaches it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState

from sensibert.core.errors import SensibertError
from sensibert.data import get_task
from sensibert.inputs import load_teacher
from sensibert.run_options import Options
from sensibert.saving.folder import load
from sensibert.training.distillation import Average, Distillation, distillation_loss, hidden_loss
from tests.helpers import tiny_batch, tiny_model


def by_hand(student, teacher, temperature):
    """T^2 sum_c p_t (log p_t - log p_s), mean over rows, in float64."""
    p, q = ((logits.double() / temperature).softmax(-1) for logits in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()


@pytest.mark.parametrize("shape", [(5, 3), (4, 6, 3)], ids=["classes", "tags"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_divergence_of_softened_predictions(shape, temperature):
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    loss = distillation_loss({"logits": student, "loss": torch.tensor(9.0)}, {"logits": teacher}, temperature)
    torch.testing.assert_close(loss.double(), by_hand(student, teacher, temperature), rtol=1e-5, atol=1e-7)
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert float(distillation_loss({"logits": teacher}, {"logits": teacher}, temperature)) == pytest.approx(0, abs=1e-6)


def test_distillation_of_answers_is_the_mean_of_both_ends_and_of_numbers_the_squared_error():
    student, teacher = ({f"{end}_logits": torch.randn(4, 7) for end in ("start", "end")} for _ in range(2))
    wanted = sum(by_hand(student[name], teacher[name], 2.0) for name in student) / 2
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0).double(), wanted, rtol=1e-5, atol=1e-7)
    a, b = torch.randn(5, 1), torch.randn(5, 1)
    torch.testing.assert_close(distillation_loss({"logits": a}, {"logits": b}, 2.0), (a - b).square().mean())


def test_tokens_without_a_label_teach_nothing():
    outputs, target = ({"logits": torch.randn(2, 3, 4)} for _ in range(2))
    inputs = {"labels": torch.tensor([[1, 0, -100], [2, -100, -100]])}
    counted = inputs["labels"] != -100
    mixed = Distillation(1.0, 2.0).mix(torch.tensor(9.0), outputs, target, inputs, factor=1.0)
    wanted = by_hand(outputs["logits"][counted], target["logits"][counted], 2.0)
    torch.testing.assert_close(mixed.double(), wanted, rtol=1e-5, atol=1e-7)


def asked_of(folder, label_names, task="text-classification"):
    """What load_teacher looks at."""
    data = SimpleNamespace(task=get_task(task), num_labels=len(label_names), label_names=label_names)
    return Options(model="", output="", teacher=str(folder)), data, folder, load


def test_a_teacher_answers_in_the_order_of_the_classes_of_the_data(tmp_path):
    model, batch = tiny_model(num_labels=3), tiny_batch()
    model.config.id2label = {0: "Yes", 1: "no", 2: "perhaps"}
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(**batch).logits
        for names, order in ((["yes", "no", "perhaps"], [0, 1, 2]), (["no", "perhaps", "yes"], [1, 2, 0])):
            found = load_teacher(*asked_of(tmp_path, names))(**batch)["logits"]
            torch.testing.assert_close(found, logits[:, order])


def test_a_teacher_of_something_else_is_refused(tmp_path):
    tiny_model(num_labels=2).save_pretrained(tmp_path / "two")
    tiny_model(head="").save_pretrained(tmp_path / "bare")
    named = tiny_model(num_labels=2)
    named.config.id2label = {0: "yes", 1: "no"}
    named.save_pretrained(tmp_path / "named")
    assert (
        load_teacher(*asked_of(tmp_path / "two", ["good", "bad"])) is not None
    )  # it does not say what its classes are
    for folder, names, task, said in (
        ("two", ["a", "b", "c"], "text-classification", "with 2 outputs, want a model .* text-classification with 3"),
        ("two", ["a", "b"], "token-classification", "is a BertForSequenceClassification .* token-classification"),
        ("bare", ["a", "b"], "text-classification", "is a BertModel with 2 outputs, want a model fine-tuned"),
        ("named", ["a", "b"], "text-classification", "has the classes yes, no, want a, b"),
    ):
        with pytest.raises(SensibertError, match=said):
            load_teacher(*asked_of(tmp_path / folder, names, task))


def test_hidden_states_are_compared_layer_by_layer_where_there_are_tokens():
    student, teacher = ([torch.randn(2, 5, 8) for _ in range(4)] for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])

    def normal(states):
        centred = states.double() - states.double().mean(-1, keepdim=True)
        return centred / centred.square().mean(-1, keepdim=True).add(1e-5).sqrt()

    rows = [(normal(a) - normal(b)).square().mean(-1)[mask.bool()] for a, b in zip(student[1:], teacher[1:])]
    wanted = torch.stack(rows).mean()
    torch.testing.assert_close(hidden_loss(tuple(student), tuple(teacher), mask).double(), wanted, rtol=1e-5, atol=1e-7)
    unmasked = hidden_loss(tuple(student), tuple(teacher), None)
    torch.testing.assert_close(unmasked, hidden_loss(tuple(student), tuple(teacher), torch.ones_like(mask)))
    scaled = tuple(3 * states + 1 for states in student)
    assert float(hidden_loss(scaled, tuple(student), mask)) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("layers", "width"), [(3, 8), (4, 6)])
def test_a_teacher_of_another_shape_has_no_hidden_states_to_teach(layers, width):
    student, teacher = (torch.randn(1, 2, 8),) * 4, (torch.randn(1, 2, width),) * layers
    with pytest.raises(SensibertError, match=rf"layers 3 of 8 and {layers - 1} of {width}, want the same number"):
        hidden_loss(student, teacher, None)


def test_the_loss_is_mixed_by_weight_and_factor():
    outputs, target = ({"logits": torch.randn(3, 4), "hidden_states": (torch.randn(3, 2, 8),) * 2} for _ in range(2))
    loss, mask = torch.tensor(2.0), torch.ones(3, 2)
    logits = distillation_loss(outputs, target, 3.0)
    hidden = hidden_loss(outputs["hidden_states"], target["hidden_states"], mask)
    mixed = Distillation(0.4, 3.0, hidden=5.0).mix(loss, outputs, target, {"attention_mask": mask}, factor=0.5)
    torch.testing.assert_close(mixed, 0.8 * loss + 0.2 * logits + 2.5 * hidden)
    assert Distillation(0.4, 3.0).mix(loss, outputs, target, {"attention_mask": mask}, factor=0.0) == loss


def test_the_average_is_the_mean_at_first_and_then_forgets(tmp_path):
    args, state, control = type("", (), {"output_dir": str(tmp_path)}), TrainerState(max_steps=9), TrainerControl()
    student = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))
    average, seen, wanted = Average(begin=lambda total: total - 6, decay=0.75), [], None
    for step in range(1, 10):
        nn.init.normal_(student[0].weight)
        state.global_step = step
        average.on_step_end(args, state, control, model=student)
        if step < 3:
            assert average.teacher() is None
            continue
        seen.append(student[0].weight.detach().clone())
        wanted = torch.stack(seen).mean(0) if len(seen) <= 4 else 0.75 * wanted + 0.25 * seen[-1]
        torch.testing.assert_close(average.teacher()[0].weight, wanted)
    assert student.training and not average.teacher()[1].training and student[0].weight.requires_grad
    (tmp_path / "checkpoint-9").mkdir()
    average.on_save(args, state, control)
    again = Average(begin=lambda total: total - 6, decay=0.75)
    again.on_train_begin(args, state, control, model=student)
    for one in (average, again):
        one.on_step_end(args, state, control, model=student)
    assert torch.equal(average.teacher()[0].weight, again.teacher()[0].weight)
