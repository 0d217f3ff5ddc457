"""What people look at: aligned tables, the ranking, and pictures that show what was kept."""

import csv
import importlib.util
import sys

import numpy as np
import pytest
import torch

from sensibert.core.artifacts import Plan, Sensitivity
from sensibert.core.budget import Budget
from sensibert.models import layout_of
from sensibert.report.plots import CURVES_HEADER, write_report
from sensibert.report.tables import RANKING_HEADER, ranking, ranking_rows, share, structure_rows, summary, table
from tests.helpers import tiny_model

RESULT = {
    "task": "text-classification",
    "budget": "50%params",
    "scope": "encoder",
    "flops_length": 128,
    "method": "fisher",
    "encoder_params_before": 1_000_000,
    "encoder_params_after": 500_000,
    "total_params_before": 3_000_000,
    "total_params_after": 2_500_000,
    "flops_before": 4e9,
    "flops_after": 1e9,
    "metrics": {"accuracy": 0.9, "f1": 0.8},
    "metrics_dense": {"accuracy": 0.95},
}


@pytest.fixture(scope="module")
def layout():
    return layout_of(tiny_model())


@pytest.fixture(scope="module")
def plan(layout):
    keep = {site.name: torch.arange(site.units) % 2 == 0 for site in layout.sites}
    keep["layer.1.head"][:] = False  # a whole attention block is gone
    return Plan(layout, keep, Budget.parse("50%params"), "fisher")


@pytest.fixture(scope="module")
def sensitivity(layout):
    names = sorted({m.parameter for site in layout.sites for m in site.members if m.parameter.endswith("weight")})
    scores = {site.name: torch.ones(site.units) for site in layout.sites}
    ranked = {name: 1.0 / (place + 1) for place, name in enumerate(names)}
    return Sensitivity(layout, scores, "fisher", 64, tensors=ranked)


def test_a_table_aligns_first_column_left_and_the_others_right():
    assert table(("", "a", "long head"), [("x", 1234567, "b"), ("longer", 2, 0.5)]).splitlines() == [
        "                a  long head",
        "------  ---------  ---------",
        "x       1,234,567          b",
        "longer          2        0.5",
    ]


def test_a_table_without_rows_is_its_header():
    assert table(("name", "n"), []).splitlines() == ["name  n", "----  -"]


def test_shares_of_nothing_are_a_dash():
    assert (share(1, 4), share(0, 3), share(1, 0)) == ("25.0 %", "0.0 %", "-")


def test_the_summary_names_both_sizes_flops_and_metrics():
    title, empty, *lines = summary(RESULT).splitlines()
    assert (title, empty) == ("text-classification, 50%params by fisher", "")
    assert lines[0].split() == ["dense", "trimmed", "left"]
    assert lines[2].split() == ["encoder", "parameters", "1,000,000", "500,000", "50.0", "%"]
    assert lines[3].split() == ["all", "parameters", "3,000,000", "2,500,000", "83.3", "%"]
    assert lines[4].split() == ["encoder", "GFLOPs", "at", "128", "tokens", "4.000", "1.000", "25.0", "%"]
    assert lines[5].split() == ["accuracy", "0.9500", "0.9000"]
    assert lines[6].split()[-2:] == ["-", "0.8000"]  # the snapshot was not scored by it
    assert lines[7:] == ["", "The dense scores are those of this run just before the cut."]


def test_the_summary_of_a_dense_run_or_one_without_validation():
    dense = summary(RESULT | {"method": "dense", "metrics_dense": None})
    assert dense.splitlines()[0] == "text-classification, dense"
    assert dense.splitlines()[2].split() == ["dense", "tuned", "left"] and "The dense" not in dense
    assert len(summary(RESULT | {"metrics": None, "metrics_dense": None}).splitlines()) == 7


def test_structure_rows_count_what_a_plan_keeps(layout, plan):
    assert structure_rows(layout) == [("layer 0", 4, 4, 64, 64), ("layer 1", 4, 4, 64, 64)]
    assert structure_rows(layout, plan.keep) == [("layer 0", 2, 4, 32, 64), ("layer 1", 0, 4, 32, 64)]


