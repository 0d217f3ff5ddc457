"""Labels as people have them, from the command line: several a row, integers of any values, names for integers."""

import csv
import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from tests import runs
from tests.refusals import refused, untouched
from tests.runs import command, tree

pytestmark = pytest.mark.usefixtures("no_pictures")
FAST = ("--batch-size", 16, "--learning-rate", 5e-3, "--width-multiple", 4)
TRAIN = (*FAST, "--budget", "50%params", "--max-steps", 100, "--json")
TRAIN_ONE = (*TRAIN, "--max-steps", 40)  # one label a row is learned sooner
NAMES = ["anger", "joy", "place"]
METRICS = ["f1_micro", "f1_macro", "f1/anger", "f1/joy", "f1/place"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    runs.model_folder(folder / "model", initializer_range=0.2)
    for name, rows, seed in (("train", 160, 1), ("dev", 48, 2)):
        for suffix in ("jsonl", "csv"):
            runs.label_file(folder / f"{name}.{suffix}", rows, seed)
    return folder


def finetuned(here, output, *options, kind="jsonl", model="model"):
    files = ("--train-file", here / f"train.{kind}", "--validation-file", here / f"dev.{kind}")
    return command("finetune", "--model", here / model, *files, "--output", output, *TRAIN, *options)


@pytest.fixture(scope="module")
def small(here):
    """A folder with several labels a row, trimmed to half, and what its run printed."""
    done = finetuned(here, here / "small")
    assert done.code == 0, done.err
    return here / "small", done.json


def scored(*arguments):
    done = command("eval", *arguments, "--json")
    assert done.code == 0, done.err
    return done.json


def test_several_labels_a_row_are_guessed_learned_trimmed_and_scored(here, small):
    folder, result = small
    assert result["task"] == "multi-label-classification" and list(result["metrics"]) == METRICS
    assert result["metrics"]["f1_micro"] > 0.9 and not result["warnings"]
    assert result["encoder_params_after"] <= 0.5 * result["encoder_params_before"]
    config = json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification" and list(config["id2label"].values()) == NAMES
    for file in ("dev.jsonl", "dev.csv"):  # whose columns are called like the labels
        again = scored(folder, "--validation-file", here / file)
        assert again["task"] == result["task"] and again["metrics"] == result["metrics"]


def test_a_pipeline_gives_the_probability_of_every_label(small):
    folder, _ = small
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    text = "the bad film lives in paris"
    (answers,) = pipeline(task="text-classification", model=str(folder), top_k=None)([text])
    with torch.no_grad():
        wanted = model.eval()(**tokenizer(text, return_tensors="pt")).logits[0].sigmoid().tolist()
    assert {each["label"]: each["score"] for each in answers} == pytest.approx(dict(zip(NAMES, wanted, strict=True)))
    assert sum(each["score"] for each in answers) > 1.5  # of two labels at once


def test_packed_and_padded_batches_learn_the_same_labels(here, small, tmp_path):
    assert small[1]["throughput"]["tokens_per_s"]  # of packed batches
    done = finetuned(here, tmp_path / "out", "--packing", "off")
    assert done.code == 0 and done.json["metrics"]["f1_micro"] > 0.9, done.err
    assert finetuned(here, tmp_path / "packed", "--packing", "on", "--max-steps", 2).code == 0


def test_columns_of_0_and_1_are_labels_in_their_order(here, tmp_path):
    columns = ("--label-column", "place,anger,joy")
    done = finetuned(here, tmp_path / "out", *columns, "--no-freeze-embeddings", kind="csv")  # they are random
    assert done.code == 0 and done.json["metrics"]["f1_micro"] > 0.9, done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["place", "anger", "joy"]
    assert scored(tmp_path / "out", "--validation-file", here / "dev.jsonl")["metrics"] == done.json["metrics"]


def test_a_teacher_alone_teaches_several_labels(here, small, tmp_path):
    done = finetuned(here, tmp_path / "out", "--teacher", small[0], "--distil", 1)
    assert done.code == 0 and done.json["metrics"]["f1_micro"] > 0.8, done.err
    done = finetuned(here, tmp_path / "snapshot", "--teacher", "snapshot", "--max-steps", 4)
    assert done.code == 0 and done.json["metrics"].keys() == set(METRICS), done.err


def test_a_teacher_of_one_label_a_row_is_refused(here, tmp_path):
    names = dict(enumerate(NAMES))
    runs.model_folder(
        tmp_path / "one", head="SequenceClassification", id2label=names, problem_type="single_label_classification"
    )
    done = finetuned(here, tmp_path / "out", "--teacher", tmp_path / "one")
    assert done.code == 2 and "one gives one label a row, want a model fine-tuned for multi-label-cl" in done.err


@pytest.mark.parametrize("method", ["obs", "fisher", "taylor"])
def test_commands_one_at_a_time(here, small, tmp_path, method):
    data = ("--train-file", here / "train.jsonl", "--samples", 32)
    done = command("analyze", "--model", small[0], *data, "--method", method, "--output", tmp_path / "scores", "--json")
    assert done.code == 0 and done.json["task"] == "multi-label-classification", done.err
    if method == "obs":
        cut = ("--budget", "25%params", "--output", tmp_path / "smaller")
        assert command("trim", "--model", small[0], *data, *cut).code == 0
        assert scored(tmp_path / "smaller", "--validation-file", here / "dev.jsonl")["metrics"].keys() == set(METRICS)


def test_a_fine_tuned_model_keeps_the_order_of_its_labels(here, small, tmp_path):
    config = json.loads((small[0] / "config.json").read_text())
    done = finetuned(
        here, tmp_path / "out", "--label-column", "place,anger,joy", "--max-steps", 2, kind="csv", model="small"
    )
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == config["id2label"]


def json_lines(path, lists, text="good"):
    path.write_text("".join(json.dumps({"text": text, "labels": labels}) + "\n" for labels in lists))
    return path


BAD = {
    "unknown label": (
        "dev",
        [["joy"], ["fear"]],
        r"row 2, column 'labels' is 'fear' \(str\), want one of the 3 classes",
    ),
    "no list": ("dev", [["joy"], None], "row 2, column 'labels' is empty, want a list of labels"),
    "one label": ("train", [["joy"], []], "column 'labels' has only one class, 'joy'"),
    "lengths": (
        "train",
        [[0, 0, 1], [0, 1], [0, 0, 0]],
        "row 2, column 'labels' holds 2 values, want 0 or 1 for each of 3 labels",
    ),
    "no label at all": ("train", [[], []], "column 'labels' has no labels at all"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lists_are_refused_before_anything_is_encoded(here, tmp_path, monkeypatch, case):
    for step in ("data.task_data.encode_text", "run_training.finetune"):
        monkeypatch.setattr(f"sensibert.{step}", None)
    role, lists, message = BAD[case]
    files = {"train": here / "train.jsonl", "dev": here / "dev.jsonl", role: json_lines(tmp_path / "bad.jsonl", lists)}
    with untouched(tmp_path):
        given = ("--train-file", files["train"], "--validation-file", files["dev"], "--output", tmp_path / "out")
        refused(f"bad.jsonl: {message}", "finetune", "--model", here / "model", *given)


def test_names_of_positions_give_lists_of_0_and_1_their_order(here, small, tmp_path):
    lines = runs.labelled(48, seed=2)
    rows = [{"text": text, "labels": [float(name in labels) for name in NAMES[::-1]]} for text, labels in lines]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = scored(small[0], "--validation-file", tmp_path / "dev.jsonl", "--label-names", ",".join(NAMES[::-1]))
    assert found["metrics"] == small[1]["metrics"]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ("--label-column", "anger,joy"),
            "label_column is 'anger,joy', and the labels of the model are anger, joy, place",
        ),
        (("--label-column", "anger,hope,place"), "label_column is 'anger,hope,place', and the labels of the model are"),
        (("--task", "text-classification"), "small gives several labels a row, want multi-label-classification"),
        (("--label-names", "a,b"), "label_names: column 'labels' of .*dev.csv has names already"),
    ],
)
def test_columns_that_are_not_the_labels_of_the_model_are_refused(here, small, options, message):
    refused(message, "eval", small[0], "--validation-file", here / "dev.csv", *options)


