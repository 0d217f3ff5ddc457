"""From examples to a trained and scored model, for every task; bad data are named."""

import json

import numpy as np
import pytest
import torch
import transformers

from sensibert.core.errors import SensibertError
from sensibert.data.files import Examples, load_examples
from sensibert.data.task_data import TaskData
from sensibert.sensitivity import sampled_loss
from tests.helpers import tiny_config

from .tiny import word_piece

WORDS = "the film was good bad great dull anna paris".split()


def examples(name: str = "train.csv", **columns) -> Examples:
    return Examples(columns, name)


def rows_of(task: str, n: int, name: str) -> Examples:
    """n examples whose label depends on one word, so that a tiny model can learn it."""
    rng = np.random.default_rng(n)
    words = rng.choice(WORDS, (n, 5))
    texts, lucky = [" ".join(row) for row in words], (words == "good").any(1)
    if task == "text-classification":
        return examples(name, sentence=texts, label=np.where(lucky, "yes", "no").tolist())
    if task == "regression":
        return examples(name, sentence1=texts, sentence2=texts, label=(lucky * 1.5 + 0.25).tolist())
    if task == "token-classification":
        tags = [["B-ADJ" if w == "good" else "O" for w in row] for row in words]
        return examples(name, tokens=words.tolist(), tags=tags)
    contexts = [text + " good ." for text in texts]
    golds = [{"text": ["good"], "answer_start": [context.index("good")]} for context in contexts]
    return examples(name, id=texts, question=["was it ?"] * n, context=contexts, answers=golds)


METRICS = {
    "text-classification": {"accuracy", "f1", "matthews"},
    "regression": {"pearson", "spearman"},
    "token-classification": {"f1", "precision", "recall", "accuracy"},
    "question-answering": {"em", "f1"},
}


