"""What a dry run tells: columns, classes, steps and a time, as the run itself has them, and it leaves no trace."""

import csv
import json

import pytest

from sensibert import dry_run
from sensibert.dry_run import described
from tests import runs
from tests.runs import command, tree

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return runs.workplace(tmp_path_factory.mktemp("dry"))


def arguments(here, output, train="train.csv", **more):
    options = {"model": here / "model", "train-file": here / train, "output": output} | more
    return "finetune", *(part for name, value in options.items() for part in (f"--{name}", value))


def test_the_steps_columns_and_classes_are_those_of_the_run(here, tmp_path):
    requested = arguments(here, tmp_path / "out", epochs=1.5, **{"batch-size": 24, "gradient-accumulation": 2})
    before = tree(here)
    shown = command(*requested, "--dry-run", "--json")
    assert shown.code == 0 and tree(here) == before and not list(tmp_path.iterdir())
    facts = shown.json
    assert (facts["text_columns"], facts["label_column"], facts["classes"]) == (["sentence"], "label", ["0", "1"])
    assert facts["estimated_seconds"] > 0 and facts["timed_steps"] == 6
    lines = dict(line.split(": ", 1) for line in shown.out.splitlines()[:-1])
    assert lines["classes"] == "0, 1" and lines["text_columns"] == "sentence"
    assert lines["time"].startswith("about ") and "an estimate from 6 steps" in lines["time"]
    assert command(*requested, "--json").json["steps"] == facts["steps"] == 6  # 1.5 * 4, of 7 batches in pairs


def test_a_question_counts_once_for_each_window_of_its_context(here, tmp_path):
    runs.question_file(here / "squad.jsonl")
    requested = arguments(here, tmp_path / "out", "squad.jsonl", epochs=2, **{"max-length": 14, "doc-stride": 2})
    facts = command(*requested, "--batch-size", 4, "--dry-run", "--json").json
    assert facts["text_columns"] == ["question", "context"] and facts["label_column"] == "answers"
    assert facts["classes"] is None
    assert command(*requested, "--batch-size", 4, "--json").json["steps"] == facts["steps"] > 2 * 24 / 4


def test_texts_of_an_embedding_model_count_once(here, tmp_path):
    runs.embedding_folder(tmp_path / "model")
    runs.text_file(here / "texts.txt")
    more = {"model": tmp_path / "model", "task": "embedding", "epochs": 1}
    requested = arguments(here, tmp_path / "out", "texts.txt", **more)
    facts = command(*requested, "--dry-run", "--json").json
    assert (facts["text_columns"], facts["label_column"], facts["classes"]) == (["text"], None, None)
    assert command(*requested, "--json").json["steps"] == facts["steps"]


def test_the_form_of_the_file_is_shown_and_a_misspelt_vocabulary_is_named(here, tmp_path):
    more = {"vocabulary": here / "dev.csv", "weights": "fp16"}
    done = command(*arguments(here, tmp_path / "out", **more), "--dry-run")
    assert done.code == 0 and "weights: fp16" in done.out and f"vocabulary: {here / 'dev.csv'}" in done.out
    done = command(*arguments(here, tmp_path / "out", vocabulary="al"), "--dry-run")
    assert done.code == 2 and "vocabulary: al is not a file" in done.err


def test_at_most_ten_classes_are_shown_of_those_in_the_file(here, tmp_path):
    with open(here / "many.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *(("good film", f"class{i % 12:02}") for i in range(48))])
    shown = command(*arguments(here, tmp_path / "out", "many.csv"), "--dry-run", "--json")
    assert len(shown.json["classes"]) == 12
    assert "classes: class00, class01, " in shown.out and "class09, ... (12 in all)\n" in shown.out


def test_a_row_that_cannot_be_read_has_the_number_it_has_in_the_file(here, tmp_path, monkeypatch):
    rows = [{"text": text, "label": "ab"[label]} for text, label in runs.sentences(300)]
    rows[250]["text"] = 3
    (here / "gap.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr(dry_run, "STEPS", 9)  # so that all rows are read
    done = command(*arguments(here, tmp_path / "out", "gap.jsonl"), "--dry-run")
    assert done.code == 2 and "row 251" in done.err


@pytest.mark.parametrize(
    "seconds, words", [(0.2, "1 s"), (89, "89 s"), (100, "2 min"), (3000, "50 min"), (9000, "2.5 h")]
)
def test_times_are_in_words(seconds, words):
    facts = {"classes": None, "estimated_seconds": seconds, "timed_steps": 3}
    assert described(facts)["time"].startswith(f"about {words} (")


def test_a_preset_without_a_file_has_no_estimate(here, tmp_path):
    done = command(
        "finetune", "--model", here / "model", "--task", "sst2", "--output", tmp_path / "out", "--dry-run", "--json"
    )
    assert done.code == 0 and done.json["classes"] is None and "estimated_seconds" not in done.json