def test_a_model_of_one_label_a_row_is_not_scored_with_several(here, tmp_path):
    names = dict(enumerate(NAMES))
    runs.model_folder(
        tmp_path / "one", head="SequenceClassification", id2label=names, problem_type="single_label_classification"
    )
    options = ("--validation-file", here / "dev.jsonl", "--task", "multi-label-classification")
    refused("one gives one label a row, want text-classification", "eval", tmp_path / "one", *options)


def sentence_files(folder, labels, suffix=""):
    """Sentences with other labels than 0 and 1."""
    for name, rows, seed in (("train", 160, 1), ("dev", 48, 2)):
        with open(folder / f"{name}{suffix}.csv", "w", newline="") as file:
            csv.writer(file).writerows(
                [("sentence", "label"), *((t, labels[i]) for t, i in runs.sentences(rows, seed))]
            )


@pytest.mark.parametrize("labels, names", [((-1, 1), ["-1", "1"]), (("7.0", "0.0"), ["0", "7"])])
def test_integers_of_any_values_are_classes_which_is_said(here, tmp_path, caplog, labels, names):
    sentence_files(tmp_path, labels)
    sentence_files(tmp_path, [int(float(label)) for label in labels], "-int")
    files = ("--train-file", tmp_path / "train.csv", "--validation-file", tmp_path / "dev-int.csv")
    done = command("finetune", "--model", here / "model", *files, *TRAIN_ONE, "--output", tmp_path / "out")
    assert done.code == 0 and done.json["metrics"]["accuracy"] > 0.9, done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config["id2label"].values()) == names
    assert any(f"'label' are the integers {', '.join(names)}" in message for message in caplog.messages)
    for file in ("dev.csv", "dev-int.csv"):
        assert scored(tmp_path / "out", "--validation-file", tmp_path / file)["metrics"] == done.json["metrics"]


