"""Budgets in milliseconds and megabytes, from the command line and in a plain Trainer."""

import json
import shutil
from types import SimpleNamespace

import pytest
from transformers import Trainer

from sensibert import TrimCallback, TrimConfig
from sensibert.core.budget import Budget
from sensibert.core.cost import counts_of, spent
from sensibert.core.cost_table import CostTable
from sensibert.core.errors import SensibertError
from sensibert.deploy import costs
from sensibert.deploy.costs import Target, measure_costs
from sensibert.models import layout_of
from tests import runs
from tests.fresh import python_in_fork
from tests.helpers import tiny_model
from tests.test_plain_trainer import arguments, rows

pytestmark = pytest.mark.usefixtures("no_pictures")


def by_parameters(models, target):
    return [100 + layout_of(model).encoder_params / 10 for model in models]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return runs.workplace(tmp_path_factory.mktemp("measured"))


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(costs, "costs_of", by_parameters)


def finetune(here, output, budget, *more):
    files = ("--train-file", here / "train.csv", "--validation-file", here / "dev.csv")
    usual = ("--model", here / "model", *files, "--max-steps", 12, "--samples", 64, "--width-multiple", 8)
    return runs.command("finetune", *usual, "--budget", budget, "--output", output, *more, "--json")


def test_a_run_meets_a_budget_in_milliseconds(here, clock, tmp_path):
    done = finetune(here, tmp_path / "out", "50%latency")
    assert done.code == 0, done.err
    measured, result = done.json["measured"], json.loads((tmp_path / "out" / "result.json").read_text())
    assert measured == result["measured"] and result["budget"] == "50%latency"
    assert not any("budget" in text for text in result["warnings"])
    assert measured["budget"] == pytest.approx(measured["before"] / 2, rel=0.01)
    assert 0.9 * measured["budget"] <= measured["after"] <= 1.05 * measured["budget"]
    assert f"budget {measured['budget']:.4g} ms: one forward pass of 1 x 128 tokens in torch, 1 thread" in done.out
    assert runs.command("inspect", tmp_path / "out").out.count("budget: 50%latency") == 1


def test_a_run_meets_a_budget_in_megabytes(here, tmp_path):
    whole = (here / "model" / "model.safetensors").stat().st_size
    budget = f"{whole * 0.8 / 1e6:.4f}MB"
    done = finetune(here, tmp_path / "out", budget, "--weights", "fp32", "--vocabulary", "all")
    assert done.code == 0, done.err
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0.7 * whole <= size <= 0.8 * whole * 1.02
    assert done.json["measured"]["after"] == pytest.approx(size / 1e6, rel=0.03)


def test_the_file_of_the_budget_s_runtime_is_written_too(here, sizes_of_weights, one_table_of_onnx_ops, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    runs.model_folder(tmp_path / "model", num_hidden_layers=1)
    budget = ("90%size", "--runtime", "onnx-int8", "--model", tmp_path / "model")
    done = finetune(here, tmp_path / "out", *budget)
    assert done.code == 0, done.err
    graph = done.json["graph"]
    assert graph["files"]["onnx/model_quantized.onnx"] == (
        (tmp_path / "out/export/onnx/model_quantized.onnx").stat().st_size
    )
    assert set(graph["metrics"]) == {"model", "onnx", "int8"}


def test_a_resumed_run_has_the_costs_of_the_first(here, clock, tmp_path, monkeypatch):
    straight = finetune(here, tmp_path / "straight", "50%latency", "--save-steps", 6, "--keep-checkpoints")
    assert straight.code == 0, straight.err
    for name in ("straight", "straight.partial"):
        shutil.copytree(tmp_path / name, tmp_path / name.replace("straight", "out"))
    shutil.rmtree(tmp_path / "out.partial" / "checkpoint-12")
    monkeypatch.setattr(costs, "measure_costs", lambda *_: pytest.fail("measured again"))
    resumed = finetune(here, tmp_path / "out", "50%latency", "--save-steps", 6, "--resume", "--overwrite")
    assert resumed.code == 0, resumed.err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "out")]
    assert weights[0] == weights[1]


