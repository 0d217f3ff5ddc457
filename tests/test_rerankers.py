"""Fine-tuning and scoring a classifier with one output from the command line: what its one logit is trained as."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from tests import runs
from tests.runs import command, sentences

pytestmark = pytest.mark.usefixtures("no_pictures")
TRAIN = ("--budget", "50%params", "--max-steps", 6, "--learning-rate", 3e-3, "--batch-size", 16, "--json")


def pair_file(path, rows=160, seed=1, labels=(0, 1)):
    """Whether the second sentence is about something good; six to a query."""
    first, second = sentences(rows, seed), sentences(rows, seed + 1000)
    lines = [(f"q{n // 6}", a, b, labels[j]) for n, ((a, _), (b, j)) in enumerate(zip(first, second, strict=True))]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("qid", "sentence1", "sentence2", "label"), *lines])
    return path


def workplace(folder):
    runs.model_folder(folder / "reranker", head="SequenceClassification", num_labels=1)
    pair_file(folder / "train.csv")
    pair_file(folder / "dev.csv", 36, seed=2)
    return folder


@pytest.fixture
def here(tmp_path):
    return workplace(tmp_path)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The folder of a short run on labels 0 and 1 without any option, and its metrics."""
    folder = workplace(tmp_path_factory.mktemp("usual"))
    done = finetuned(folder)
    assert done.code == 0, done.err
    return folder / "out", done.json["metrics"]


def finetuned(here, *options, train="train.csv", dev="dev.csv"):
    files = ("--train-file", here / train, "--validation-file", here / dev)
    return command("finetune", "--model", here / "reranker", *files, *TRAIN, "--output", here / "out", *options)


def problem(folder):
    return json.loads((folder / "config.json").read_text()).get("problem_type")


def set_problem(folder, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": value}))


def same_weights(one, other) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_labels_0_and_1_train_the_logit_of_the_only_output(here):
    done = finetuned(here, "--max-steps", 80)
    assert done.code == 0, done.err
    metrics = done.json["metrics"]
    assert metrics.keys() == {"accuracy", "f1", "matthews", "mrr@10", "ndcg@10", "pearson", "spearman"}
    assert metrics["accuracy"] > 0.9 and metrics["mrr@10"] > 0.9
    assert problem(here / "out") == "multi_label_classification"
    assert load_file(here / "out" / "model.safetensors")["classifier.weight"].shape[0] == 1
    again = command("eval", here / "out", "--validation-file", here / "dev.csv", "--json")
    assert again.code == 0 and again.json["metrics"] == pytest.approx(metrics)


@pytest.mark.parametrize("task", ["regression", "text-classification"])
def test_a_task_that_is_named_changes_nothing(task, here, usual):
    done = finetuned(here, "--task", task)
    assert done.code == 0 and done.json["metrics"] == usual[1], done.err
    assert same_weights(here / "out", usual[0]) and problem(here / "out") == "multi_label_classification"
    again = command("eval", here / "out", "--validation-file", here / "dev.csv", "--task", task, "--json")
    assert again.code == 0 and again.json["metrics"] == pytest.approx(usual[1])


def test_labels_0_and_1_may_have_a_point(here, usual):
    for name, rows, seed in (("train", 160, 1), ("dev", 36, 2)):
        pair_file(here / f"{name}.csv", rows, seed, labels=("0.0", "1.0"))
    done = finetuned(here)
    assert done.code == 0 and done.json["metrics"] == usual[1], done.err
    assert same_weights(here / "out", usual[0]) and problem(here / "out") == "multi_label_classification"


def test_a_model_for_numbers_and_one_without_labels_0_and_1_keep_the_squared_error(here):
    set_problem(here / "reranker", "regression")
    assert finetuned(here, "--task", "regression").code == 0 and problem(here / "out") == "regression"
    set_problem(here / "reranker", None)
    pair_file(here / "numbers.csv", labels=(0.5, 2.5))
    done = finetuned(here, "--overwrite", train="numbers.csv", dev="numbers.csv")
    assert done.code == 0 and problem(here / "out") == "regression" and done.json["metrics"]["mrr@10"] > 0


def test_a_model_for_probabilities_refuses_other_numbers(here):
    set_problem(here / "reranker", "multi_label_classification")
    pair_file(here / "numbers.csv", labels=(0.5, 2.5))
    done = finetuned(here, train="numbers.csv")
    assert done.code == 2 and "want 0 to 1: the model has the logit of a label" in done.err
    assert not (here / "out").exists()
    pair_file(here / "soft.csv", labels=(0.125, 0.875))
    assert finetuned(here, train="soft.csv", dev="soft.csv").code == 0
    assert problem(here / "out") == "multi_label_classification"


def test_classes_with_names_get_a_head_of_classes(here):
    for name in ("train", "dev"):
        pair_file(here / f"named-{name}.csv", labels=("no", "yes"))
    done = finetuned(here, train="named-train.csv", dev="named-dev.csv")
    assert done.code == 0 and done.json["task"] == "text-classification" and "mrr@10" in done.json["metrics"]


def test_the_analysis_of_a_command_takes_the_same_loss(here, monkeypatch):
    seen = []
    real = torch.nn.functional.binary_cross_entropy_with_logits
    monkeypatch.setattr(
        "torch.nn.functional.binary_cross_entropy_with_logits", lambda *a, **k: seen.append(1) or real(*a, **k)
    )
    given = ("--model", here / "reranker", "--train-file", here / "train.csv", "--samples", 32)
    done = command("analyze", *given, "--output", here / "scores.safetensors")
    assert done.code == 0 and seen, done.err
