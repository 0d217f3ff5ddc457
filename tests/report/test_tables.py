"""The summary of a run and the ranking of its tensors."""

import pytest
import torch

from sensibert.core.artifacts import Sensitivity
from sensibert.core.grid import Grid
from sensibert.core.size_forms import form_lines
from sensibert.models import layout_of
from sensibert.report.tables import ranking, ranking_rows, summary
from tests.helpers import tiny_model

from .small import RESULT, block_plan, ranked, unit_plan


@pytest.fixture(scope="module")
def layout():
    return layout_of(tiny_model())


def test_the_summary_has_sizes_before_and_after_and_scores_at_the_cut_and_at_the_end():
    title, empty, *lines = summary(RESULT).splitlines()
    assert (title, empty) == ("text-classification, 50%params by fisher", "")
    assert lines[0].split() == ["before", "after", "left"]
    assert lines[2].split() == ["encoder", "parameters", "1,000,000", "500,000", "50.0", "%"]
    assert lines[3].split() == ["all", "parameters", "3,000,000", "2,500,000", "83.3", "%"]
    assert lines[4].split() == ["encoder", "GFLOPs", "at", "128", "tokens", "4.000", "1.000", "25.0", "%"]
    assert lines[6].split() == ["at", "the", "cut", "at", "the", "end"]
    assert lines[8].split() == ["accuracy", "0.9500", "0.9000"]
    assert lines[9].split() == ["f1", "-", "0.8000"]  # the model at the cut has no f1
    assert lines[10:] == ["", "At the cut: just before the model was trimmed."]
    known = summary(RESULT | {"cut_step": 40, "steps": 120}).splitlines()
    assert known[-1] == "At the cut: after 40 of 120 steps, just before the model was trimmed."


def test_results_with_the_old_names_have_the_same_summary():
    old = {name: value for name, value in RESULT.items() if name != "metrics_at_cut"}
    assert summary(old | {"metrics_dense": RESULT["metrics_at_cut"]}) == summary(RESULT)
    at_end = {"metrics_at_cut": None}
    assert summary(RESULT | at_end | {"method": "dense"}) == summary(RESULT | at_end | {"method": "baseline"})


def test_the_summary_of_a_baseline_has_scores_at_the_end_only():
    lines = summary(RESULT | {"method": "baseline", "budget": None, "metrics_at_cut": None}).splitlines()
    assert lines[0] == "text-classification, baseline (not trimmed)"
    assert [line.split() for line in lines[8:]] == [
        ["at", "the", "end"],
        ["--------", "----------"],
        ["accuracy", "0.9000"],
        ["f1", "0.8000"],
    ]


def test_the_summary_without_validation_has_no_scores():
    lines = summary(RESULT | {"metrics": None, "metrics_at_cut": None}).splitlines()
    assert len(lines) == 7 and lines[-1].startswith("encoder GFLOPs")


FORMS = [
    {"weights": "fp32", "vocabulary": None, "mb_saved": 0.0, "heads_and_neurons": None, "loss": None, "chosen": False},
    {"weights": "fp16", "vocabulary": None, "mb_saved": 45.0, "loss_alone": 0.0, "chosen": True}
    | {"heads_and_neurons": 0.9, "loss": 0.01},
    {"weights": "fp32", "vocabulary": 3343, "mb_saved": 40.0, "loss_alone": 0.02, "chosen": False}
    | {"heads_and_neurons": 0.4, "loss": 0.5},
]


def test_what_bits_and_pieces_cost_alone_is_told_from_whole_forms():
    lines = form_lines({"rows": 40, "of": "validation", "loss_before": 0.7, "forms": FORMS})
    assert lines == [
        "40 validation rows at the cut, loss 0.7000",
        "weights in fp16 alone: 45 MB less, loss +0, +0 a MB",
        "3,343 pieces alone: 40 MB less, loss +0.02, +0.0005 a MB",
        "weights in fp32, all pieces: cannot meet the budget",
        "weights in fp16, all pieces: 90 % of heads and neurons, loss +0.01, chosen",
        "weights in fp32, 3,343 pieces: 40 % of heads and neurons, loss +0.5",
    ]


@pytest.mark.parametrize(("threads", "shown"), [(1, "1 thread."), (2, "2 threads.")])
def test_one_thread_is_no_threads(threads, shown):
    latency = {"length": 128, "threads": threads, "batch_1_ms": {"before": 2.0, "after": 1.0}}
    assert f"Latency: one forward pass on the CPU, {shown}" in summary(RESULT | {"latency": latency}).splitlines()


def test_the_ranking_is_most_sensitive_first_with_units_kept(layout):
    sensitivity = ranked(layout)
    rows = ranking_rows(sensitivity, unit_plan(layout))
    assert [row[0] for row in rows] == list(range(1, 13))  # q, k, v, o, up, down of two layers
    assert [float(row[2]) for row in rows] == sorted((float(row[2]) for row in rows), reverse=True)
    kept = {row[1]: row[3:] for row in rows}
    assert kept["encoder.layer.1.attention.self.query.weight"] == (0, 4)
    assert kept["encoder.layer.0.intermediate.dense.weight"] == (32, 64)
    assert ranking_rows(sensitivity)[0][3:] == (4, 4)


def test_the_ranking_as_text_has_the_first_tensors(layout):
    sensitivity = ranked(layout)
    lines = ranking(sensitivity, 3).splitlines()
    assert len(lines) == 5 and lines[2].split() == ["1", ranking_rows(sensitivity)[0][1], "1.000e+00", "4"]
    assert lines[0].startswith("rank  tensor ") and len({line.index("e") for line in lines[2:]}) == 1


def test_with_a_grid_the_ranking_counts_blocks(layout):
    scores = {w.parameter: torch.ones(Grid.block(8, 8).shape(w.rows, w.cols)) for w in layout.weights}
    scored = Sensitivity(layout, scores, "fisher", tensors=ranked(layout).tensors, grid=Grid.block(8, 8))
    rows = {row[1]: row[3:] for row in ranking_rows(scored, block_plan(layout))}
    assert rows["encoder.layer.0.intermediate.dense.weight"] == (16, 32)  # every other of 8 rows of 4 blocks


def test_the_summary_has_the_score_of_the_baseline_if_it_was_measured():
    measured = {"metrics_baseline": {"accuracy": 0.96}, "steps": 120, "seconds": {"baseline": 12.3}}
    lines = summary(RESULT | measured).splitlines()
    assert lines[8].split() == ["at", "the", "cut", "at", "the", "end", "baseline"]
    assert lines[10].split() == ["accuracy", "0.9500", "0.9000", "0.9600"]
    assert "Baseline: the same run without trimming, 120 steps (from the cut on 12 s)." in lines


def test_the_summary_tells_how_a_floor_was_met():
    row = {"budget": "46%params", "rows": "checking", "score": 0.7613, "of_baseline": 1.0, "holds": True, "seconds": 7}
    kept = {"floor": 0.99, "metric": "accuracy", "rows": 863, "intervals": "95 %", "tried": [row]}
    for name, value in (("score", 0.76), ("baseline", 0.76), ("difference", 0.0), ("of_baseline", 1.0)):
        kept |= {name: value, f"{name}_interval": [value - 0.03, value + 0.03]}
    text = summary(RESULT | {"keep": kept})
    assert "46%params checking 0.7613 100.0 % holds 7 s" in " ".join(text.split())
    assert "percent of the baseline: 100.0 (97.0 to 103.0). Intervals: 95 %." in text