def test_a_plain_trainer_trims_to_milliseconds(clock, tmp_path):
    model, callback = tiny_model(), TrimCallback(TrimConfig("60%latency", width_multiple=8))
    Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[callback]).train()
    cost = by_parameters([model], None)[0]
    assert 0.9 * callback._allowed() <= cost <= 1.05 * callback._allowed() and callback.warnings == []


def test_a_table_from_another_device_is_used_and_not_measured_here(here, clock, tmp_path, monkeypatch):
    table = measure_costs(tiny_model(vocab_size=37), Target("latency"))
    CostTable.from_dict(table.to_dict() | {"device": "a phone"}).save(tmp_path / "phone.json")
    monkeypatch.setattr(costs, "costs_of", lambda *_: pytest.fail("measured on this device"))
    done = finetune(here, tmp_path / "out", "60%latency", "--latency-table", tmp_path / "phone.json")
    assert done.code == 0, done.err
    assert any("cannot be measured on this device" in text for text in done.json["warnings"])
    assert "by the table of costs" in done.out and "on a phone" in done.out


def test_a_plan_is_made_from_a_table(here, clock, tmp_path):
    measure_costs(tiny_model(vocab_size=37), Target("latency")).save(tmp_path / "table.json")
    scores = tmp_path / "scores.safetensors"
    assert runs.command("analyze", "--model", here / "model", "--method", "magnitude", "--output", scores).code == 0
    asked = ("plan", "--sensitivity", scores, "--budget", "60%latency", "--width-multiple", 8, "--dry-run")
    refused = runs.command(*asked)
    assert refused.code == 2 and "needs measured costs, want a table of `sensibert latency`" in refused.err
    for_size = runs.command(*asked[:3], "--budget", "60%size", "--dry-run")
    assert for_size.code == 2 and "60%size needs measured costs, want finetune or trim, which measure" in for_size.err
    done = runs.command(*asked, "--latency-table", tmp_path / "table.json", "--json")
    assert done.code == 0 and done.json["budget"] == "60%latency"


def test_trim_meets_a_budget_without_training(here, clock, tmp_path):
    asked = ("trim", "--model", here / "model", "--train-file", here / "train.csv", "--task", "embedding")
    done = runs.command(*asked, "--budget", "60%latency", "--width-multiple", 8, "--output", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    table = measure_costs(tiny_model("bert", "", vocab_size=37), Target("latency"))
    layout, budget = layout_of(runs_model(tmp_path / "out")), Budget(0.6, "latency", True, table=table)
    whole = layout_of(runs_model(here / "model"))
    assert spent(layout, counts_of(layout), budget) <= 0.6 * spent(whole, counts_of(whole), budget)


def runs_model(folder):
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder)


def test_the_command_writes_a_table_that_others_read(here, tmp_path, monkeypatch):
    monkeypatch.setattr("sensibert.deploy.timed_models.subprocess", SimpleNamespace(run=python_in_fork))
    done = runs.command(
        "latency", "--model", here / "model", "--save", tmp_path / "table.json", "--latency-shape", "2x8"
    )
    assert done.code == 0, done.err
    table = CostTable.load(tmp_path / "table.json")
    assert (table.batch, table.length, table.threads) == (2, 8, 1)
    assert "one forward pass of 2 x 8 tokens in torch, 1 thread" in done.out and "all else" in done.out


