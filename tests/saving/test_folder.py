"""An exported folder reloads to the same logits, with sensibert and without it, or is refused in words."""

import ast
import copy
import json
import pickle
import resource
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sensibert
from sensibert import SensibertError, export, load, load_structure, trim
from sensibert.core.artifacts import UnitPlan
from sensibert.core.budget import Budget
from sensibert.models import base_of, families, layout_of
from sensibert.models.structure import structure_of
from tests import fresh
from tests.helpers import tiny_batch, tiny_config, tiny_model

TABLES = {family.model_type for family in families().values()} | {"gte"}  # gte: files with older names of the weights
FAMILIES = sorted(TABLES & set(transformers.CONFIG_MAPPING))  # an older transformers may lack one
AutoClassifier = transformers.AutoModelForSequenceClassification


def random_plan(model, seed=0):
    """About half of every site, and nothing at all of two where that may be: heads of layer 0, neurons of layer 1."""
    layout, rng = layout_of(model), torch.Generator().manual_seed(seed)
    keep = {site.name: torch.rand(site.units, generator=rng) < 0.5 for site in layout.sites}
    for site in layout.sites:
        whole = (site.layer, site.kind) in ((0, "head"), (1, "ffn")) and len(layout.sites) > 2
        keep[site.name][: site.minimum or 1] = True
        keep[site.name] &= not whole or site.minimum > 0
    return UnitPlan(layout, keep, Budget.parse("50%params"), "random")


def trimmed(family="bert", head="SequenceClassification", seed=0, **overrides):
    model = tiny_model(family, head, seed, attn_implementation=None, **overrides)  # None: what a reload takes as well
    return trim(model, random_plan(model, seed))


@torch.no_grad()
def output(model, batch=None):
    return model.eval()(**(batch or tiny_batch()))[0]


def tiny_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def tokenizers():
    """Family -> a tokenizer of its usual class."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "\u0120", "\u0120b"]  # byte level: Ġ is a space
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "\u2581a", "\u2581b"]  # sentencepiece: ▁ begins a word
    return {
        "bert": tiny_tokenizer(),
        "roberta": transformers.RobertaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[("\u0120", "b")]),
        "deberta-v2": transformers.DebertaV2Tokenizer(vocab=[(word, -float(i)) for i, word in enumerate(words)]),
    }


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A trimmed classifier of every family and its zero-filled twin: family -> (folder, logits before it was saved)."""
    actual, folder = {}, tmp_path_factory.mktemp("shelf")
    for family in FAMILIES:
        model = trimmed(family)
        tokenizer, info = tokenizers().get(family), {"method": "random", "budget": "50%params"}
        path = export(model, folder / family, tokenizer, layout="both", info=info)
        actual[family] = (path, output(model))
        torch.save(actual[family][1], folder / f"{family}.pt")
    return actual


