"""Whole runs of the task embedding on a tiny model: texts without labels in, a trimmed encoder out."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from sensibert import run_training
from sensibert.callback import TrimCallback
from sensibert.models import layout_of
from sensibert.run_options import Options
from tests import runs
from tests.refusals import refused, untouched
from tests.runs import RESULT_KEYS, command
from tests.test_resume import Killed, same_weights

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedding")
    runs.embedding_folder(folder / "model")
    runs.text_file(folder / "texts.txt")
    runs.scored_file(folder / "dev.csv")
    return folder


def arguments(here, output, *more, **changed):
    requested = {"model": here / "model", "train-file": here / "texts.txt", "validation-file": here / "dev.csv"}
    requested |= {
        "task": "embedding",
        "max-steps": 5,
        "batch-size": 16,
        "width-multiple": 4,
        "output": output,
    } | changed
    given = {name: value for name, value in requested.items() if value is not None}
    return ["finetune", *(part for name, value in given.items() for part in (f"--{name}", value)), "--json", *more]


def test_half_of_an_encoder_learns_the_embeddings_of_the_whole_one(here, tmp_path):
    done = command(*arguments(here, tmp_path / "out", **{"max-steps": 80, "learning-rate": 2e-3}))
    result, folder = done.json, tmp_path / "out"
    assert set(result) == RESULT_KEYS and result["task"] == "embedding"
    at_cut, at_end = result["metrics_at_cut"], result["metrics"]
    assert at_cut["recall_at_10"] == 1 and at_cut["cosine"] == pytest.approx(1)  # nothing is learned before the cut
    cut = command(*arguments(here, tmp_path / "cut", **{"max-steps": 1})).json["metrics"]
    for name in ("recall_at_10", "cosine"):
        assert cut[name] < at_end[name] < 1, name
    reloaded = AutoModel.from_pretrained(folder)
    assert type(reloaded).__name__ == "SensibertBertModel"
    assert layout_of(reloaded).encoder_params == result["encoder_params_after"] <= result["encoder_params_before"] / 2
    assert reloaded.config.sensibert["task"] == "embedding" and reloaded.config.sensibert["max_length"] == 32
    assert "recall_at_10" in done.out and not (tmp_path / "out.partial").exists()
    scored = command("eval", folder, "--validation-file", here / "dev.csv", "--json").json
    assert scored["metrics"] == {"spearman": pytest.approx(at_end["spearman"])}


@pytest.mark.parametrize("mode, packing", [("cls", "on"), ("max", "on"), ("mean", "off")])
def test_poolings_and_padded_batches_run(here, tmp_path, mode, packing):
    runs.embedding_folder(tmp_path / "model", mode)
    requested = {"model": tmp_path / "model", "packing": packing, "precision": "bf16", "validation-file": None}
    result = command(*arguments(here, tmp_path / "out", **requested)).json
    assert set(result["metrics"]) == {"recall_at_10", "cosine"} and result["metrics"]["cosine"] > 0.5


def test_labelled_files_and_folders_without_modules_run(here, tmp_path):
    runs.model_folder(tmp_path / "plain", head="SequenceClassification")
    runs.pair_file(tmp_path / "pairs.csv")
    requested = {"model": tmp_path / "plain", "train-file": tmp_path / "pairs.csv", "budget": "40%flops"}
    result = command(*arguments(here, tmp_path / "out", **requested)).json
    assert result["flops_after"] <= 0.4 * result["flops_before"] and (tmp_path / "out" / "config.json").exists()


def test_scores_are_written_and_a_dry_run_describes_the_run(here, tmp_path):
    for method in ("layer-obs", "obs"):
        scores = tmp_path / f"{method}.safetensors"
        requested = {"model": here / "model", "train-file": here / "texts.txt", "task": "embedding", "method": method}
        given = [part for name, value in requested.items() for part in (f"--{name}", value)]
        assert command("analyze", *given, "--samples", 64, "--output", scores, "--json").json["samples"] == 64
    shown = command(*arguments(here, tmp_path / "out", "--dry-run", **{"max-steps": None})).json
    assert shown["steps"] == 3000 and shown["cut_after"] == "0 % of the steps" and shown["epochs"] is None
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", [1, 3])
def test_a_broken_run_resumes_to_the_same_weights(here, tmp_path, step, monkeypatch):
    requested = {"save-steps": 2, "max-steps": 6, "seed": 1}
    assert command(*arguments(here, tmp_path / "whole", **requested)).code == 0
    step_end = TrimCallback.on_step_end

    def dies(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrimCallback, "on_step_end", dies)
        command(*arguments(here, tmp_path / "out", **requested))
    partial = tmp_path / "out.partial"
    assert (partial / "embeddings.npy").exists() == (step == 3)  # without a checkpoint nothing is left
    done = command(*arguments(here, tmp_path / "out", "--resume", **requested))
    assert done.code == 0 and same_weights(tmp_path / "whole", tmp_path / "out") and not partial.exists()


def test_settings_hold_defaults_of_the_task():
    found = Options("m", "o", "t.txt", task="embedding").resolved()
    assert (found.max_steps, found.trim.method) == (3000, "obs") and found.rows() == 96000
    assert Options("m", "o", "t.txt", task="embedding", epochs=2).resolved().rows() is None
    assert Options("m", "o", "t.txt", task="embedding", max_steps=3).resolved().rows() == 96


def broken_model(here, place, **files):
    shutil.copytree(here / "model", place)
    for name, content in files.items():
        (place / name.replace("__", "/")).with_suffix(".json").write_text(json.dumps(content))
    return place


def test_bad_input_is_refused_in_words_and_leaves_nothing(here, tmp_path):
    kinds = ("Transformer", "Pooling", "Dense")
    dense = [
        {"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}" * (i > 0)}
        for i, kind in enumerate(kinds)
    ]
    models = {
        "dense": broken_model(here, tmp_path / "dense", modules=dense),
        "weighted": broken_model(
            here, tmp_path / "weighted", **{"1_Pooling__config": {"pooling_mode": "weightedmean"}}
        ),
        "small": broken_model(here, tmp_path / "small"),
    }
    weights = load_file(models["small"] / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][:12]
    save_file(weights, models["small"] / "model.safetensors", {"format": "pt"})
    config = json.loads((models["small"] / "config.json").read_text())
    (models["small"] / "config.json").write_text(json.dumps(config | {"vocab_size": 12}))
    files = {
        "alike.txt": "the same\n" * 30,
        "empty.txt": "\n\n",
        "unscored.csv": "sentence1,sentence2\na,b\n",
        "constant.csv": "sentence1,sentence2,score\na,b,3\nc,d,3\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    cases = [
        ({"model": models["dense"]}, "model: .*modules.json has the modules Transformer, Pooling, Dense; want"),
        (
            {"model": models["weighted"]},
            "model: .*1_Pooling/config.json has the pooling weightedmean; want mean, cls or",
        ),
        (
            {"model": models["small"]},
            r"model: the tokenizer produces id \d+ but the vocabulary has 12 entries; want the m",
        ),
        ({"train-file": tmp_path / "alike.txt"}, "train_file: .*: all texts are 'the same'"),
        ({"train-file": tmp_path / "empty.txt"}, "train_file: .*empty.txt holds no rows"),
        ({"validation-file": here / "texts.txt"}, "validation_file: .*the columns are 'text', want two with texts"),
        ({"validation-file": tmp_path / "unscored.csv"}, "validation_file: .*and one with a score"),
        (
            {"validation-file": tmp_path / "constant.csv"},
            "validation_file: .*'score' is '3' .*in every row, want different",
        ),
        ({"teacher": here / "model"}, "teacher is .*, but task embedding learns the embeddings of the original model"),
        ({"distil": 0.9}, "distil is 0.9, but task embedding learns"),
        ({"temperature": 3.0}, "temperature is 3.0, but task embedding learns"),
        (
            {"method": "taylor"},
            "method is 'taylor', and for task embedding the loss has no gradient before the cut; want",
        ),
        ({"max-length": 600}, "max_length is 600, want 4 to 512"),
        ({"text-column": "body"}, "text_column: .*no column 'body'"),
    ]
    with untouched(tmp_path, here):
        for changed, message in cases:
            refused(message, *arguments(here, tmp_path / "out", **changed)[:-1])


def test_a_file_of_texts_has_no_labels_for_other_tasks(here, tmp_path):
    refused("no column 'label'", *arguments(here, tmp_path / "out", task="text-classification")[:-1])
    assert run_training.EMBEDDINGS == "embeddings.npy"
