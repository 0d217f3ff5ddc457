"""The accuracy bench on a tiny model: who runs, from where, and what the rows say."""

import argparse
import json
import shutil
import sys

import bench_accuracy as bench
import pytest
import torch
from _rows import KEY, condense, summarize
from safetensors.torch import load_file

from sensibert.training.checkpoints import partial_folder
from tests import runs


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with model and data; the bench's rows go there too, and nothing is drawn."""
    runs.model_folder(tmp_path / "model")
    (tmp_path / "toy").mkdir()
    runs.sentence_file(tmp_path / "toy" / "train.csv", 64, seed=1)
    runs.sentence_file(tmp_path / "toy" / "validation.csv", 40, seed=2)
    for name in ("RUNS", "ABLATION"):
        monkeypatch.setattr(bench, name, tmp_path / f"{name.lower()}.jsonl")
    monkeypatch.setattr("sensibert.run_output.write_report", lambda *args: [])
    return tmp_path


def start(here, monkeypatch, *more):
    usual = ("--data", here, "--model", here / "model", "--task", "toy", "--work", here / "work", "--seeds", 0)
    monkeypatch.setattr(sys, "argv", list(map(str, ("bench_accuracy", *usual, "--epochs", 3, *more))))
    bench.main()
    return bench.read(bench.RUNS)


def test_every_method_takes_the_same_steps_and_none_runs_twice(here, monkeypatch):
    methods = ("dense", "ours", "uniform", "layers")
    rows = start(here, monkeypatch, "--methods", *methods)
    assert [row["method"] for row in rows] == [*methods[1:], "dense"] and {row["steps"] for row in rows} == {6}
    _, uniform, layers, dense = rows
    assert dense["encoder_params_after"] == dense["encoder_params_before"]
    assert layers["encoder_params_after"] == layers["encoder_params_before"] // 2  # a whole layer
    assert uniform["encoder_params_after"] < layers["encoder_params_after"]
    assert [p.name for p in (here / "work").iterdir()] == ["toy-0-epochs=3.0-learning_rate=0.0001-warm"]
    monkeypatch.setattr(bench, "run", None)
    assert start(here, monkeypatch, "--methods", *methods) == rows
    shares = {row["case"]: row["encoder_share"] for row in summarize(bench.read(bench.RUNS))}
    assert shares["toy 50%params layers"] == 0.5 and shares["toy 100%params dense"] == 1


def test_an_ablation_is_a_row_of_its_own_and_not_in_the_summary(here, monkeypatch):
    more = ("--train-rows", 48, "--max-steps", 3)
    start(here, monkeypatch, "--methods", "dense", *more)
    summary = bench.RUNS.read_text()
    requested = ("--override", "recover_peak=1", "--override", "policy=uniform", *more)
    start(here, monkeypatch, *requested)
    (row,) = bench.read(bench.ABLATION)
    assert row["case"] == "toy 50%params ours, allocation uniform, recover_peak 1" and bench.RUNS.read_text() == summary
    assert row["override"] == {"recover_peak": 1, "allocation": "uniform"}
    assert (row["train_rows"], row["steps"]) == (48, 3)
    assert row["rival"] == "dense" and row["value"] == pytest.approx(row["ratio"] * row["rival_value"], abs=0.02)
    monkeypatch.setattr(bench, "run", None)
    start(here, monkeypatch, *requested)


def test_a_run_in_another_precision_is_another_run(here, monkeypatch):
    start(here, monkeypatch, "--methods", "dense")
    full, half = start(here, monkeypatch, "--methods", "dense", "--precision", "bf16")
    assert "precision" not in full and half["precision"] == "bf16"
    assert bench.identity(full) != bench.identity(half)
    requested = {name: half[name] for name in KEY if name in half}
    assert bench.options_of(requested, model="", output="").precision == "bf16"
    assert bench.folder_name(requested, {}) != bench.folder_name({**requested, "precision": "fp32"}, {})


def test_another_recovery_is_another_run_from_the_same_warm_up_beside_the_same_dense_run(here, monkeypatch):
    start(here, monkeypatch, "--methods", "dense", "ours")
    usual, dense, kept = start(here, monkeypatch, "--methods", "dense", "ours", "--recovery", "continue")
    assert "recovery" not in usual and "recovery" not in dense and kept["recovery"] == "continue"
    assert len(list((here / "work").iterdir())) == 1  # the warm-up
    requested = {name: kept[name] for name in KEY if name in kept}
    assert bench.options_of(requested, model="", output="").trim.schedule.recovery == "continue"
    scores = [row for row in summarize(bench.read(bench.RUNS)) if row["metric"] == "score" and "ours" in row["case"]]
    controls = {row.get("recovery"): row["rival_value"] for row in scores}
    assert controls == {None: 100 * dense["score"], "continue": 100 * dense["score"]}