@pytest.mark.parametrize("task", METRICS)
def test_a_trainer_learns_and_scores_every_task(task, tmp_path):
    train, validation = rows_of(task, 64, "train.csv"), rows_of(task, 24, "validation.csv")
    data = TaskData.build(None, train, validation, word_piece(), max_length=24)
    assert data.task.name == task
    config = tiny_config(vocab_size=200)
    config.update(data.config_kwargs())
    transformers.set_seed(0)
    model = data.auto_class().from_config(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=12,
        learning_rate=1e-2,
        per_device_train_batch_size=16,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=data.collator,
        compute_metrics=data.compute_metrics,
    )
    trainer.train()
    scores = trainer.evaluate()
    metrics = {name: scores[f"eval_{name}"] for name in METRICS[task]}
    assert metrics[data.main_metric] > 0.9, metrics
    prediction = trainer.predict(data.validation)
    assert data.compute_metrics(prediction.predictions) == pytest.approx(metrics)  # without labels: the same

    batch = data.collator([data.train[i] for i in range(4)])
    model.eval()
    loss = sampled_loss(model(**batch), batch, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.isfinite() and model.base_model.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0


def build(train, validation=None, task=None, **options) -> TaskData:
    return TaskData.build(task, train, validation, word_piece(), **options)


def test_names_and_numbers_of_classes_reach_the_config():
    data = build(examples(sentence=["a", "b", "c"], label=["yes", "no", "yes"]))
    assert data.config_kwargs() == {
        "num_labels": 2,
        "id2label": {0: "no", 1: "yes"},
        "label2id": {"no": 0, "yes": 1},
        "problem_type": "single_label_classification",
    }
    assert [data.train[i]["labels"] for i in range(3)] == [1, 0, 1]
    assert data.validation is None and data.main_metric == "accuracy"


def test_integers_are_their_own_class_ids():
    data = build(examples(sentence=["a", "b", "c"], label=["2", "0", "1"]))
    assert [data.train[i]["labels"] for i in range(3)] == [2, 0, 1] and data.label_names == ["0", "1", "2"]


@pytest.mark.parametrize(
    "values, names, other, ids",
    [
        ([1, -1, 1], ["-1", "1"], ["1.0", "-1"], [1, 0]),
        (["7", "0", "+7"], ["0", "7"], [7.0, "0.0"], [1, 0]),
        ([1.0, 0.0, 1.0], ["0", "1"], ["1", 0], [1, 0]),
        (["10", "9", "-2"], ["-2", "9", "10"], [9, "-2.0"], [1, 0]),  # in numeric order
    ],
)
def test_integers_of_any_values_are_classes_also_with_a_point_in_one_of_the_files(values, names, other, ids):
    train = examples(sentence=["a"] * 3, label=values)
    data = build(train, examples("dev.csv", sentence=["a"] * 2, label=other), "text-classification")
    assert data.label_names == names and data.config_kwargs()["id2label"] == dict(enumerate(names))
    assert data.train.per_item["labels"].tolist() == [names.index(str(int(float(value)))) for value in values]
    assert data.validation.per_item["labels"].tolist() == ids


def test_the_column_of_labels_may_be_called_labels():
    data = build(examples(sentence=["a", "b"], labels=["no", "yes"]))
    assert data.task.name == "text-classification" and data.label_names == ["no", "yes"]
    assert build(examples(sentence=["a"], labels=[0.5])).task.name == "regression"
    assert build(examples(tokens=[["a", "b"]], labels=[["O", "B-X"]])).label_names == ["B-X", "O"]
    assert build(examples(sentence=["a", "b"], labels=["c", "d"], label=[0, 1])).label_names == ["0", "1"]


def test_names_in_one_file_and_numbers_with_a_point_in_the_other_are_refused():
    train = examples(sentence=["a", "b"], label=["no", "yes"])
    with pytest.raises(SensibertError, match="dev.csv: column 'label' holds integers, and train.csv has names for"):
        build(train, examples("dev.csv", sentence=["a"], label=["1.0"]))


def test_heads_without_classes_have_their_own_config():
    regression = build(examples(text=["a"], label=[0.5])).config_kwargs()
    assert (regression["num_labels"], regression["problem_type"]) == (1, "regression")
    assert build(rows_of("question-answering", 2, "x")).config_kwargs()["num_labels"] == 2


def test_class_names_of_the_hub_are_used():
    rows = Examples({"sentence": ["a", "b"], "label": [1, 0]}, "hub", {"label": ["negative", "positive"]})
    data = build(rows)
    assert data.label_names == ["negative", "positive"] and data.train[0]["labels"] == 1


def test_evaluation_uses_the_classes_of_the_model():
    rows = examples("validation.csv", sentence=["a", "b"], label=["yes", "yes"])
    data = build(None, rows, "text-classification", label_names=["yes", "no", "maybe"])
    assert data.num_labels == 3 and data.validation[0]["labels"] == 0 and data.train is None
    assert data.compute_metrics(np.eye(3)[[0, 1]]) == {"accuracy": 0.5}


def test_a_constant_answer_scores_the_share_of_the_largest_class():
    rows = examples("dev.csv", sentence=["a", "b", "c"], label=["yes", "no", "yes"])
    assert build(None, rows, "text-classification", label_names=["no", "yes"]).constant_score() == pytest.approx(2 / 3)
    assert build(None, rows_of("regression", 4, "dev.csv"), "regression").constant_score() == 0
    with pytest.raises(SensibertError, match="there is no validation data"):
        build(rows_of("regression", 4, "train.csv")).constant_score()


def test_columns_can_have_other_names():
    rows = examples(**{"q, a": ["good film"], "b": ["bad"], "y": ["0.5"]})
    assert len(build(rows, text_column="q, a", label_column="y").train[0]["input_ids"]) == 4
    rows = examples(a=["good film", "x"], b=["bad", "y"], y=["0", "1"])
    assert len(build(rows, text_column="a, b", label_column="y").train[0]["input_ids"]) == 6


def test_questions_in_csv_carry_their_answers_as_json(tmp_path):
    answers = json.dumps({"text": ["anna"], "answer_start": [0]}).replace('"', '""')
    path = tmp_path / "train.csv"
    path.write_text(f'id,context,question,answers\n1,anna wrote it,who wrote it ?,"{answers}"\n')
    data = build(load_examples(str(path)))
    assert data.task.name == "question-answering" and data.train.golds == [[("anna", 0)]]
    assert data.train[0]["start_positions"] == 6


def test_a_tag_may_be_an_integer():
    data = build(examples(tokens=[["anna", "lives"], ["good"]], tags=[[1, 0], [2]]))
    assert data.label_names == ["0", "1", "2"] and data.train[0]["labels"] == [-100, 1, 0, -100]


def test_no_answer_is_a_candidate_only_if_some_question_has_none():
    rows = examples(
        question=["who ?"] * 2, context=["anna", "paris"], answers=[{"text": ["anna"], "answer_start": [0]}] * 2
    )
    rows.columns["answers"][1] = {"text": ["paris"], "answer_start": [0]}
    logits = np.zeros((2, 9), np.float32)
    logits[:, 0] = 9.0  # CLS
    data = build(rows, rows, max_length=24)
    assert data.compute_metrics((logits, logits)) == {"em": 1.0, "f1": 1.0}
    rows.columns["answers"][1] = {"text": [], "answer_start": []}
    data = build(rows, rows, max_length=24)
    assert data.compute_metrics((logits, logits)) == {"em": 0.5, "f1": 0.5}


GOOD = {"sentence": ["a", "b"], "label": ["0", "1"]}
BAD = {
    "no text": (
        {"label": ["0", "1"]},
        {},
        "train.csv: text-classification wants the columns 'sentence1', 'sentence2' or",
    ),
    "no label": (
        {"sentence": ["a"]},
        {},
        "train.csv: no column 'label', 'labels', 'tags' or 'answers', the columns are 'sentence'",
    ),
    "chosen text": (GOOD, {"text_column": "x"}, "train.csv: no column 'x', the columns are 'sentence', 'label'"),
    "chosen pair": (
        GOOD,
        {"text_column": "sentence,x"},
        "train.csv: no column 'x', the columns are 'sentence', 'label'",
    ),
    "chosen label": (GOOD, {"label_column": "y"}, "train.csv: no column 'y', the columns are 'sentence', 'label'"),
    "three texts": (
        GOOD,
        {"text_column": "sentence,label,z"},
        "text_column is 'sentence,label,z', text-classification takes 1 or 2",
    ),
    "one text": (
        GOOD,
        {"text_column": "sentence", "task": "question-answering"},
        "text_column is 'sentence', question-answering takes 2 columns",
    ),
    "one class": (
        {"sentence": ["a"] * 2, "label": ["1"] * 2},
        {},
        "train.csv: column 'label' has only one class, 1 (int)",
    ),
    "null text": ({"sentence": ["a", None], "label": [0, 1]}, {}, "train.csv: row 2, column 'sentence' is empty"),
    "number as text": ({"sentence": ["a", 5], "label": [0, 1]}, {}, "row 2, column 'sentence' is 5 (int), want text"),
    "words for numbers": (
        {"sentence": ["a", "b"], "label": ["0.5", "x"]},
        {"task": "regression"},
        "train.csv: row 2, column 'label' is 'x' (str), want a number",
    ),
    "numbers for classes": (
        {"sentence": ["a", "b"], "label": ["0.5", "1"]},
        {"task": "text-classification"},
        "train.csv: row 1, column 'label' is '0.5' (str), want an integer or a name",
    ),
    "unknown task": (GOOD, {"task": "ner"}, "task is 'ner', want one of"),
    "twin names": (GOOD, {"label_names": ["a", "a"]}, "label_names is ['a', 'a'], want at least two different names"),
    "empty tag": (
        {"tokens": [["a"], ["b"]], "tags": [["O"], [""]]},
        {},
        "train.csv: row 2, column 'tags' holds an empty tag",
    ),
    "tags short": (
        {"tokens": [["a"], ["b", "c"]], "tags": [["O"], ["B-X"]]},
        {},
        "train.csv: row 2, column 'tags' has 1 tags for 2 tokens",
    ),
    "short window": (GOOD, {"max_length": 2}, "max_length is 2, want 4 to 512 with this tokenizer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_named_in_one_line(case):
    columns, options, message = BAD[case]
    with pytest.raises(SensibertError) as caught:
        build(examples(**columns), **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"sentence": ["a"], "label": ["2"]}, "row 1, column 'label' is '2' (str), want one of the 2 classes (0, 1)"),
        (
            {"sentence": ["a", "b"], "label": ["1", "x"]},
            "row 2, column 'label' is 'x' (str), want one of the 2 classes",
        ),
        ({"sentence": ["a"], "label": ["0.5"]}, "row 1, column 'label' is '0.5' (str), want one of the 2 classes"),
        ({"sentence": ["a"], "label": ["7.0"]}, "row 1, column 'label' is '7.0' (str), want one of the 2 classes"),
        ({"sentence": ["a"], "label": [None]}, "row 1, column 'label' is empty"),
        ({"sentence": ["a"]}, "no column 'label', the columns are 'sentence'"),
        ({"text": ["a"], "label": ["1"]}, "no column 'sentence', the columns are 'text', 'label'"),
    ],
)
def test_validation_data_are_measured_against_the_training_data(columns, message):
    with pytest.raises(SensibertError) as caught:
        build(examples(**GOOD), examples("validation.csv", **columns))
    assert str(caught.value).startswith("validation.csv: " + message)


