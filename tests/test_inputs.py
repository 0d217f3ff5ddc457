"""What a run takes from the files it is given: whose order of classes holds, which head is trained, what has room."""

import csv
import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import pipeline

from sensibert.data import files
from sensibert.data.files import Examples
from sensibert.inputs import outlined
from sensibert.run_options import Options
from tests import runs
from tests.runs import command

pytestmark = pytest.mark.usefixtures("no_pictures")
GENTLE = ("--method", "baseline", "--max-steps", 1, "--learning-rate", 1e-7, "--batch-size", 32)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Sentences labelled 0 and 1, and by names; a model that is right about them."""
    folder = runs.workplace(tmp_path_factory.mktemp("inputs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sensibert.recipe.write_report", lambda *args: [])
        learned = ("--method", "baseline", "--epochs", 6, "--learning-rate", 3e-3, "--batch-size", 16)
        done = command("finetune", "--model", folder / "model", *learned, *rows(folder), "--output", folder / "tuned")
    assert done.code == 0
    for name in ("train", "dev"):
        relabel(folder / f"{name}.csv", folder / f"{name}-named.csv", ("neg", "pos"))
    assert accuracy(folder / "tuned", folder / "dev.csv") > 0.9
    return folder


def rows(folder, kind=""):
    return "--train-file", folder / f"train{kind}.csv", "--validation-file", folder / f"dev{kind}.csv"


def relabel(source, target, names):
    with open(source, newline="") as old, open(target, "w", newline="") as new:
        header, *lines = csv.reader(old)
        csv.writer(new).writerows([header, *((text, names[int(label)]) for text, label in lines)])


def accuracy(model, file):
    return command("eval", model, "--validation-file", file, "--json").json["metrics"]["accuracy"]


def named(tuned, folder, names):
    """A copy of the model in which output i is named names[i]; the outputs change places if `pos` comes first."""
    shutil.copytree(tuned, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))
    if names[0].casefold().startswith("pos"):
        weights = load_file(folder / "model.safetensors")
        changed = {name: weights[name].flip(0) for name in ("classifier.weight", "classifier.bias")}
        save_file(weights | changed, folder / "model.safetensors", {"format": "pt"})
    return folder


def labels_of(folder):
    return list(json.loads((folder / "config.json").read_text())["id2label"].values())


@pytest.mark.parametrize("names", [("pos", "neg"), ("POS", "NEG"), ("neg", "pos")])
def test_where_names_agree_the_order_of_the_model_holds(here, tmp_path, names):
    model = named(here / "tuned", tmp_path / "model", names)
    assert accuracy(model, here / "dev-named.csv") > 0.9
    done = command("finetune", "--model", model, *rows(here, "-named"), *GENTLE, "--output", tmp_path / "out", "--json")
    assert done.json["metrics"]["accuracy"] > 0.9
    assert labels_of(tmp_path / "out") == [name.lower() for name in names]


def test_where_integers_meet_names_the_names_stay(here, tmp_path):
    model = named(here / "tuned", tmp_path / "model", ("neg", "pos"))
    done = command("finetune", "--model", model, *rows(here), *GENTLE, "--output", tmp_path / "out", "--json")
    assert done.json["metrics"]["accuracy"] > 0.9 and labels_of(tmp_path / "out") == ["neg", "pos"]
    answers = pipeline("text-classification", model=str(tmp_path / "out"))(["a great film", "a dull film"])
    assert [answer["label"] for answer in answers] == ["pos", "neg"]


@pytest.mark.parametrize("names", [("LABEL_0", "LABEL_1"), ("0", "1")])
def test_numbered_classes_take_the_names_of_the_data_which_is_said(here, tmp_path, caplog, names):
    model = named(here / "tuned", tmp_path / "model", names)
    done = command("finetune", "--model", model, *rows(here, "-named"), *GENTLE, "--output", tmp_path / "out", "--json")
    assert done.json["metrics"]["accuracy"] > 0.9 and labels_of(tmp_path / "out") == ["neg", "pos"]
    assert any("numbers its 2 classes; they are taken as neg, pos, in this order" in m for m in caplog.messages)


def test_names_that_contradict_each_other_are_shown(here, tmp_path):
    model = named(here / "tuned", tmp_path / "model", ("spam", "ham"))
    for more in ((), ("--dry-run",)):
        done = command(
            "finetune", "--model", model, *rows(here, "-named"), *GENTLE, "--output", tmp_path / "out", *more
        )
        assert done.code == 2 and not (tmp_path / "out").exists()
        assert "has the classes spam, ham, and" in done.err and "has neg, pos: want the same names" in done.err


def test_tags_keep_the_order_of_the_model(tmp_path):
    names = {0: "O", 1: "B-PER", 2: "B-LOC"}
    model = runs.model_folder(tmp_path / "model", head="TokenClassification", id2label=names)
    file = runs.tag_file(tmp_path / "tags.jsonl")
    done = command("finetune", "--model", model, "--train-file", file, *GENTLE, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert labels_of(tmp_path / "out") == ["O", "B-PER", "B-LOC"]  # sorted: B-LOC, B-PER, O


@pytest.mark.parametrize("names", [("POSITIVE", "NEGATIVE"), ("LABEL_0", "LABEL_1")])
def test_integers_of_a_data_set_mean_the_names_it_gives_them(here, tmp_path, monkeypatch, names):
    model = named(here / "tuned", tmp_path / "model", names)

    def from_hub(source, split):
        examples = files.load_examples(str(here / "dev.csv"))
        columns = examples.columns | {"label": [int(label) for label in examples.columns["label"]]}
        return Examples(columns, source, {"label": ["negative", "positive"]})

    monkeypatch.setattr(files, "_from_hub", from_hub)
    assert accuracy(model, "someone/reviews") > 0.9
    options = Options(model=str(model), output=str(tmp_path / "out"), train_file="someone/reviews")
    ordered = outlined(options, files.load_examples("someone/reviews")).label_names
    assert ordered == (["positive", "negative"] if names[0] == "POSITIVE" else ["negative", "positive"])


@pytest.mark.parametrize("labels", [1, 3])
def test_a_head_for_another_number_of_classes_is_made_new_which_is_said(here, tmp_path, caplog, labels):
    model = runs.model_folder(tmp_path / "model", head="SequenceClassification", num_labels=labels)
    done = command("finetune", "--model", model, *rows(here, "-named"), *GENTLE, "--output", tmp_path / "out", "--json")
    assert done.code == 0 and labels_of(tmp_path / "out") == ["neg", "pos"]
    assert any(f"its head has {labels} outputs and the task 2: a new head is trained" in m for m in caplog.messages)


@pytest.mark.parametrize("command_", ["finetune", "eval", "analyze"])
@pytest.mark.parametrize(
    "config, message",
    [
        ({"max_position_embeddings": 8}, "max_length: a row has 10 tokens, want at most 8, the positions of the model"),
        ({"vocab_size": 8}, "the tokenizer produces id .* but the vocabulary has 8 entries"),
        ({"type_vocab_size": 1}, "the tokenizer produces type 1 but the table of types has 1 entries"),
    ],
    ids=["positions", "vocabulary", "types"],
)
def test_rows_that_the_model_has_no_vectors_for_are_refused(here, tmp_path, command_, config, message):
    names = {0: "differ", 1: "same"} if "type_vocab_size" in config else {0: "LABEL_0", 1: "LABEL_1"}
    model = runs.model_folder(tmp_path / "model", head="SequenceClassification", id2label=names, **config)
    file = here / "train.csv"
    if "type_vocab_size" in config:
        file = runs.pair_file(tmp_path / "pairs.csv")
    output = ("--output", tmp_path / "out")
    calls = {
        "finetune": ("finetune", "--model", model, "--train-file", file, "--max-steps", 1, *output),
        "eval": ("eval", model, "--validation-file", file),
        "analyze": ("analyze", "--model", model, "--train-file", file, *output),
    }
    done = command(*calls[command_])
    assert done.code == 2 and len(done.err.splitlines()) == 1 and not (tmp_path / "out").exists(), done

    assert re.search(message, done.err), done.err
