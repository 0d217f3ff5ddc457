"""What a teacher adds to the loss, by hand, and which models may teach."""

from types import SimpleNamespace

import pytest
import torch

from sensibert.core.errors import SensibertError
from sensibert.data.tasks import get_task
from sensibert.inputs import load_teacher
from sensibert.run_options import Options
from sensibert.training.distillation import Distillation, distillation_loss
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
    expected = sum(by_hand(student[name], teacher[name], 2.0) for name in student) / 2
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0).double(), expected, rtol=1e-5, atol=1e-7)
    a, b = torch.randn(5, 1), torch.randn(5, 1)
    torch.testing.assert_close(distillation_loss({"logits": a}, {"logits": b}, 2.0), (a - b).square().mean())


def test_tokens_without_a_label_teach_nothing():
    outputs, target = ({"logits": torch.randn(2, 3, 4)} for _ in range(2))
    inputs = {"labels": torch.tensor([[1, 0, -100], [2, -100, -100]])}
    counted = inputs["labels"] != -100
    mixed = Distillation(1.0, 2.0).mix(torch.tensor(9.0), outputs, target, inputs)
    expected = by_hand(outputs["logits"][counted], target["logits"][counted], 2.0)
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-7)


def test_labels_that_are_independent_teach_one_by_one():
    student, teacher = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    p, q = ((logits.double() / 2.5).sigmoid() for logits in (teacher, student))
    expected = 2.5**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    inputs = {"labels": torch.zeros(5, 3)}
    mixed = Distillation(1.0, 2.5).mix(torch.tensor(9.0), {"logits": student}, {"logits": teacher}, inputs)
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-7)
    mixed.backward()
    assert student.grad.abs().min() > 0
    far = torch.tensor([[100.0, -100.0]])
    assert float(distillation_loss({"logits": far}, {"logits": far}, 1.0, per_label=True)) == 0.0


@pytest.mark.parametrize(
    "problem, task, gives",
    [
        ("single_label_classification", "multi-label-classification", "one label"),
        ("multi_label_classification", "text-classification", "several labels"),
    ],
)
def test_a_teacher_gives_as_many_labels_a_row_as_the_task_has(tmp_path, problem, task, gives):
    names = {0: "a", 1: "b", 2: "c"}
    tiny_model(id2label=names, problem_type=problem).save_pretrained(tmp_path)
    with pytest.raises(SensibertError, match=f"gives {gives} a row, want a model fine-tuned for {task}"):
        load_teacher(*teacher_of(tmp_path, ["a", "b", "c"], task))
    tiny_model(id2label=names).save_pretrained(tmp_path)  # which does not say
    assert load_teacher(*teacher_of(tmp_path, ["a", "b", "c"], task)) is not None


def teacher_of(folder, label_names, task="text-classification"):
    """The arguments of load_teacher."""
    data = SimpleNamespace(task=get_task(task), num_labels=len(label_names), label_names=label_names, own_names=[])
    data.train = data.validation = None
    return Options(teacher=str(folder)), data, folder


def test_a_teacher_answers_in_the_order_of_the_classes_of_the_data(tmp_path):
    model, batch = tiny_model(num_labels=3), tiny_batch()
    model.config.id2label = {0: "Yes", 1: "no", 2: "perhaps"}
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(**batch).logits
        for names, order in ((["yes", "no", "perhaps"], [0, 1, 2]), (["no", "perhaps", "yes"], [1, 2, 0])):
            actual = load_teacher(*teacher_of(tmp_path, names))(**batch)["logits"]
            torch.testing.assert_close(actual, logits[:, order])


def test_a_teacher_of_something_else_is_refused(tmp_path):
    tiny_model(num_labels=2).save_pretrained(tmp_path / "two")
    tiny_model(head="").save_pretrained(tmp_path / "bare")
    named = tiny_model(num_labels=2)
    named.config.id2label = {0: "yes", 1: "no"}
    named.save_pretrained(tmp_path / "named")
    unnamed = load_teacher(*teacher_of(tmp_path / "two", ["good", "bad"]))
    assert unnamed is not None  # it does not say what its classes are
    for folder, names, task, message in (
        ("two", ["a", "b", "c"], "text-classification", "with 2 outputs, want a model .* text-classification with 3"),
        ("two", ["a", "b"], "token-classification", "is a BertForSequenceClassification .* token-classification"),
        ("bare", ["a", "b"], "text-classification", "is a BertModel with 2 outputs, want a model fine-tuned"),
        ("named", ["a", "b"], "text-classification", "has the classes yes, no, want a, b"),
    ):
        with pytest.raises(SensibertError, match=message):
            load_teacher(*teacher_of(tmp_path / folder, names, task))


def test_the_loss_is_mixed_by_weight():
    outputs, target = ({"logits": torch.randn(3, 4)} for _ in range(2))
    loss, logits = torch.tensor(2.0), distillation_loss(outputs, target, 3.0)
    torch.testing.assert_close(Distillation(0.4, 3.0).mix(loss, outputs, target, {}), 0.6 * loss + 0.4 * logits)
    assert Distillation(0.0, 3.0).mix(loss, outputs, target, {}) == loss
