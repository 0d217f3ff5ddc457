"""Several labels a row, as lists of names, of integers, or of 0 and 1; a bad one is named."""

import pytest
import torch
import transformers

from sensibert.core.errors import SensibertError
from sensibert.data.files import Examples
from sensibert.data.labels import Column
from sensibert.data.multi_label import LabelLists
from sensibert.data.task_data import TaskData
from tests.helpers import tiny_config
from tests.runs import labelled

from .tiny import word_piece


def column(*values) -> Column:
    return Column("train.csv", "labels", list(values))


def read(*values, names=None) -> tuple[list[str], list[list[float]]]:
    lists = LabelLists.of(column(*values))
    names = lists.names() if names is None else names
    return names, lists.matrix(names).tolist()


FORMS = {
    "names": ([["b", "a"], [], ["c"], ["b", "b"]], ["a", "b", "c"], [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]),
    "JSON": (['["b", " a "]', "[]", ' ["a"]'], ["a", "b"], [[1, 1], [0, 0], [1, 0]]),
    "integers": ([[10, 2], [], [2.0], ["3"]], ["2", "3", "10"], [[1, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]]),
    "zeros and ones": ([[1, 0, 1], [0, 0, 0]], ["0", "1", "2"], [[1, 0, 1], [0, 0, 0]]),
    "with a point": ([[1.0, 0.0], [1.0, 1.0]], ["0", "1"], [[1, 0], [1, 1]]),
    "bools": ([[True, False], [False, False]], ["0", "1"], [[1, 0], [0, 0]]),
    "zeros and ones as JSON": (["[1, 0]", "[1, 1]"], ["0", "1"], [[1, 0], [1, 1]]),
    "zeros and ones as text": ([["1", "0", "0"], ["0", "0", "0"]], ["0", "1", "2"], [[1, 0, 0], [0, 0, 0]]),
    "integers 0 and 1": ([[0], [1], [0, 1], []], ["0", "1"], [[1, 0], [0, 1], [1, 1], [0, 0]]),
    "one integer a row": ([[0], [1]], ["0", "1"], [[1, 0], [0, 1]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_lists_becomes_names_and_a_matrix(form):
    values, names, matrix = FORMS[form]
    assert read(*values) == (names, matrix)


def test_integers_are_positions_among_the_names_of_a_model():
    assert read([0, 2], [1], names=["x", "y", "z"])[1] == [[1, 0, 1], [0, 1, 0]]
    assert read([0, 1, 1], [1, 0, 0], names=["x", "y", "z"])[1] == [[0, 1, 1], [1, 0, 0]]
    assert LabelLists.of(column([0, 1]), 5).matrix(list("vwxyz")).tolist() == [[1, 1, 0, 0, 0]]  # two of five labels
    assert LabelLists.of(column([0, 1]), 2).matrix(["x", "y"]).tolist() == [[0, 1]]


BAD = {
    "no list": (
        ["a", ["b"]],
        "row 1, column 'labels' is 'a' (str), want a list of labels such as [\"a\", \"b\"], or []",
    ),
    "number": ([["a"], 3], "row 2, column 'labels' is 3 (int), want a list of labels"),
    "empty": ([["a"], None], "row 2, column 'labels' is empty, want a list of labels"),
    "blank": (['["a"]', " "], "row 2, column 'labels' is empty, want a list of labels"),
    "no JSON": (["['a', 'b']"], "row 1, column 'labels' is \"['a', 'b']\" (str), want a JSON list"),
    "empty label": ([["a"], ["b", " "]], "row 2, column 'labels' holds an empty label"),
    "missing label": ([["a", None]], "row 1, column 'labels' holds None (NoneType), want names or integers"),
    "list in list": ([[["a"]]], "row 1, column 'labels' holds ['a'] (list), want names or integers"),
    "mixture": (
        [["a"], ["b", 1]],
        "row 2, column 'labels' is 1 (int), and an earlier label is 'a' (str): want numbers",
    ),
    "mixture in a row": ([["a", 1]], "row 1, column 'labels' is 'a' (str), and an earlier label is 1 (int): want numb"),
    "fraction": ([[1, 0], [0.5, 1]], "row 2, column 'labels' holds 0.5 (float), want names or integers"),
    "nan": ([[1, float("nan")]], "row 1, column 'labels' holds nan (float), want names or integers"),
    "fraction as text": ([["1"], ["0.5"]], "row 2, column 'labels' is '0.5' (str), want an integer or a name"),
    "shorter": (
        [[1, 1], [0, 0, 1], [1, 0, 0]],
        "row 1, column 'labels' holds 2 values, want 0 or 1 for each of 3 labels, as in other rows",
    ),
    "of two labels": ([[1, 0], [0, 1], [1]], "row 3, column 'labels' holds 1 values, want 0 or 1 for each of 2 labels"),
    "one label": ([["a"], [], ["a"]], "column 'labels' has only one class, 'a' (str): want at least two"),
    "no label": ([[], []], "column 'labels' has no labels at all: want at least two"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lists_are_named(case):
    values, message = BAD[case]
    with pytest.raises(SensibertError) as caught:
        read(*values)
    assert str(caught.value).startswith("train.csv: ") and message in str(caught.value)


def test_lists_of_another_length_than_the_labels_of_the_model_are_named():
    with pytest.raises(
        SensibertError, match=r"'labels' holds lists of 3 values, want one for each of the 2 labels \(x"
    ):
        read([0, 1, 1], [0, 0, 0], names=["x", "y"])
    with pytest.raises(SensibertError, match="row 1, column 'labels' holds 2 values, want 3, one for each label"):
        LabelLists.of(column([1, 1], [0, 0, 1]), 3)


def examples(name: str = "train.jsonl", **columns) -> Examples:
    return Examples(columns, name)


def emotions(rows: int, name: str) -> Examples:
    texts, lists = zip(*labelled(rows, seed=rows), strict=True)
    return examples(name, sentence=list(texts), labels=list(lists))


def test_a_trainer_learns_and_scores_several_labels(tmp_path):
    data = TaskData.build(None, emotions(128, "train.jsonl"), emotions(24, "dev.jsonl"), word_piece(), max_length=24)
    assert data.task.name == "multi-label-classification" and data.label_names == ["anger", "joy", "place"]
    kwargs = data.config_kwargs()
    assert kwargs["problem_type"] == "multi_label_classification" and kwargs["num_labels"] == 3
    config = tiny_config(vocab_size=200, initializer_range=0.2)
    config.update(kwargs)
    transformers.set_seed(0)
    model = data.auto_class().from_config(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=12, learning_rate=5e-3, per_device_train_batch_size=16,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    sets = {"train_dataset": data.train, "eval_dataset": data.validation, "data_collator": data.collator}
    trainer = transformers.Trainer(model, arguments, compute_metrics=data.compute_metrics, **sets)
    trainer.train()
    scores = trainer.evaluate()
    names = ["f1_micro", "f1_macro", "f1/anger", "f1/joy", "f1/place"]
    metrics = {name: scores[f"eval_{name}"] for name in names}
    assert metrics[data.main_metric] > 0.9 > data.constant_score() and data.main_metric == "f1_micro"
    prediction = trainer.predict(data.validation)
    assert data.compute_metrics(prediction.predictions) == pytest.approx(metrics)  # without labels: the same

    batch = data.collator([data.train[i] for i in range(4)])
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model.eval()(**batch).logits, batch["labels"])
    assert torch.equal(model(**batch).loss, loss)


@pytest.mark.parametrize(
    "labels, message",
    [
        (
            [["joy"], ["fear"]],
            r"row 2, column 'labels' is 'fear' \(str\), want one of the 3 classes \(anger, joy, place",
        ),
        ([[0], [1]], "column 'labels' holds integers, and train.jsonl has names for its classes: want names in both"),
        (["joy", "anger"], "row 1, column 'labels' is 'joy' .*, want a list of labels"),
    ],
)
def test_a_label_that_the_training_file_lacks_is_named(labels, message):
    with pytest.raises(SensibertError, match=f"dev.jsonl: {message}"):
        rows = examples("dev.jsonl", sentence=["a", "b"], labels=labels)
        TaskData.build(None, emotions(8, "train.jsonl"), rows, word_piece())


def test_integers_of_a_data_set_of_the_hub_have_its_names():
    rows = Examples({"text": ["a", "b"], "labels": [[2], []]}, "hub", {"labels": ["x", "y", "z"]})
    data = TaskData.build(None, rows, None, word_piece())
    assert data.label_names == ["x", "y", "z"] and data.train.per_item["labels"].tolist() == [[0, 0, 1], [0, 0, 0]]
