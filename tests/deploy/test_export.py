"""Graphs for other runtimes: they compute what the model computes, and their folders load without this package."""

import json
import logging
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from sensibert.allocation import allocate
from sensibert.core.errors import SensibertError
from sensibert.core.export_options import RUNTIME_NAMES
from sensibert.core.grid import Grid
from sensibert.deploy import RUNTIMES, export_graph, graphs
from sensibert.models import layout_of
from sensibert.saving.folder import export, load
from sensibert.sensitivity import analyze
from sensibert.trimming.trim import trim
from tests import runs
from tests.fresh import WITHOUT, run
from tests.helpers import tiny_model
from tests.models.test_families import FAMILIES, OTHERS
from tests.plans import random_plan

onnx, onnxruntime, _ = map(pytest.importorskip, ("onnx", "onnxruntime", "onnxscript"))
ONE_EACH = {case.values[0]: case.values[1] for case in OTHERS} | dict.fromkeys(FAMILIES, {})


def small(folder, head="SequenceClassification", **config):
    """The folder of a trimmed model with one layer."""
    source = runs.model_folder(folder / "whole", head=head, initializer_range=0.2, num_hidden_layers=1, **config)
    model, tokenizer = load(source)
    return str(export(trim(model, random_plan(layout_of(model))), folder / "small", tokenizer))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Such a folder, which tests only read."""
    return small(tmp_path_factory.mktemp("source"), hidden_size=64, vocab_size=2000)


class Exports(NamedTuple):
    """Results of the command, whose folders are `int8` and `plain` in `folder`. Tests only read them."""

    folder: Path
    int8: runs.Finished
    plain: runs.Finished


@pytest.fixture(scope="module")
def exports(source, tmp_path_factory):
    """`source` exported with a graph in int8, and without one over a copy of that."""
    folder = tmp_path_factory.mktemp("exports")
    options = ("--int8", "--validation-file", runs.sentence_file(folder / "dev.csv"), "--max-loss", "60%", "--json")
    int8 = runs.command("export", source, "--output", folder / "int8", *options)
    shutil.copytree(folder / "int8", folder / "plain")
    plain = runs.command("export", source, "--output", folder / "plain", "--overwrite", "--json")
    return Exports(folder, int8, plain)


def test_the_mixed_precision_of_a_trainer_does_not_come_along(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_model(initializer_range=0.2, num_hidden_layers=1)
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=1, bf16=True, use_cpu=True, report_to="none")
    rows = [{"input_ids": torch.tensor([5, 6, 7]), "attention_mask": torch.ones(3).long(), "labels": torch.tensor(1)}]
    Trainer(model, arguments, train_dataset=rows).train()
    assert "forward" in vars(model)  # as accelerate leaves it
    facts = export_graph(model, str(tmp_path / "out"))
    assert facts["difference"] < 1e-4 and "forward" in vars(model)


SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 96}
OWN_SIZES = {
    "distilbert": {"dim": 48, "n_layers": 2, "n_heads": 6, "hidden_dim": 96},
    "albert": SIZES | {"num_hidden_layers": 3, "num_hidden_groups": 2, "inner_group_num": 1},  # two share weights
    # the second layer sees a window of 4 tokens
    "modernbert": SIZES | {"num_hidden_layers": 3, "global_attn_every_n_layers": 2, "local_attention": 4},
}


# Families whose attention is not one of transformers' interchangeable implementations.
OWN_ATTENTION = {"deberta-v2", "mpnet", "rembert"}
# One model of each table of names. The other families have the modules of one of these: one layer is enough.
TABLES = {"albert", "bert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "nomic_bert", "rembert"}
TABLES |= {"roberta"}


@pytest.mark.parametrize("family", ONE_EACH)
def test_every_family_has_a_graph_with_free_sizes(family, tmp_path):
    """Each layer has its own number of heads and neurons; one of several has no heads, if the family allows it, and one
    no FFN: the graph has nothing of them, since ONNX Runtime 1.23 and OpenVINO fail on tensors without elements.
    Attention is one operator of ONNX Runtime, unless the family has attention of its own.
    `export_graph` compares outputs on three shapes, and raises."""
    sizes = OWN_SIZES.get(family, SIZES) | ({} if family in TABLES else {"num_hidden_layers": 1})
    try:
        model = tiny_model(family, initializer_range=0.2, **(ONE_EACH[family] | sizes))
    except ValueError:
        pytest.skip(f"this transformers has no {family}")
    layout, empty = layout_of(model), []
    if family in TABLES:
        empty += [site.name for site in layout.sites if site.kind == "head" and not site.minimum][:1]
        empty += [[site.name for site in layout.sites if site.kind == "ffn"][-1]]
    trim(model, random_plan(layout, seed=3, empty=empty))
    widths = [site.units for site in layout_of(model).sites]
    assert widths.count(0) == len(empty) and len(set(widths)) == len(widths) - (len(empty) > 1)
    facts = export_graph(model, str(tmp_path / "out"), int8=True)
    assert facts["difference"] < 1e-5 and facts["files"].keys() == {"onnx/model.onnx", "onnx/model_quantized.onnx"}
    made = onnx.load(tmp_path / "out/onnx/model.onnx")
    if family in TABLES:
        kept = [site.units for site in layout_of(model).sites if site.kind == "head" and family not in OWN_ATTENTION]
        fused = [node for node in made.graph.node if node.op_type == "MultiHeadAttention"]
        assert {onnx.helper.get_node_attr_value(node, "num_heads") for node in fused} == {*kept} - {0}
        assert all(node.input[5] and not any(node.input[3:5]) for node in fused), "WebGPU takes no other mask"
    opset = next(entry.version for entry in made.opset_import if not entry.domain)
    assert opset >= 22, "ONNX Runtime 1.20 misreads that mask, and refuses this opset"
    assert "IsNaN" not in {node.op_type for node in made.graph.node}
    made = onnx.shape_inference.infer_shapes(made).graph
    shapes = [value.type.tensor_type.shape.dim for value in made.value_info]
    inner = [dim.dim_value for shape in shapes for dim in shape if dim.HasField("dim_value")]
    assert inner and 0 not in {*inner, *(size for constant in made.initializer for size in constant.dims)}
    inputs = graphs.input_names(model.eval(), None)
    fp32, int8 = (RUNTIMES["onnx"].open(tmp_path / "out" / name, 1) for name in facts["files"])
    for rows, tokens in ((1, 5), (4, 17)):
        batch = graphs.random_inputs(inputs, 64, rows, tokens, seed=rows)
        wanted = model(**batch).logits.detach()
        assert float((wanted - wanted.mean()).abs().max()) > 1e-3, "the outputs are all the same: they prove nothing"
        torch.testing.assert_close(fp32(**batch)["logits"], wanted, rtol=1e-4, atol=1e-4)
        near = 0.35 if onnxruntime.__version__.startswith("1.23.") else 0.2  # random weights quantize badly there
        torch.testing.assert_close(int8(**batch)["logits"], wanted, rtol=0, atol=near * float(wanted.abs().max()))


def test_openvino_gets_attention_that_it_can_fuse_and_the_model_keeps_its_own():
    model = tiny_model().eval()
    names = {
        to: {str(node.target) for node in graphs.trace(model, None, RUNTIMES[to]).program.graph.nodes}
        for to in ("torch", "openvino")
    }
    fused = "aten.scaled_dot_product_attention.default"
    assert fused in names["torch"] and fused not in names["openvino"]
    assert model.config._attn_implementation == "sdpa"


def content(file: Path) -> bytes:
    """What is in a file, or in the files of a zip."""
    if not zipfile.is_zipfile(file):
        return file.read_bytes()
    with zipfile.ZipFile(file) as files:
        return b"".join(map(files.read, files.namelist()))


@pytest.mark.parametrize("to", RUNTIMES)
@pytest.mark.parametrize(
    "head, outputs",
    [
        ("", ["last_hidden_state"]),
        ("TokenClassification", ["logits"]),
        ("QuestionAnswering", ["start_logits", "end_logits"]),
    ],
)
def test_outputs_are_those_of_the_head(head, outputs, to, tmp_path):
    for package in RUNTIMES[to].packages:
        pytest.importorskip(package)
    model, tokenizer = load(small(tmp_path, head))
    export_graph(model, str(tmp_path / "out"), to, tokenizer)
    written = b"".join(map(content, (tmp_path / "out").rglob("*.*")))
    assert b"site-packages" not in written and b".py" not in written, "it names sources of this machine"
    graph = RUNTIMES[to].open(tmp_path / "out" / RUNTIMES[to].file, 1)
    batch = graphs.random_inputs(graphs.input_names(model, tokenizer), 64, 2, 9, seed=5)
    wanted, found = model(**batch), graph(**batch)
    assert list(found) == outputs and torch.equal(found[0], found[outputs[0]])
    for name in outputs:
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(found[name][real], wanted[name][real], rtol=1e-3, atol=1e-4)


ALONE = """
import json, sys
import numpy as np, onnxruntime, tokenizers
folder = sys.argv[1]
tokenizer = tokenizers.Tokenizer.from_file(folder + "/tokenizer.json")
encoded = tokenizer.encode("the film was great")
session = onnxruntime.InferenceSession(folder + "/onnx/model.onnx")
inputs = {"input_ids": encoded.ids, "attention_mask": encoded.attention_mask, "token_type_ids": encoded.type_ids}
print(json.dumps(session.run(None, {name: np.array([ids]) for name, ids in inputs.items()})[0].tolist()))
assert not {"torch", "transformers", "sensibert"} & sys.modules.keys()
"""


def test_onnxruntime_and_tokenizers_are_enough(source, exports, tmp_path):
    done, out = exports.plain, exports.folder / "plain"
    assert done.code == 0 and done.json["files"].keys() == {"onnx/model.onnx"}
    assert f"written to {out}" in done.out and "onnx/model.onnx" in done.out
    found = json.loads(run(WITHOUT + ALONE, out, cwd=tmp_path, isolated=True, interpreter=True))
    model, tokenizer = load(source)
    wanted = model(**tokenizer("the film was great", return_tensors="pt")).logits
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-4, atol=1e-5)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"] and config["model_type"] == "bert"
    assert "sensibert" not in config and "auto_map" not in config


def test_a_grid_is_exported_with_its_zeros_and_the_model_is_left_alone(tmp_path):
    model = tiny_model(initializer_range=0.2, num_hidden_layers=1).train()
    trim(model, allocate(analyze(model, method="magnitude", grid=Grid.element()), "50%params"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_graph(model, str(tmp_path / "out"))
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    written = {tensor.name: tensor for tensor in onnx.load(tmp_path / "out" / "onnx" / "model.onnx").graph.initializer}
    zeros = sum(int((onnx.numpy_helper.to_array(tensor) == 0).sum()) for tensor in written.values())
    weights = [value for name, value in model.named_parameters() if ".layer." in name and value.dim() == 2]
    assert zeros >= sum(int((value == 0).sum()) for value in weights) > 1000


def test_int8_is_smaller_and_scored(source, exports):
    done, validation = exports.int8, exports.folder / "dev.csv"
    files, metrics = done.json["files"], done.json["metrics"]
    assert done.json["int8"] and files["onnx/model_quantized.onnx"] < 0.7 * files["onnx/model.onnx"]
    assert metrics["model"] == pytest.approx(metrics["onnx"]) and metrics["int8"].keys() == metrics["onnx"].keys()
    wanted = runs.command("eval", source, "--validation-file", validation, "--json").json["metrics"]
    assert metrics["model"] == pytest.approx(wanted) and list(metrics["model"])[0] == "accuracy"
    assert ["model", "onnx", "int8"] in [line.split() for line in done.out.splitlines()]
    model, tokenizer = load(source)
    graph = RUNTIMES["onnx"].open(exports.folder / "int8" / graphs.INT8_FILE, 1)
    batch = graphs.random_inputs(graphs.input_names(model, tokenizer), 64, 4, 8)
    assert torch.corrcoef(torch.stack([graph(**batch)[0].flatten(), model(**batch)[0].flatten()]))[0, 1] > 0.98
    # Exported again without int8: the old graph does not stay.
    assert exports.plain.code == 0 and not (exports.folder / "plain" / graphs.INT8_FILE).exists()


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_embeddings_in_16_bits_take_half_of_the_place(to, source, exports, tmp_path):
    if to == "openvino":
        pytest.importorskip("openvino")
        plain = runs.command("export", source, "--to", to, "--output", tmp_path / "plain", "--json")
    else:
        plain = exports.plain
    options = ("--to", to, "--fp16-embeddings", *(["--int8"] if to == "onnx" else []))
    done = runs.command("export", source, *options, "--output", tmp_path / "half", "--json")
    assert 1e-5 < done.json["difference"] < 1e-2
    model, tokenizer = load(source)
    tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    files = done.json["files"]
    if to == "onnx":  # tables in 8 bits
        int8 = files.pop(graphs.INT8_FILE)
        assert files.keys() == {"onnx/model.onnx"} and int8 < files["onnx/model.onnx"] - 0.8 * tables[0].numel()
    saved = sum(plain.json["files"].values()) - sum(files.values())
    assert saved == pytest.approx(2 * sum(table.numel() for table in tables), rel=0.02)


def test_int8_that_loses_too_much_is_not_written(source, tmp_path, caplog):
    def score(module):
        return {"f1": 0.8, "other": 1.0} if len(calls.append(module) or calls) < 3 else {"f1": 0.7, "other": 1.0}

    calls = []
    model, tokenizer = load(source)
    with caplog.at_level(logging.WARNING, "sensibert"):
        facts = export_graph(model, str(tmp_path / "out"), tokenizer=tokenizer, int8=True, score=score, max_loss=0.1)
    assert not facts["int8"] and facts["int8_loss"] == pytest.approx(0.125) and len(calls) == 3
    assert facts["files"].keys() == {"onnx/model.onnx"} and facts["metrics"]["int8"]["f1"] == 0.7
    assert not (tmp_path / "out" / "onnx" / "model_quantized.onnx").exists()
    assert "int8 loses 12.50 % of f1 (0.7000, was 0.8000), more than max_loss (10.00 %)" in caplog.text


def test_a_folder_of_sentence_transformers_keeps_its_modules_and_is_scored(tmp_path):
    source = runs.embedding_folder(tmp_path / "whole", num_hidden_layers=1)
    scored = runs.scored_file(tmp_path / "dev.csv")
    done = runs.command("export", source, "--validation-file", scored, "--output", tmp_path / "out", "--json")
    assert done.code == 0 and list(done.json["metrics"]["onnx"])[0] == "spearman"
    assert done.json["metrics"]["onnx"] == pytest.approx(done.json["metrics"]["model"], abs=1e-4)
    out = tmp_path / "out"
    modules = json.loads((out / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
    assert json.loads((out / "1_Pooling" / "config.json").read_text()) == {"pooling_mode": "mean"}
    assert (out / "sentence_bert_config.json").exists() and (out / "tokenizer.json").exists()


def test_the_runtimes_that_can_be_asked_for_are_those_that_there_are():
    assert tuple(RUNTIMES) == RUNTIME_NAMES  # a copy that needs no torch


@pytest.mark.parametrize(
    "options, message",
    [
        (["--to", "onxn"], "to is 'onxn', want one of onnx, openvino, torch, executorch; did you mean 'onnx'?"),
        (["--to", "torch", "--int8"], "int8 is True and to is 'torch', want onnx"),
        (["--to", "torch", "--fp16-embeddings"], "fp16_embeddings is True and to is 'torch', want onnx or openvino"),
        (["--to", "executorch", "--int8"], "int8 is True and to is 'executorch', want onnx"),
        (["--to", "executorch", "--fp16-embeddings"], "fp16_embeddings is True and to is 'executorch', want onnx or"),
        (["--max-loss", "much"], "max_loss is 'much', want for example 0.5%"),
        (["--max-loss", "120%"], "max_loss is '120%', want for example 0.5%"),
        (["--validation-file", "missing.csv"], "missing.csv"),
    ],
)
def test_bad_input_is_refused_in_words(options, message, source, tmp_path):
    done = runs.command("export", source, "--output", tmp_path / "out", *options)
    assert done.code == 2 and message in done.err and not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(graphs, "import_module", absent)
    for to, package, extra in (
        ("onnx", "onnx", "export"),
        ("openvino", "onnx", "openvino"),
        ("executorch", "executorch", "executorch"),
    ):
        message = rf"{to} needs the package {package}: pip install 'sensibert\[{extra}\]'"
        with pytest.raises(SensibertError, match=message):
            export_graph(tiny_model(), str(tmp_path / "out"), to)
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_too_old_is_named_with_both_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    message = r"onnx needs onnxruntime 1.21 or later, found 1.20.1: pip install 'sensibert\[export\]'"
    with pytest.raises(SensibertError, match=message):
        export_graph(tiny_model(), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    runtime = RUNTIMES["torch"]

    def other(file, threads):
        graph = runtime.open(file, threads)
        return graphs.Graph(lambda inputs: [1.01 * value for value in graph.run(inputs)], graph.inputs, graph.outputs)

    monkeypatch.setitem(RUNTIMES, "torch", runtime._replace(open=other))
    with pytest.raises(SensibertError, match=r"the outputs of the torch graph are off by 1.0e-02 of the largest, want"):
        export_graph(tiny_model(initializer_range=0.2, num_hidden_layers=1), str(tmp_path / "out"), "torch")
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_taken_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    monkeypatch.setattr("sensibert.deploy.export.trace", None)
    with pytest.raises(SensibertError, match="exists and is not empty"):
        export_graph(tiny_model(), str(tmp_path / "out"))