def test_batches_are_padded_to_a_multiple_but_not_beyond_the_longest_row():
    texts = ["a film", "a film was good", "a film was good but long and bad and good"]
    data = build(examples(text=texts, label=[0, 1, 0]), pad_to_multiple_of=8)
    widths = [data.collator([data.train[row]])["input_ids"].shape[1] for row in range(3)]
    assert widths == [8, 8, data.train.lengths[2]] and data.train.lengths[2] % 8


def test_no_data_at_all_is_refused():
    with pytest.raises(SensibertError, match="train and validation are both None"):
        build(None)


def test_a_tokenizer_that_cannot_pad_is_named():
    tokenizer = word_piece()
    tokenizer.pad_token = None
    with pytest.raises(SensibertError, match="has no pad token"):
        TaskData.build(None, examples(**GOOD), None, tokenizer)


def test_predictions_that_do_not_fit_are_named():
    data = build(examples(**GOOD), examples(**GOOD))
    with pytest.raises(SensibertError, match="3 predictions, want 2"):
        data.compute_metrics(np.zeros((3, 2)))
    with pytest.raises(SensibertError, match="1 of 2 predictions are NaN"):
        data.compute_metrics(np.array([[0.0, np.nan], [0.0, 1.0]]))
    with pytest.raises(SensibertError, match="there is no validation data"):
        build(examples(**GOOD)).compute_metrics(np.zeros((2, 2)))