def test_embeddings_that_learn_or_not_are_another_run_of_every_method_but_the_dense_one(here, monkeypatch):
    budget = ("--budgets", "60%params")
    usual, dense = start(here, monkeypatch, *budget, "--methods", "ours", "dense")
    *_, learns = start(here, monkeypatch, *budget, "--methods", "ours", "dense", "--no-freeze-embeddings")
    *_, frozen = start(here, monkeypatch, *budget, "--methods", "ours", "--freeze-embeddings")
    assert "freeze_embeddings" not in usual | dense and len(bench.read(bench.RUNS)) == 4
    for row, requested in ((learns, False), (frozen, True)):
        wanted = {name: row[name] for name in KEY if name in row}
        assert bench.options_of(wanted, model="", output="").trim.schedule.freeze_embeddings is requested
    scores = [row for row in summarize(bench.read(bench.RUNS)) if row["metric"] == "score" and "ours" in row["case"]]
    assert {row.get("freeze_embeddings") for row in scores} == {None, False, True}
    assert {row["rival_value"] for row in scores} == {100 * dense["score"]}


def test_a_run_of_half_notes_that_its_embeddings_are_frozen(here, monkeypatch):
    """Rows of half without a note are those whose embeddings learn, as they all once did."""
    rows = start(here, monkeypatch, "--methods", "ours", "dense")
    assert [row.get("freeze_embeddings") for row in rows] == [True, None]
    requested = []
    whole = bench.options_of
    monkeypatch.setattr(bench, "options_of", lambda key, **usual: requested.append(key) or whole(key, **usual))
    *_, learns = start(here, monkeypatch, "--methods", "ours", "--no-freeze-embeddings")
    assert "freeze_embeddings" not in learns and [key["freeze_embeddings"] for key in requested] == [False]
    start(here, monkeypatch, "--methods", "ours", "--no-freeze-embeddings")
    assert len(requested) == 1, "it was run already"


def test_a_dense_run_from_the_warm_up_is_the_dense_run(here, monkeypatch):
    weights, evaluate = [], bench.evaluate_folder

    def look(options):
        weights.append(load_file(f"{options.model}/model.safetensors"))
        return evaluate(options)

    monkeypatch.setattr(bench, "evaluate_folder", look)
    start(here, monkeypatch, "--methods", "dense")
    bench.RUNS.unlink()
    start(here, monkeypatch, "--methods", "ours", "dense")
    alone, _, branched = weights
    assert all(torch.equal(alone[name], branched[name]) for name in alone | branched)


def test_an_interrupted_layer_run_begins_again_from_the_warm_up(here, monkeypatch):
    """Its own checkpoints would bring the dropped layers back."""
    (whole,) = start(here, monkeypatch, "--methods", "layers")
    requested = {name: whole[name] for name in KEY if name in whole}
    partial = partial_folder(here / "work" / bench.folder_name(requested, {}, "50%params", "layers"))
    shutil.copytree(here / "work" / bench.folder_name(bench.before_the_cut(requested), {}, "warm"), partial)
    bench.RUNS.unlink()
    (again,) = start(here, monkeypatch, "--methods", "layers")
    assert again["score"] == whole["score"] and not partial.exists()


def test_only_what_changes_the_dense_steps_splits_the_warm_up():
    before = bench.before_the_cut
    assert before({"recover_peak": 1.0, "teacher": "snapshot", "distil": 0.7}) == {}
    assert before({"trim_start": 0.5, "method": "taylor"}) == {"trim_start": 0.5}
    assert before({"teacher": "folder", "distil": 0.7}) == {"teacher": "folder", "distil": 0.7}


