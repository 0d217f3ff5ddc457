"""A budget of size is met by bits, vocabulary, heads and neurons together; the run says what each costs."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification as Auto
from transformers import AutoTokenizer

from sensibert import Schedule, TrimCallback, TrimConfig, allocate, analyze, trim
from sensibert.core.budget import Budget
from sensibert.core.cost import counts_of, spent
from sensibert.core.cost_table import CostTable
from sensibert.deploy.costs import Target, costs_of, measure_costs, settle, size_in_form
from sensibert.size_choice import ROWS, HeldOut, SizeChoice
from tests import runs
from tests.helpers import tiny_model
from tests.test_measured_budgets import finetune

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return runs.workplace(tmp_path_factory.mktemp("sizes"))


def megabytes(folder):
    return (folder / "model.safetensors").stat().st_size / 1e6


@pytest.fixture(scope="module")
def small(here, tmp_path_factory):
    """A run with a budget that 32 bits and the whole vocabulary cannot meet."""
    out = tmp_path_factory.mktemp("small") / "out"
    done = finetune(here, out, "40%size", "--save-steps", 6, "--keep-checkpoints")
    assert done.code == 0, done.err
    return out, done


def test_a_budget_takes_the_bits_that_lose_least(here, small):
    out, done = small
    result = json.loads((out / "result.json").read_text())
    assert megabytes(out) <= 0.4 * megabytes(here / "model")
    assert result["weights"] == "fp16" and result["budget"] == "40%size"
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    size = result["size"]
    assert size["of"] == "validation" and size["rows"] == 40
    (chosen,) = [form for form in size["forms"] if form["chosen"]]
    assert chosen["weights"] == "fp16"
    reached = [form["loss"] for form in size["forms"] if form["loss"] is not None]
    assert chosen["loss"] == min(reached)
    halved = next(form for form in size["forms"] if form["weights"] == "fp16" and form["vocabulary"] is None)
    assert abs(halved["loss_alone"]) < 1e-3  # rounding to 11 bits
    assert halved["mb_saved"] == pytest.approx(megabytes(here / "model") / 2, rel=0.1)
    assert result["measured"]["before"] == pytest.approx(megabytes(here / "model"), rel=0.02)
    assert "weights in fp16" in done.out and "MB less" in done.out


def test_the_scores_are_those_of_the_folder(here, small):
    out, done = small
    scored = runs.command("eval", out, "--validation-file", here / "dev.csv", "--json")
    assert scored.json["metrics"] == pytest.approx(done.json["metrics"])
    assert done.json["metrics_in_full"].keys() == done.json["metrics"].keys()
    model = Auto.from_pretrained(out, dtype=torch.float32)
    assert model.dtype == torch.float32 and model.config.vocab_size == len(AutoTokenizer.from_pretrained(out))


def test_a_resumed_run_keeps_the_form_that_was_chosen(here, small, tmp_path):
    out, _ = small
    shutil.copytree(out.with_name("out.partial"), tmp_path / "out.partial")
    shutil.rmtree(tmp_path / "out.partial" / "checkpoint-12")
    resumed = finetune(here, tmp_path / "out", "40%size", "--save-steps", 6, "--resume")
    assert resumed.code == 0, resumed.err
    assert resumed.json["size"] == json.loads((out / "result.json").read_text())["size"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_large_vocabulary_goes_before_heads_and_neurons(here, tmp_path):
    runs.model_folder(tmp_path / "model", vocab_size=2000)
    asked = (here, tmp_path / "out", "20%size", "--model", tmp_path / "model", "--save-steps", 6, "--keep-checkpoints")
    done = finetune(*asked)
    assert done.code == 0, done.err
    result, out = done.json, tmp_path / "out"
    assert result["vocabulary_after"] < result["vocabulary_before"] and "pieces: " in done.out
    assert megabytes(out) <= 0.2 * megabytes(tmp_path / "model")
    model, tokenizer = Auto.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == result["vocabulary_after"]
    by_form = {(form["weights"], bool(form["vocabulary"])): form for form in result["size"]["forms"]}
    assert [form["chosen"] for form in by_form.values()].count(True) == 1
    assert by_form["fp32", False]["loss"] is None  # 20 % is less than its embeddings
    assert by_form["fp16", True]["mb_saved"] > by_form["fp32", True]["mb_saved"] > by_form["fp16", False]["mb_saved"]
    scored = runs.command("eval", out, "--validation-file", here / "dev.csv", "--json")
    assert scored.json["metrics"] == pytest.approx(result["metrics"])
    again = finetune(*asked, "--resume", "--overwrite", "--vocabulary", "all")
    assert again.code == 2 and f"chose {result['vocabulary_after']} pieces of the vocabulary" in again.err
    assert "this one keeps all: want vocabulary left out" in again.err and megabytes(out)


def test_what_is_given_is_not_chosen(here, tmp_path):
    done = finetune(here, tmp_path / "out", "80%size", "--weights", "fp32", "--vocabulary", "all")
    assert done.code == 0, done.err
    assert done.json["size"] is None and done.json["weights"] == "fp32" and "vocabulary_after" not in done.json
    assert Auto.from_pretrained(tmp_path / "out").dtype == torch.float32
    assert done.json["encoder_params_after"] < done.json["encoder_params_before"]


def test_16_bits_are_written_for_any_budget(here, tmp_path):
    done = finetune(here, tmp_path / "out", "50%params", "--weights", "bf16")
    assert done.code == 0, done.err
    assert Auto.from_pretrained(tmp_path / "out").dtype == torch.bfloat16 and done.json["weights"] == "bf16"


def test_16_bits_alone_may_meet_a_budget(here, tmp_path):
    done = finetune(here, tmp_path / "out", "60%size", "--weights", "fp16", "--vocabulary", "all")
    assert done.code == 0, done.err
    assert done.json["encoder_params_after"] == done.json["encoder_params_before"] and done.json["size"] is None
    assert 0.5 * megabytes(here / "model") <= megabytes(tmp_path / "out") < 0.6 * megabytes(here / "model")


def test_training_rows_tell_where_there_are_no_others(here, tmp_path):
    usual = ("--model", here / "model", "--train-file", here / "train.csv", "--max-steps", 12, "--samples", 64)
    done = runs.command("finetune", *usual, "--budget", "45%size", "--output", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert done.json["size"]["of"] == "training"
    assert [form["vocabulary"] for form in done.json["size"]["forms"]] == [None, None]


def test_a_budget_that_no_form_meets_is_refused_before_training(here, tmp_path):
    done = finetune(here, tmp_path / "out", "0.001MB")
    assert done.code == 2 and "smallest reachable budget" in done.err and not (tmp_path / "out").exists()


def test_a_fraction_counts_from_the_file_of_a_model_that_was_trimmed_before():
    model = tiny_model(hidden_size=64)
    trim(model, allocate(analyze(model, (), "magnitude"), "50%params", 8))
    table, target = measure_costs(model, Target("size")), Target("size")
    assert table.whole == pytest.approx(costs_of([model], target)[0], rel=0.02)
    assert table.whole < 0.9 * costs_of([tiny_model(hidden_size=64)], target)[0]
    assert size_in_form(table, model, "fp16").whole == table.whole


def test_a_cubic_schedule_begins_at_the_form_of_the_file():
    model, schedule = tiny_model(hidden_size=64), Schedule(shape="cubic")
    callback = TrimCallback(TrimConfig("40%size", schedule=schedule), size_choice=SizeChoice(("fp32", "fp16")))
    callback.prepare(model)
    whole = callback.budget.table.whole
    callback.memory.table = size_in_form(callback.budget.table, model, "fp16")
    cuts = [callback._target(progress).value for progress in (0.25, 0.5, 0.75, 1.0)]
    assert cuts == sorted(cuts, reverse=True) and cuts[-1] == int(0.4 * whole)
    assert cuts[0] < spent(callback.layout, counts_of(callback.layout), callback.budget) < 0.53 * whole


def test_a_file_that_would_be_larger_than_the_budget_is_chosen_again():
    model, target = tiny_model(hidden_size=64), Target("size")
    table = measure_costs(model, target)
    budget = Budget(0.8, "size", True, table=replace(table, rest=round(0.98 * table.rest)))  # predicts too little
    scores = analyze(model, (), "magnitude")

    def choose(budget):
        return allocate(scores, budget, 1)

    first, plan = choose(budget), settle(model, choose(budget), choose, target)
    sizes = [costs_of([trim(copy.deepcopy(model), each)], target)[0] for each in (first, plan)]
    assert sizes[0] > 0.8 * table.whole >= sizes[1] > 0.78 * table.whole


def test_questions_are_measured_on_all_their_windows():
    rows = ([None] * (ROWS + 9), list)
    for of, number in (("validation", ROWS + 9), ("training", ROWS)):
        assert SizeChoice(("fp32",), rows=HeldOut(of, rows))._number(rows[0]) == number


@pytest.mark.parametrize("weights, vocabulary", [("fp16", None), ("fp32", 40), ("fp16", 40)])
def test_sizes_in_a_form_are_computed_as_they_are_measured(weights, vocabulary):
    model = tiny_model(vocab_size=512, hidden_size=64)
    table = size_in_form(measure_costs(model, Target("size")), model, weights, vocabulary)
    target = Target("size", weights=weights, vocabulary=vocabulary or 0)
    small = tiny_model(vocab_size=vocabulary or 512, hidden_size=64)
    most = table.rest + 2 * (table.cost("head", 4) + table.cost("ffn", 64))
    assert most == pytest.approx(costs_of([small], target)[0], rel=0.02)
    assert (table.weights, table.vocabulary) == (weights, vocabulary or 0)
    assert Target.of(table) == target and CostTable.from_dict(table.to_dict()) == table


def test_the_graph_s_embeddings_are_in_16_bits(here, sizes_of_weights, one_table_of_onnx_ops, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnx

    runs.model_folder(tmp_path / "model", num_hidden_layers=1)
    asked = ("98%size", "--runtime", "onnx", "--weights", "fp16", "--vocabulary", "all", "--model", tmp_path / "model")
    done = finetune(here, tmp_path / "out", *asked)
    assert done.code == 0, done.err
    graph = onnx.load(tmp_path / "out" / "export" / "onnx" / "model.onnx").graph
    assert sum(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer) >= 1
    assert done.json["graph"]["metrics"]["onnx"] == pytest.approx(done.json["metrics"])


def test_bf16_is_no_precision_of_a_graph(here, tmp_path):
    done = finetune(here, tmp_path / "out", "50%size", "--runtime", "onnx", "--weights", "bf16")
    assert done.code == 2 and "weights is 'bf16', which a graph for onnx has not" in done.err
