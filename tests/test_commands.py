"""One verb at a time, where tests/test_cli.py does not reach."""

import json
import shutil

import pytest

from sensibert import commands as steps
from sensibert import inputs as sources
from sensibert import inspection
from sensibert.core.errors import SensibertError
from sensibert.data.files import load_examples
from sensibert.run_options import Options
from tests import runs
from tests.helpers import tiny_model


@pytest.mark.parametrize(
    "head, labels, task",
    [
        ("SequenceClassification", 3, "text-classification"),
        ("SequenceClassification", 1, "regression"),
        ("QuestionAnswering", 2, "question-answering"),
        ("TokenClassification", 5, "token-classification"),
    ],
)
def test_the_task_of_a_model_is_told_by_its_head(head, labels, task):
    model = tiny_model(head=head, num_labels=labels)
    assert steps._task_of(model, Options("m")) == task
    assert steps._task_of(model, Options("m", task="squad")) == "squad"  # what was requested comes first
    model.config.sensibert = {"task": "noted"}
    assert steps._task_of(model, Options("m")) == "noted"


def test_a_head_for_another_purpose_has_no_task():
    with pytest.raises(SensibertError, match="is a BertForMaskedLM, want a fine-tuned model with a task head"):
        steps._task_of(tiny_model(head="MaskedLM"), Options("somewhere"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A fine-tuned model as other tools leave it: no note of ours, class names of its own."""
    folder = tmp_path_factory.mktemp("steps")
    names = {0: "bad", 1: "good"}
    runs.model_folder(folder / "tuned", head="SequenceClassification", id2label=names, label2id={"bad": 0, "good": 1})
    rows = "".join(f"{text},{('bad', 'good')[label]}\n" for text, label in runs.sentences(12))
    (folder / "dev.csv").write_text(f"sentence,label\n{rows}")
    return folder


def test_a_preset_scores_on_its_own_validation_data(tuned, monkeypatch):
    seen, read = [], load_examples

    def local(source, split):
        seen.append((source, split))
        return read(str(tuned / "dev.csv"))

    monkeypatch.setattr(sources, "load_examples", local)
    result = steps.evaluate_folder(Options(str(tuned / "tuned"), task="sst2"))
    assert seen == [("nyu-mll/glue:sst2", "validation")] and set(result["metrics"]) == {"accuracy", "f1", "matthews"}


def test_labels_are_read_by_the_names_of_the_model_and_mixed_precision_runs(tuned):
    requested = {"validation_file": str(tuned / "dev.csv")}
    exact = steps.evaluate_folder(Options(str(tuned / "tuned"), **requested))
    mixed = steps.evaluate_folder(Options(str(tuned / "tuned"), precision="bf16", **requested))
    assert exact["task"] == mixed["task"] == "text-classification"
    assert (
        0 < exact["metrics"]["accuracy"] < 1 and abs(exact["metrics"]["accuracy"] - mixed["metrics"]["accuracy"]) < 0.3
    )


def test_a_model_is_scored_at_the_length_that_its_run_noted(tuned, tmp_path, monkeypatch):
    shutil.copytree(tuned / "tuned", tmp_path / "noted")
    config = json.loads((tmp_path / "noted" / "config.json").read_text())
    (tmp_path / "noted" / "config.json").write_text(json.dumps(config | {"sensibert": {"max_length": 5}}))
    seen, encode = [], steps.encode
    monkeypatch.setattr(
        steps, "encode", lambda options, *rest: seen.append(options.max_length) or encode(options, *rest)
    )
    requested = {"validation_file": str(tuned / "dev.csv")}
    for folder, more in ((tmp_path / "noted", {}), (tmp_path / "noted", {"max_length": 7}), (tuned / "tuned", {})):
        steps.evaluate_folder(Options(str(folder), **requested, **more))
    assert seen == [5, 7, None]


def test_a_folder_without_a_run_is_inspected_and_a_damaged_result_is_named(tuned):
    shown = inspection.inspect_folder(str(tuned / "tuned"))
    assert shown["encoder_params_before"] == shown["encoder_params_after"] == 17088
    assert shown["method"] is None and shown["metrics"] is None and len(shown["layers"]) == 2
    (tuned / "tuned" / "result.json").write_text("{")
    with pytest.raises(SensibertError, match="result.json: cannot be read"):
        inspection.inspect_folder(str(tuned / "tuned"))