ELSEWHERE = """
import contextlib, io, json, pickle, sys
from pathlib import Path
import torch, transformers
shelf, batch, report = Path(sys.argv[1]), torch.load(sys.argv[2]), {}
auto = transformers.AutoModelForSequenceClassification

def refusal(path, **kwargs):
    try:
        auto.from_pretrained(path, **kwargs)
    except ValueError as error:
        return str(error)

@torch.no_grad()
def same(model, name):
    return torch.equal(model.eval()(**batch).logits, torch.load(shelf / f"{name}.pt"))

for path in sorted(p for p in shelf.iterdir() if p.is_dir() and not p.name.startswith("again")):
    model = auto.from_pretrained(path, trust_remote_code=True)
    report[path.name] = {"class": type(model).__module__, "same": same(model, path.name)}
    with torch.no_grad():
        dense = auto.from_pretrained(path / "dense")(**batch).logits
    report[path.name]["dense"] = float((dense - torch.load(shelf / f"{path.name}.pt")).abs().max())
    model.save_pretrained(shelf / f"again-{path.name}")
    again = auto.from_pretrained(shelf / f"again-{path.name}", trust_remote_code=True)
    report[path.name]["again"] = same(again, path.name)
report["pickled"] = same(pickle.loads(pickle.dumps(again)), path.name)
report["refused"] = refusal(shelf / "bert")
report["refused, sizes ignored"] = refusal(shelf / "bert", ignore_mismatched_sizes=True)
report["tokens"] = []
for trust in (True, False, None):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        opened = [transformers.AutoTokenizer.from_pretrained(shelf / name, trust_remote_code=trust) for name in NAMES]
    report["tokens"].append([tokenizer("a b")["input_ids"] for tokenizer in opened])
    report[f"printed, {trust}"] = printed.getvalue()
pipe = transformers.pipeline("text-classification", model=str(shelf / "bert"), trust_remote_code=True)
report["pipeline"] = pipe("a b")[0]["label"]
report["sensibert"] = "sensibert" in sys.modules
print("\\n" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def elsewhere(shelf, tmp_path_factory):
    """What a process without sensibert reports about every folder of the shelf."""
    folder = tmp_path_factory.mktemp("elsewhere")
    torch.save(tiny_batch(), folder / "batch.pt")
    program = f"{fresh.WITHOUT}\nNAMES = {list(tokenizers())}\n{ELSEWHERE}"
    return json.loads(fresh.run(program, shelf["bert"][0].parent, folder / "batch.pt", cwd=folder, isolated=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_reloads_it_bit_for_bit_once_sensibert_is_imported(shelf, family):
    path, logits = shelf[family]
    model = AutoClassifier.from_pretrained(path)
    assert type(model).__name__.startswith("Sensibert") and type(model).__module__.startswith("sensibert.")
    assert torch.equal(output(model), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_trust_remote_code_reloads_it_bit_for_bit_where_sensibert_is_missing(elsewhere, family):
    report = elsewhere[family]
    assert report["class"].startswith("transformers_modules.") and report["same"], report
    assert report["again"], "saved again from there, it must load again"
    assert not elsewhere["sensibert"] and elsewhere["pickled"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_folder_is_a_stock_model_of_the_original_sizes(shelf, elsewhere, family):
    path, logits = shelf[family]
    model = AutoClassifier.from_pretrained(path / "dense")
    assert type(model).__module__.startswith("transformers.") and model.config.model_type == family
    assert [s.units for s in layout_of(model).sites] == [s.units for s in layout_of(tiny_model(family)).sites]
    torch.testing.assert_close(output(model), logits, rtol=1e-5, atol=1e-6)
    assert elsewhere[family]["dense"] < 1e-5, "the dense folder must load without sensibert"
    assert sorted(p.name for p in (path / "dense").iterdir() if p.suffix != ".txt")[:2] == [
        "config.json",
        "model.safetensors",
    ]


def test_stock_transformers_refuses_in_words_and_never_loads_random_weights(elsewhere):
    assert "trust_remote_code=True" in elsewhere["refused"]
    assert "trust_remote_code=True" in elsewhere["refused, sizes ignored"]


def test_pipelines_and_tokenizers_work_on_the_folder_both_ways(shelf, elsewhere):
    pipe = transformers.pipeline("text-classification", model=str(shelf["bert"][0]))
    assert pipe("a b")[0]["label"] == elsewhere["pipeline"]
    assert tiny_tokenizer()("a b")["input_ids"] == pipe.tokenizer("a b")["input_ids"]


def test_tokenizers_open_without_the_code_of_the_folder_and_without_a_question_where_it_is_declined(elsewhere):
    wanted = [tokenizer("a b")["input_ids"] for tokenizer in tokenizers().values()]
    assert elsewhere["tokens"] == [wanted] * 3, "with trust_remote_code=True, False, and not given"
    assert elsewhere["printed, True"] == elsewhere["printed, False"] == ""


def test_a_folder_whose_layers_do_not_fit_its_config_is_refused_even_where_mismatches_are_ignored(tmp_path):
    path = export(trimmed(), tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    config["sensibert"]["ffn"][1] += 1
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks 3 weights of its encoder"):
        AutoClassifier.from_pretrained(path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("part, refused", [("word_embeddings", True), ("classifier", False), ("pooler", False)])
def test_a_trimmed_folder_without_embeddings_is_refused_where_a_new_head_is_not(tmp_path, part, refused):
    path = export(trimmed(), tmp_path / "m")
    weights = {name: weight for name, weight in load_file(path / "model.safetensors").items() if part not in name}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    if refused:
        with pytest.raises(ValueError, match="lacks 1 weights of its encoder .bert.embeddings.word_embeddings.weight"):
            AutoClassifier.from_pretrained(path)
    else:
        AutoClassifier.from_pretrained(path)
    with pytest.raises(SensibertError, match=part):
        load(path)


def test_facts_about_the_run_cannot_change_the_shapes_and_heads_of_newer_versions_do_no_harm(tmp_path):
    model = trimmed()
    path = export(model, tmp_path / "m", info={"heads": [9, 9], "format": 9, "seed": 3})
    config = json.loads((path / "config.json").read_text())
    config["auto_map"]["AutoModelForMindReading"] = "modeling_sensibert.SensibertBertForMindReading"
    (path / "config.json").write_text(json.dumps(config))
    again = AutoClassifier.from_pretrained(path)
    assert torch.equal(output(again), output(model)) and again.config.sensibert["seed"] == 3


def test_the_config_has_budget_and_method_and_keeps_the_base_sizes(shelf):
    path, _ = shelf["bert"]
    config, structure = json.loads((path / "config.json").read_text()), load_structure(path)
    entry = config["sensibert"]
    assert config["model_type"] == "sensibert_bert"
    assert config["architectures"] == ["SensibertBertForSequenceClassification"]
    assert (config["num_attention_heads"], config["intermediate_size"]) == (4, 64)
    assert entry["format"] == 1 and entry["base_model_type"] == "bert" and entry["head_dim"] == 8
    assert entry["heads"] == [len(structure[f"layer.{n}.head"]) for n in (0, 1)] and entry["heads"][0] == 0
    assert entry["ffn"] == [len(structure[f"layer.{n}.ffn"]) for n in (0, 1)] and entry["ffn"][1] == 0
    assert entry["kept_heads"][1] == structure["layer.1.head"].tolist()
    assert (entry["method"], entry["budget"]) == ("random", "50%params")
    assert entry["sensibert_version"] == sensibert.__version__
    layout = layout_of(load(path)[0])
    assert (entry["encoder_params"], entry["digest"]) == (layout.encoder_params, layout.digest)
    assert all(kept.dtype == torch.int32 for kept in load_file(path / "structure.safetensors").values())
    assert "/" not in json.dumps(config), "no path of this machine goes into the folder"


def test_the_weights_have_the_stock_keys(shelf):
    stock = {name for name in tiny_model().state_dict() if name != "bert.embeddings.position_ids"}
    assert load_file(shelf["bert"][0] / "model.safetensors").keys() == stock


def test_the_modeling_file_stands_alone_in_less_than_150_lines(shelf):
    text = (shelf["bert"][0] / "modeling_sensibert.py").read_text()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name if isinstance(n, ast.Import) else n.module for n in nodes for alias in n.names}
    assert not any(getattr(node, "level", 0) for node in nodes)
    assert {n.split(".")[0] for n in names} - sys.stdlib_module_names == {"torch", "transformers", "safetensors"}
    assert len(text.splitlines()) < 150


def test_every_head_of_the_family_loads_from_one_folder(shelf):
    path, _ = shelf["bert"]
    heads = json.loads((path / "config.json").read_text())["auto_map"]
    assert {"AutoModel", "AutoModelForMaskedLM", "AutoModelForQuestionAnswering"} < heads.keys()
    expected = output(base_of(AutoClassifier.from_pretrained(path)))
    for auto in heads.keys() - {"AutoConfig"}:
        model = getattr(transformers, auto).from_pretrained(path, ignore_mismatched_sizes=True)  # of the head
        assert torch.equal(output(base_of(model)), expected), auto


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "albert", "modernbert", "mpnet"])
def test_tied_weights_are_stored_once_and_are_tied_after_loading(family, tmp_path):
    model = trimmed(family, "MaskedLM")
    logits = output(model)
    again, _ = load(export(model, tmp_path / "m", layout="both"))
    assert torch.equal(output(again), logits)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert output(load(tmp_path / "m" / "dense")[0]).sub(logits).abs().max() < 1e-5
    stock = tiny_model(family, "MaskedLM")
    stock.save_pretrained(tmp_path / "stock")
    keys = [load_file(folder / "model.safetensors").keys() for folder in (tmp_path / "m", tmp_path / "stock")]
    assert keys[0] == keys[1]


def test_bfloat16_is_saved_and_loaded_as_bfloat16(tmp_path):
    model = trimmed().bfloat16()
    again, _ = load(export(model, tmp_path / "m"))
    assert again.dtype == torch.bfloat16 and torch.equal(output(again), output(model))


def test_a_reloaded_model_saves_itself_copies_itself_and_pickles(shelf, tmp_path):
    path, logits = shelf["mpnet" if "mpnet" in shelf else "bert"]
    model = AutoClassifier.from_pretrained(path)
    model.save_pretrained(tmp_path / "again")
    for twin in (
        AutoClassifier.from_pretrained(tmp_path / "again"),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        load(export(model, tmp_path / "exported"))[0],
    ):
        assert torch.equal(output(twin), logits)
        assert all(torch.equal(structure_of(twin)[name], kept) for name, kept in load_structure(path).items())


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v2", "mpnet"])
def test_a_reloaded_model_is_trimmed_again_and_the_structure_composes(shelf, family, tmp_path):
    first, _ = load(shelf[family][0])
    before, plan = structure_of(first), random_plan(first, seed=1)
    trim(first, plan)
    for name, kept in structure_of(first).items():
        assert torch.equal(kept, before[name][plan.kept(name)])
    logits = output(first)
    path = export(first, tmp_path / "m", layout="both")
    again, _ = load(path)
    assert torch.equal(output(again), logits)
    assert all(torch.equal(structure_of(again)[name], kept) for name, kept in structure_of(first).items())
    assert again.config.sensibert["method"] == "random", "what was known of its origin stays"
    assert again.config.sensibert["encoder_params"] == layout_of(again).encoder_params
    assert output(load(path / "dense")[0]).sub(logits).abs().max() < 1e-5
    first.save_pretrained(tmp_path / "plain")  # without export: what was counted before the cut is not repeated
    plain = AutoClassifier.from_pretrained(tmp_path / "plain")
    assert torch.equal(output(plain), logits) and "digest" not in plain.config.sensibert


def test_a_reloaded_model_trains_and_its_checkpoint_loads(shelf, tmp_path):
    model = AutoClassifier.from_pretrained(shelf["bert"][0])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = tiny_batch() | {"labels": torch.tensor([0, 1, 0])}
    rows = [{name: value[i] for name, value in batch.items()} for i in range(3)]
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=2, save_steps=2, report_to="none", use_cpu=True)
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(output(AutoClassifier.from_pretrained(tmp_path / "checkpoint-2")), output(model))


def test_a_config_alone_builds_the_trimmed_shapes(shelf):
    path, _ = shelf["modernbert" if "modernbert" in shelf else "bert"]
    config = transformers.AutoConfig.from_pretrained(path)
    model, stored = AutoClassifier.from_config(config), load(path)[0]
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in stored.named_parameters()}
    assert torch.isfinite(output(model)).all()
    config.sensibert["format"] = 2
    with pytest.raises(ValueError, match="format 2, this code reads 1"):
        AutoClassifier.from_config(config)


def test_a_model_that_was_never_trimmed_is_written_as_it_is(tmp_path):
    model = tiny_model()
    path = export(model, tmp_path / "m")
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]
    again, tokenizer = load(path)
    assert type(again) is type(model) and tokenizer is None and torch.equal(output(again), output(model))


def test_export_leaves_the_model_as_it_was(tmp_path):
    model = trimmed()
    facts = type(model), model.config.to_dict(), {n: id(p) for n, p in model.named_parameters()}
    export(model, tmp_path / "m", layout="both")
    assert facts == (type(model), model.config.to_dict(), {n: id(p) for n, p in model.named_parameters()})


def test_load_brings_the_tokenizer(shelf):
    model, tokenizer = load(shelf["bert"][0])
    assert type(model).__name__ == "SensibertBertForSequenceClassification" and not model.training
    assert tokenizer("a b")["input_ids"] == tiny_tokenizer()("a b")["input_ids"]


def test_a_taken_folder_needs_overwrite_which_leaves_other_files_alone(tmp_path):
    path = export(trimmed(), tmp_path / "m", layout="both")
    (path / "notes.txt").write_text("mine")
    model = trimmed(seed=1)
    with pytest.raises(SensibertError, match=r"m is not empty; pass overwrite=True"):
        export(model, path)
    export(model, path, layout="both", overwrite=True)
    assert torch.equal(output(load(path)[0]), output(model))
    assert (path / "notes.txt").read_text() == "mine"
    export(model, path, layout="dense", overwrite=True)
    assert type(load(path)[0]).__name__ == "BertForSequenceClassification"
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_the_reports_of_a_former_run_go_with_its_model(tmp_path):
    path = export(trimmed(), tmp_path / "m")
    for name in ("result.json", "recipe.json", "notes.json"):
        (path / name).write_text("{}")
    export(trimmed(seed=1), path, overwrite=True)
    assert {p.name for p in path.glob("*.json")} == {"config.json", "notes.json"}


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    model = trimmed()
    for path in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert torch.equal(output(load(export(model, path))[0]), output(model))


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    model, (soft, hard) = trimmed(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the weights do not fit
    try:
        with pytest.raises(SensibertError, match="output: cannot write .*/a/m"):
            export(model, tmp_path / "a" / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["trimmed", "dense"])
def test_an_unwritable_place_is_an_error(layout, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SensibertError, match="output: cannot write .*/file/m"):
        export(trimmed(), tmp_path / "file" / "m", layout=layout)
    with pytest.raises(SensibertError, match="file is a file, want a folder"):
        export(trimmed(), tmp_path / "file", layout=layout)
    assert (tmp_path / "file").read_text() == ""


class TheirHead(transformers.BertForSequenceClassification):
    pass


@pytest.mark.parametrize(
    "make, options, message",
    [
        (tiny_model, {"layout": "sparse"}, "layout is 'sparse', want one of trimmed, dense, both"),
        (lambda: TheirHead(tiny_config()), {}, "TheirHead is not a class of transformers"),
        (lambda: torch.nn.Linear(2, 2), {}, "Linear is not a transformers model"),
        (lambda: sensibert.replace(tiny_model()), {}, "layers are masked"),
        (trimmed, {"info": {"budget": Budget.parse("50%params")}}, "info does not fit into a JSON file"),
    ],
    ids=["layout", "own class", "no transformer", "masked", "info"],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(make, options, message, tmp_path):
    with pytest.raises(SensibertError, match=message):
        export(make(), tmp_path / "m", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_model_is_an_error_of_one_line(shelf, tmp_path):
    path = export(trimmed(), tmp_path / "m")
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    for folder, message in (
        (path, "not a model folder that can be loaded"),
        (tmp_path / "nowhere", "path: .*nowhere is no folder, and cannot be loaded from the hub"),
        (tmp_path / "other", "not a model folder that can be loaded"),
    ):
        with pytest.raises(SensibertError, match=message) as caught:
            load(folder)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(SensibertError, match="not a readable structure file"):
        load_structure(tmp_path / "other")


def test_a_folder_without_its_structure_is_refused(tmp_path):
    path = export(trimmed(), tmp_path / "m")
    (path / "structure.safetensors").unlink()
    with pytest.raises(OSError, match=r"structure\.safetensors"):
        AutoClassifier.from_pretrained(path)


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(SensibertError, match="export: classifier.bias has NaN or infinite values"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