def test_names_of_integers_reach_the_model_and_hold_in_eval(here, tmp_path):
    sentence_files(tmp_path, (-1, 1))
    sentence_files(tmp_path, (0, 1), "-01")
    files = ("--train-file", tmp_path / "train.csv", "--validation-file", tmp_path / "dev.csv")
    named = ("--label-names", "sad, happy")
    done = command("finetune", "--model", here / "model", *files, *named, *TRAIN_ONE, "--output", tmp_path / "out")
    assert done.code == 0 and done.json["metrics"]["accuracy"] > 0.9, done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["sad", "happy"]  # not sorted: 0 is the first of them
    for file, options in (("dev.csv", named), ("dev-01.csv", ())):
        again = scored(tmp_path / "out", "--validation-file", tmp_path / file, *options)
        assert again["metrics"] == done.json["metrics"]
    message = r"dev.csv: row \d+, column 'label' is '-1' \(str\), want one of the 2 classes \(sad, happy\)"
    refused(message, "eval", tmp_path / "out", "--validation-file", tmp_path / "dev.csv")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ("--label-names", "a,b,c"),
            r"label_names: 3 names \(a, b, c\), and column 'label' of .* has 2 different labels",
        ),
        (("--label-names", "a"), "label_names is 'a', want two or more different names, separated by commas"),
        (("--label-names", "a,,b"), "label_names is 'a,,b', want two or more different names"),
        (("--label-names", "a,a"), "label_names is 'a,a', want two or more different names"),
        (("--label-names", "a,b", "--task", "regression"), "label_names is 'a,b', but task regression has no classes"),
        (("--label-names", "a,b", "--task", "embedding"), "label_names is 'a,b', but task embedding has no classes"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_names_that_do_not_fit_are_refused(here, tmp_path, options, message, more):
    sentence_files(tmp_path, (0, 1))
    with untouched(tmp_path):
        given = ("--train-file", tmp_path / "train.csv", "--output", tmp_path / "out")
        refused(message, "finetune", "--model", here / "model", *given, *options, *more)


def test_names_for_labels_that_have_some_are_refused_and_so_are_answers(here, tmp_path):
    sentence_files(tmp_path, ("bad", "good"))
    runs.question_file(tmp_path / "answers.jsonl")
    for file, message in (
        ("train.csv", r"column 'label' of .*train.csv has names already \(bad, good\), want integers"),
        ("answers.jsonl", "label_names: .*answers.jsonl is read as question-answering, which has no classes"),
    ):
        given = ("--train-file", tmp_path / file, "--label-names", "a,b", "--output", tmp_path / "out")
        refused(message, "finetune", "--model", here / "model", *given)


def test_a_run_of_several_labels_resumes(here, small, tmp_path, monkeypatch):
    from sensibert import recipe

    options = ("--save-steps", 20, "--max-steps", 40, "--budget", "50%params")
    real, stopped = recipe._publish, RuntimeError("stopped")

    def stop(*args):
        raise stopped

    monkeypatch.setattr(recipe, "_publish", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        finetuned(here, tmp_path / "out", *options)
    monkeypatch.setattr(recipe, "_publish", real)
    done = finetuned(here, tmp_path / "out", *options, "--resume")
    assert done.code == 0 and done.json["task"] == "multi-label-classification", done.err
    assert "config.json" in tree(tmp_path / "out")