def test_overrides_are_read_as_json_and_unknown_names_are_told():
    parsed = [bench.parse_override(f"step={text}")[1] for text in ("1e-4", "8", "true", "null", "none", "cubic")]
    assert parsed == [1e-4, 8, True, None, None, "cubic"]
    for text in ("stepp=1", "step", "seed=1"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not name=value with a name of .*recover_peak"):
            bench.parse_override(text)


def test_a_subset_is_always_the_same_and_no_larger_than_the_set(tmp_path):
    (tmp_path / "toy").mkdir()
    train = runs.sentence_file(tmp_path / "toy" / "train.csv", 30)
    questions = runs.question_file(tmp_path / "toy" / "train.jsonl", 10)
    first = bench.subset(bench.Path(train), 7, tmp_path).read_text()
    assert first == bench.subset(bench.Path(train), 7, tmp_path).read_text() and len(first.splitlines()) == 8
    assert set(first.splitlines()) <= set(open(train).read().splitlines())
    rows = [json.loads(line) for line in bench.subset(bench.Path(questions), 3, tmp_path).read_text().splitlines()]
    assert len(rows) == 3 and all(row["answers"]["text"] == ["anna"] for row in rows)
    with pytest.raises(SystemExit, match="--train-rows is 31, want 1 to 30"):
        bench.subset(bench.Path(train), 31, tmp_path)


def test_the_cost_counts_each_step_by_what_is_left_of_the_model():
    result = {"steps": 12, "flops_before": 100, "flops_after": 50}
    requested = {"method": "ours", "budget": "50%params"}

    def cost(**more):
        return bench.dense_steps(bench.options_of(requested | more, model="", output=""), result)

    assert cost(method="dense") == 12
    assert cost() == 4 + 8 * 0.5
    halfway = 0.5 + 0.5 * 0.5**3  # after the first of two cuts
    assert cost(override={"schedule": "cubic", "milestones": 2, "trim_duration": 0.25}) == round(
        4 + 3 * halfway + 5 * 0.5, 1
    )


def run_row(seed=0, method="ours", score=0.5, **more):
    sizes = {"encoder_params_before": 100, "encoder_params_after": 50, "steps": 9}
    row = {"task": "toy", "budget": "50%params", "method": method, "seed": seed, "epochs": 3.0, "learning_rate": 1e-4}
    return row | sizes | {"score": score, "device": "d", "torch": "t", "commit": "c", "date": "today"} | more


def test_only_runs_of_one_setting_are_averaged_and_compared():
    dense = run_row(method="dense", budget="100%params", score=0.8)
    rows = summarize([dense, run_row(), run_row(1, score=0.6), run_row(train_rows=10, score=0.1)])
    scores = {(r["case"], r.get("train_rows")): (r["value"], r["ratio"]) for r in rows if r["metric"] == "score"}
    assert scores["toy 50%params ours", None] == (55, None)  # no dense run of seed 1
    assert scores["toy 50%params ours", 10] == (10, None)
    (row,) = [r for r in summarize([dense, run_row()]) if r["case"].endswith("ours") and r["metric"] == "score"]
    assert (row["value"], row["rival_value"], row["ratio"], row["seeds"]) == (50, 80, 0.625, 1)


def test_a_run_that_was_made_again_counts_once_as_it_was_last():
    first, again = run_row(1, score=0.9), run_row(1, score=0.8) | {"commit": "later"}
    scores = [row for row in summarize([first, run_row(2, score=0.7), again]) if row["metric"] == "score"]
    assert [(row["value"], row["seeds"]) for row in scores] == [(75.0, 2)]


def test_runs_that_are_excluded_with_a_reason_count_nowhere():
    bad = run_row(1, score=0.9) | {"excluded": "its dense run did not learn"}
    (row,) = [r for r in summarize([run_row(), bad]) if r["metric"] == "score"]
    assert (row["value"], row["seeds"]) == (50, 1)


def test_the_masked_matmul_is_condensed_to_medians_over_layers_and_tokens():
    def one(case, value, metric="vs_dense", rival=None, device="GPU", **more):
        row = {"bench": "bench_masked_linear", "case": case, "metric": metric, "value": value, "unit": "1"}
        return row | {"rival": rival, "rival_value": 9.0, "ratio": value, "device": device} | dict(torch="t", **more)

    facts = {"commit": "c", "date": "d"}
    layers = (("up", 1), ("down", 4), ("attention", 3))
    gpu = [one(f"default row:0.5 base.{layer} 4096 step", value, **facts) for layer, value in layers]
    naive = [one(f"default row:0.5 base.up {m} step", m, "us", "F.linear(x, W*M)", **facts) for m in (2, 4)]
    dropped = one("default row:0.5 base.up 4096 dX", 5, "us", "dense", **facts)
    cpu = one("default row:0.5 base.up 512 step", 5, "us", "dense", "CPU x 1")
    other = {"bench": "bench_step", "case": "any", "device": "GPU"}
    rows = condense([other, *gpu, *naive, dropped, cpu, cpu | {"case": "default row:0.25 base.up 512 step"}])
    assert rows[:2] == [other, cpu] and len(rows) == 4
    shown = [[row[name] for name in ("case", "metric", "value", "least", "most", "cases")] for row in rows[2:]]
    assert shown == [["default row:0.5 step", "vs_dense", 3, 1, 4, 3], ["default row:0.5 step", "speedup", 3, 2, 4, 2]]
    assert condense(rows) == rows
