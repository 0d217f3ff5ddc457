"""A folder of sentence-transformers stays one: its models load from it, with sensibert and without, to the same
outputs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from sensibert import SensibertError, export, trim
from tests import fresh
from tests.runs import command, tree
from tests.sentence_models import CLASSES, outputs, plan_of, sentence_folder, sentence_model, trimmed

AUTO = {
    "SentenceTransformer": AutoModel,
    "CrossEncoder": AutoModelForSequenceClassification,
    "SparseEncoder": AutoModelForMaskedLM,
}
RELOAD = """
import sys, torch
trust, given, written = sys.argv[1] == "trust", *sys.argv[2:]
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
folders, found = torch.load(given), {}
for folder, (name, texts) in folders.items():
    model = globals()[name](folder, device="cpu", **({"trust_remote_code": True} if trust else {}))
    home = type(model.transformers_model).__module__.split(".")[0]
    assert folder.endswith("dense") or home == ("transformers_modules" if trust else "sensibert"), home
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    if name == "CrossEncoder":
        found[folder] = model.predict([(texts[0], text) for text in texts], convert_to_tensor=True)
    else:
        out = model.encode(texts, prompt_name="query", convert_to_tensor=True)
        found[folder] = out.to_dense() if out.is_sparse else out
    assert model.max_seq_length == 7
assert trust != ("sensibert" in sys.modules)
torch.save({k: v.clone() for k, v in found.items()}, written)
"""


def auto_model(name: str, folder: str):
    return AUTO[name].from_pretrained(folder)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Every way to write a trimmed model of each class: folder -> (class, outputs before it was saved)."""
    here, written = tmp_path_factory.mktemp("shelf"), {}
    for name in CLASSES:
        source = sentence_folder(name, here, dense=True)
        model = CLASSES[name](source, device="cpu")
        plan = plan_of(model)
        trim(model.transformers_model, plan)
        model.save_pretrained(str(here / f"{name}-saved"))
        export(model, here / f"{name}-exported", layout="both", info={"note": "mine"})
        export(trim(auto_model(name, source), plan), here / f"{name}-from-folder")
        plan.save(here / "plan.safetensors")
        given = {"--model": source, "--plan": here / "plan.safetensors", "--output": here / f"{name}-command"}
        done = command("trim", *(word for pair in given.items() for word in pair))
        assert done.code == 0, done.err
        for way in ("saved", "exported", "exported/dense", "from-folder", "command"):
            written[str(here / f"{name}-{way}")] = (name, outputs(model))
    return here, written


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_it_reloads_to_the_same_outputs_in_a_fresh_process(shelf, trust_remote_code, tmp_path):
    from tests.sentence_models import TEXTS

    _, written = shelf
    given, actual = tmp_path / "given.pt", tmp_path / "actual.pt"
    torch.save({folder: (name, TEXTS) for folder, (name, _) in written.items()}, given)
    first = fresh.WITHOUT if trust_remote_code else "import sensibert"
    kind = "trust" if trust_remote_code else "import"
    fresh.run(first + RELOAD, kind, given, actual, cwd=tmp_path, isolated=trust_remote_code)
    found = torch.load(actual)
    assert found.keys() == written.keys()
    for folder, (_, expected) in written.items():
        tolerance = 1e-5 if folder.endswith("dense") else 0  # there the sums have more, zero, terms
        assert torch.allclose(found[folder], expected, rtol=0, atol=tolerance), folder