def test_the_ranking_is_most_sensitive_first_with_units_kept(sensitivity, plan):
    rows = ranking_rows(sensitivity, plan)
    assert [row[0] for row in rows] == list(range(1, 13))  # q, k, v, o, up, down of two layers
    assert [float(row[2]) for row in rows] == sorted((float(row[2]) for row in rows), reverse=True)
    kept = {row[1]: row[3:] for row in rows}
    assert kept["encoder.layer.1.attention.self.query.weight"] == (0, 4)
    assert kept["encoder.layer.0.intermediate.dense.weight"] == (32, 64)
    assert ranking_rows(sensitivity)[0][3:] == (4, 4)


def test_the_ranking_for_people_names_the_first_tensors(sensitivity):
    lines = ranking(sensitivity, 3).splitlines()
    assert len(lines) == 5 and lines[2].split() == ["1", ranking_rows(sensitivity)[0][1], "1.000e+00", "4"]
    assert lines[0].startswith("rank  tensor ") and len({line.index("e") for line in lines[2:]}) == 1


def picture(path) -> np.ndarray:
    from matplotlib import image

    return image.imread(path)[..., :3]


def test_a_report_holds_tables_and_pictures_with_something_in_them(tmp_path, sensitivity, plan):
    pyplot = "matplotlib.pyplot" in sys.modules
    files = write_report(tmp_path / "report", RESULT, sensitivity, plan)
    assert ("matplotlib.pyplot" in sys.modules) == pyplot  # it would choose a backend for the whole process
    assert {file.name for file in files} == {"summary.txt", "ranking.csv", "kept.png", "sensitivity.png"}
    text = (tmp_path / "report" / "summary.txt").read_text()
    assert "encoder parameters" in text and "layer 1" in text
    with open(tmp_path / "report" / "ranking.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == RANKING_HEADER and len(rows) == 13 and rows[1][0] == "1"
    for name in ("kept.png", "sensitivity.png"):
        pixels = picture(tmp_path / "report" / name)
        assert min(pixels.shape[:2]) > 300
        assert 0.02 < (pixels < 0.98).any(-1).mean() < 0.98, name  # neither blank nor one block of colour
    blue = np.abs(picture(tmp_path / "report" / "kept.png") - np.array([0x2F, 0x6F, 0x9F]) / 255).max(-1) < 0.02
    assert blue.mean() > 0.02  # the bars of what was kept


def test_a_report_draws_what_the_loss_is_predicted_to_rise_by(tmp_path, layout):
    curves = {s.name: [(0, 0.0), (s.units // 2, -1e-3 * s.layer), (s.units, 0.1 + s.layer)] for s in layout.sites}
    scores = {site.name: torch.ones(site.units) for site in layout.sites}
    files = write_report(tmp_path, RESULT, Sensitivity(layout, scores, "obs", 64, curves=curves), None)
    assert {file.name for file in files} == {"summary.txt", "curves.csv", "curves.png"}
    with open(tmp_path / "curves.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == CURVES_HEADER and len(rows) == 1 + 3 * len(layout.sites)
    assert ["layer.1.ffn", "64", "64", "1.1000e+00"] in rows
    pixels = picture(tmp_path / "curves.png")
    assert min(pixels.shape[:2]) > 300 and 0.02 < (pixels < 0.98).any(-1).mean() < 0.98


def test_a_report_of_a_run_without_ranking_or_plan(tmp_path, plan):
    assert [p.name for p in write_report(tmp_path / "bare", RESULT, None, None)] == ["summary.txt"]


def test_without_matplotlib_there_is_a_sentence(tmp_path, sensitivity, plan, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    files = write_report(tmp_path, RESULT, sensitivity, plan)
    assert {file.name for file in files} == {"summary.txt", "ranking.csv"}
    assert (tmp_path / "summary.txt").read_text().endswith("\nNo pictures: matplotlib is not installed.\n")