@pytest.mark.parametrize(
    "options, message",
    [
        (("--budget", "0.001ms"), "the smallest reachable budget is "),
        (("--budget", "9000ms"), "nothing would be trimmed, want less"),
        (
            ("--budget", "8ms", "--grid", "element"),
            "but masked weights cost what they did, want grid unit",
        ),
        (("--budget", "8ms", "--latency-shape", "1by128"), "latency_shape is '1by128', want rows x tokens"),
        (("--budget", "8ms", "--latency-table", "none.json"), "latency_table: none.json cannot be read"),
        (("--budget", "1MB", "--latency-table", "none.json"), "latency_table is given, and budget is 1MB"),
        (("--budget", "8ms", "--runtime", "tflite"), "runtime is 'tflite', want one of torch"),
        (("--budget", "1MB", "--runtime", "cuda"), "runtime is 'cuda', which has no file of its own"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused_before_training(here, clock, tmp_path, options, message):
    files = ("--train-file", here / "train.csv", "--max-steps", 12, "--output", tmp_path / "out")
    done = runs.command("finetune", "--model", here / "model", *files, *options)
    assert done.code == 2 and message in done.err and not (tmp_path / "out").exists(), done.err


def test_latency_wants_one_place_to_write(here, tmp_path):
    for given, message in (((), "are missing"), (("--save", "a.json", "--probes", "b"), "are both given")):
        done = runs.command("latency", "--model", here / "model", *given)
        assert done.code == 2 and f"save and probes {message}, want one of them" in done.err


def test_a_dry_run_does_not_measure(here, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "costs_of", lambda *_: pytest.fail("measured"))
    done = finetune(here, tmp_path / "out", "8ms", "--dry-run")
    assert done.code == 0 and done.json["budget"] == "8ms" and done.json["limit"] is None


def test_a_table_of_another_model_is_refused(here, clock, tmp_path):
    measure_costs(tiny_model(hidden_size=64), Target("latency")).save(tmp_path / "table.json")
    done = finetune(here, tmp_path / "out", "8ms", "--latency-table", tmp_path / "table.json")
    assert done.code == 2 and "latency_table: it is of a bert with hidden size 64" in done.err


def test_a_callback_needs_a_model_before_it_knows_its_costs():
    assert TrimCallback("8ms").budget.table is None
    with pytest.raises(SensibertError, match="is not a budget"):
        TrimCallback("8 mss")


def test_a_vocabulary_of_the_training_texts_makes_the_file_smaller(here, tmp_path):
    done = finetune(here, tmp_path / "out", "50%params", "--vocabulary", "train")
    assert done.code == 0, done.err
    result = done.json
    assert result["vocabulary_after"] < result["vocabulary_before"] and "vocabulary" in done.out
    assert result["total_params_before"] > result["total_params_after"]
    model = runs_model(tmp_path / "out")
    assert model.config.vocab_size == result["vocabulary_after"]
    scored = runs.command("eval", tmp_path / "out", "--validation-file", here / "dev.csv", "--json")
    assert scored.json["metrics"] == pytest.approx(result["metrics"])


def test_a_vocabulary_of_a_file_and_a_teacher_of_another_are_refused(here, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    done = finetune(here, tmp_path / "out", "50%params", "--vocabulary", tmp_path / "empty.txt")
    assert done.code == 2 and "empty.txt" in done.err
    done = finetune(here, tmp_path / "out", "50%params", "--vocabulary", "train", "--teacher", here / "model")
    assert done.code == 2 and "vocabulary and teacher are both given" in done.err


def test_a_family_with_a_budget_out_of_reach_is_refused_before_training(here, clock, steps, tmp_path):
    files = ("--train-file", here / "train.csv", "--max-steps", 12, "--output", tmp_path / "out")
    done = runs.command("finetune", "--model", here / "model", *files, "--budgets", "60,1%latency")
    assert done.code == 2 and "the smallest reachable budget is " in done.err, done.err
    assert steps == [] and not (tmp_path / "out").exists()


def test_a_family_of_measured_budgets_measures_once(here, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(costs, "costs_of", lambda models, target: calls.append(len(models)) or by_parameters(models, 0))
    files = ("--train-file", here / "train.csv", "--validation-file", here / "dev.csv", "--max-steps", 12)
    usual = ("--model", here / "model", *files, "--samples", 64, "--width-multiple", 8, "--output", tmp_path / "out")
    done = runs.command("finetune", *usual, "--budgets", "80,60%latency,50%params", "--json")
    assert done.code == 0, done.err
    rows = done.json["rows"]
    assert [row["folder"] for row in rows] == ["80-latency", "60-latency", "50-params"]
    assert rows[0]["encoder_params_after"] > rows[1]["encoder_params_after"]
    assert sum(count > 2 for count in calls) == 1  # one table; the others are of a plan, or of a result
