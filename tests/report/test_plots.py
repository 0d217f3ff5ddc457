"""Reports: the files they hold, and pictures that show what was kept."""

import csv
import importlib.util
import sys

import numpy as np
import pytest
import torch

from sensibert.core.artifacts import Sensitivity
from sensibert.models import layout_of
from sensibert.report.plots import CURVES_HEADER, write_report
from sensibert.report.tables import RANKING_HEADER
from tests.helpers import tiny_model

from .small import RESULT, block_plan, ranked, unit_plan


@pytest.fixture(scope="module")
def layout():
    return layout_of(tiny_model())


def picture(path) -> np.ndarray:
    from matplotlib import image

    return image.imread(path)[..., :3]


def test_a_report_holds_tables_and_pictures_with_something_in_them(tmp_path, layout):
    pyplot = "matplotlib.pyplot" in sys.modules
    files = write_report(tmp_path / "report", RESULT, ranked(layout), unit_plan(layout))
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


def test_a_report_draws_the_predicted_rise_of_the_loss(tmp_path, layout):
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


def test_a_report_of_a_run_without_ranking_or_plan(tmp_path):
    assert [p.name for p in write_report(tmp_path / "bare", RESULT, None, None)] == ["summary.txt"]


def test_without_matplotlib_the_summary_reports_it(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    files = write_report(tmp_path, RESULT, ranked(layout), unit_plan(layout))
    assert {file.name for file in files} == {"summary.txt", "ranking.csv"}
    assert (tmp_path / "summary.txt").read_text().endswith("\nNo pictures: matplotlib is not installed.\n")


def test_the_picture_of_a_block_plan_shows_the_kept_share_of_every_weight(tmp_path, layout):
    files = write_report(tmp_path, RESULT, None, block_plan(layout))
    assert {file.name for file in files} == {"summary.txt", "kept.png"}
    assert "encoder.layer.1.output.dense.weight" in (tmp_path / "summary.txt").read_text()
    half = np.array([0.128, 0.567, 0.551])  # viridis at one half
    assert (np.abs(picture(tmp_path / "kept.png") - half).max(-1) < 0.02).mean() > 0.1