def test_windows_in_another_order_are_refused():
    data = build(None, rows_of("question-answering", 6, "x"), max_length=24)
    logits = np.zeros((2, 6, max(data.validation.lengths)), np.float32)
    starts, ends = data.validation.per_item["start_positions"], data.validation.per_item["end_positions"]
    order = transformers.EvalPrediction(tuple(logits), (starts[::-1], ends[::-1]))
    assert not np.array_equal(starts, starts[::-1])
    with pytest.raises(SensibertError, match="the windows are in another order"):
        data.compute_metrics(order)


def pairs(labels, **more) -> Examples:
    return examples(sentence1=["good"] * len(labels), sentence2=["bad"] * len(labels), label=labels, **more)


def test_one_logit_has_its_labels_in_a_column_and_metrics_of_both_kinds():
    data = TaskData.build("regression", None, pairs([1, 0, 0.25]), word_piece(), one_logit=True)
    assert data.config_kwargs()["problem_type"] == "multi_label_classification" and data.num_labels == 1
    batch = data.collator([data.validation[i] for i in range(3)])
    assert batch["labels"].tolist() == [[1.0], [0.0], [0.25]]
    model = transformers.AutoModelForSequenceClassification.from_config(
        tiny_config(vocab_size=200, num_labels=1, problem_type="multi_label_classification")
    ).eval()
    outputs = model(**batch)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(outputs.logits, batch["labels"])
    assert torch.equal(outputs.loss, expected)
    metrics = data.compute_metrics(np.array([[3.0], [-3.0], [1.0]]))
    assert metrics.keys() == {"accuracy", "f1", "matthews", "pearson", "spearman"}
    assert metrics["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("label", [-0.5, 1.5])
def test_a_label_that_is_no_probability_is_named(label):
    with pytest.raises(SensibertError, match=rf"row 2, column 'label' is {label} .*, want 0 to 1: the model has the"):
        TaskData.build("regression", pairs([0.0, label]), None, word_piece(), one_logit=True)


@pytest.mark.parametrize("name", ["query_id", "query-id", "qid"])
@pytest.mark.parametrize(
    "task, logits", [("regression", [[1.0], [2.0], [0.5]]), ("text-classification", [[0, 1.0], [0, 2.0], [0, 0.5]])]
)
def test_query_ids_give_the_metrics_of_a_ranking(task, logits, name):
    data = TaskData.build(task, None, pairs([1, 0, 1], **{name: ["a", "a", "b"]}), word_piece())
    metrics = data.compute_metrics(np.array(logits))
    assert metrics["mrr@10"] == 0.75 and metrics["ndcg@10"] == pytest.approx((1 + 1 / np.log2(3)) / 2)


def test_an_empty_query_id_and_a_negative_relevance_are_named():
    with pytest.raises(SensibertError, match="row 2, column 'qid' is empty"):
        TaskData.build("regression", None, pairs([1, 0], qid=["a", ""]), word_piece())
    with pytest.raises(SensibertError, match="row 2, column 'label' is -1 .int., want 0 or more in a file with qid"):
        TaskData.build("regression", None, pairs([1, -1], qid=["a", "a"]), word_piece())