def test_the_card_says_how_to_load_it(shelf):
    here, _ = shelf
    card = (here / "CrossEncoder-exported" / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and "from sentence_transformers import CrossEncoder" in card
    assert 'CrossEncoder("CrossEncoder-exported", trust_remote_code=True)' in card
    assert json.loads((here / "CrossEncoder-exported" / "config.json").read_text())["sensibert"]["note"] == "mine"


def test_a_classifier_made_of_an_embedding_model_gets_none_of_its_modules(tmp_path):
    source = sentence_folder("SentenceTransformer", tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(source)
    assert not (export(model, tmp_path / "classifier") / "modules.json").exists()


def test_a_reranker_with_another_number_of_outputs_gets_none_of_its_modules(tmp_path):
    source = sentence_folder("CrossEncoder", tmp_path)
    options = {"num_labels": 3, "ignore_mismatched_sizes": True}
    model = AutoModelForSequenceClassification.from_pretrained(source, **options)
    assert not (export(model, tmp_path / "classifier") / "modules.json").exists()


def test_a_reranker_trained_on_its_logits_predicts_them(tmp_path):
    model = auto_model("CrossEncoder", sentence_folder("CrossEncoder", tmp_path))
    model.config.problem_type = "regression"
    export(model, tmp_path / "small")
    assert type(CLASSES["CrossEncoder"](str(tmp_path / "small"), device="cpu").activation_fn) is torch.nn.Identity
    whole = CLASSES["CrossEncoder"](str(tmp_path / "small"), device="cpu", activation_fn=torch.nn.Sigmoid())
    export(whole, tmp_path / "chosen")
    assert type(CLASSES["CrossEncoder"](str(tmp_path / "chosen"), device="cpu").activation_fn) is torch.nn.Sigmoid


def test_modules_with_code_of_their_own_are_refused_and_nothing_is_written(tmp_path):
    source = Path(sentence_folder("SentenceTransformer", tmp_path))
    modules = json.loads((source / "modules.json").read_text())
    modules[1]["type"] = "custom.Pooling"
    (source / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(SensibertError, match="has the module custom.Pooling, whose code would not come along; want"):
        export(AutoModel.from_pretrained(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, message", [("[", "cannot read .*modules.json"), ("{}", "holds dict, want list"),
                                           ("[]", "lists no modules"), ("[1]", "lists no modules")])  # fmt: skip
def test_a_damaged_list_of_modules_is_named(text, message, tmp_path):
    source = Path(sentence_folder("SentenceTransformer", tmp_path))
    (source / "modules.json").write_text(text)
    with pytest.raises(SensibertError, match=message):
        export(AutoModel.from_pretrained(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["../stock-SentenceTransformer", "/etc"])
def test_a_module_outside_the_folder_is_not_copied(path, tmp_path):
    source = Path(sentence_folder("SentenceTransformer", tmp_path))
    modules = json.loads((source / "modules.json").read_text())
    modules[1]["path"] = path
    (source / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(SensibertError, match="names the path .*, want a folder beside it"):
        export(AutoModel.from_pretrained(source), tmp_path / "out")


def test_modules_of_a_replaced_folder_do_not_stay(tmp_path):
    export(trimmed("SentenceTransformer", tmp_path, dense=True), tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    source = sentence_folder("CrossEncoder", tmp_path)
    export(auto_model("CrossEncoder", source), tmp_path / "out", overwrite=True)
    kept = {name for name, content in tree(tmp_path / "out").items() if content is not None}
    assert not any(name.startswith(("1_", "2_", "3_")) for name in kept) and "notes.txt" in kept
    assert CLASSES["CrossEncoder"](str(tmp_path / "out"), device="cpu")


def test_a_model_of_the_hub_brings_its_modules(tmp_path, monkeypatch):
    source, revision = sentence_folder("SentenceTransformer", tmp_path), "0" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--org--mini"
    shutil.copytree(source, cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    export(AutoModel.from_pretrained("org/mini"), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"modules.json", "1_Pooling", "tokenizer.json"} <= names


def test_an_untrimmed_model_is_written_with_its_modules_too(tmp_path):
    model = sentence_model("SentenceTransformer", tmp_path)
    export(model, tmp_path / "out")
    assert torch.equal(outputs(CLASSES["SentenceTransformer"](str(tmp_path / "out"), device="cpu")), outputs(model))


def test_a_source_that_is_gone_is_named_in_a_warning(tmp_path, caplog):
    source = sentence_folder("SentenceTransformer", tmp_path)
    model = AutoModel.from_pretrained(source)
    shutil.rmtree(source)
    export(model, tmp_path / "out")
    assert f"export: {source}, which the model was loaded from, is not there; modules beside it are not" in caplog.text


def test_a_model_in_a_folder_of_its_own_as_in_old_versions(tmp_path):
    """Without its modules it would be loaded with another pooling, without an error."""
    source, old = Path(sentence_folder("SentenceTransformer", tmp_path)), tmp_path / "old"
    expected = outputs(CLASSES["SentenceTransformer"](str(source), device="cpu"))
    shutil.copytree(source, old)
    (old / "0_Transformer").mkdir()
    for file in filter(Path.is_file, source.iterdir()):
        if file.name not in ("modules.json", "config_sentence_transformers.json"):
            (old / file.name).rename(old / "0_Transformer" / file.name)
    modules = json.loads((old / "modules.json").read_text())
    (old / "modules.json").write_text(json.dumps([modules[0] | {"path": "0_Transformer"}, *modules[1:]]))
    whole = CLASSES["SentenceTransformer"](str(old), device="cpu")
    assert torch.equal(outputs(whole), expected)
    model = AutoModel.from_pretrained(old / "0_Transformer")
    for name, given in {"inside": model, "whole": whole, "model-of-whole": whole.transformers_model}.items():
        export(given, tmp_path / name)
        assert torch.equal(outputs(CLASSES["SentenceTransformer"](str(tmp_path / name), device="cpu")), expected), name
