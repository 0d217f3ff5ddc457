"""Reports: the files they hold, and pictures that show what was kept."""

import csv
import importlib.util
import sys

import numpy as np
import pytest
import torch

from sensibert.core.artifacts import Sensitivity
from sensibert.models import layout_of
from sensibert.report.history import read_history
from sensibert.report.plots import CURVES_HEADER, write_report
from sensibert.report.tables import RANKING_HEADER
from tests.helpers import tiny_model

from .small import MOMENTS, RESULT, block_plan, ranked, unit_plan


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


def test_rises_that_a_logarithm_cannot_show_are_triangles_with_a_note(tmp_path, layout, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kwargs: drawn.append(figure))
    scores = {site.name: torch.ones(site.units) for site in layout.sites}
    for fall, note in ((-0.1, "Triangles: a rise below 0.0001, or a fall."), (0.1, None)):
        curves = {s.name: [(0, 0.0), (s.units // 2, fall if s.layer else 0.2), (s.units, 0.3)] for s in layout.sites}
        write_report(tmp_path, RESULT, Sensitivity(layout, scores, "obs", 64, curves=curves), None)
        figure = drawn.pop()
        heads = figure.axes[0]
        marked = [list(line.get_ydata()) for line in heads.lines if line.get_marker() == "v"]
        assert marked == ([[1e-4]] if note else [])
        assert (figure.get_supxlabel() or None) == note
        for line in heads.lines:  # the loss does not rise before anything is removed: no point there
            assert min(line.get_xdata()) > 0 and min(line.get_ydata()) >= 1e-4


def test_every_cell_has_its_number_and_one_hot_tensor_leaves_the_others_apart(tmp_path, layout, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kwargs: drawn.append(figure))
    scores = {site.name: torch.ones(site.units) for site in layout.sites}
    names = list(ranked(layout).tensors)
    tensors = {name: 2e-6 * (1 + number) for number, name in enumerate(names)} | {names[-1]: 1.0, names[0]: 0.0}
    write_report(tmp_path, RESULT, Sensitivity(layout, scores, "fisher", 64, tensors=tensors), None)
    axis, bar = drawn.pop().axes
    texts = [text.get_text() for text in axis.texts]
    assert len(texts) == 12 and {"0.0", "4.0", "22.0", "1,000,000"} <= set(texts)
    assert bar.get_ylabel().endswith("(numbers: in 1e-6)")
    image = axis.get_images()[0]
    shades = sorted(image.norm(value) for value in tensors.values())
    assert shades[-1] == 1 and shades[1] < shades[5] < shades[-2] < 0.2 < 0.02 + shades[-2] - shades[1] + 0.2
    drawn.clear()
    write_report(tmp_path, RESULT, None, block_plan(layout))
    assert {text.get_text() for text in drawn[0].axes[0].texts} == {"50"}


def test_a_run_is_drawn_with_its_cut(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kwargs: drawn.append(figure))
    files = write_report(tmp_path, RESULT, None, None, MOMENTS)
    assert {file.name for file in files} == {"summary.txt", "run.csv"} and read_history(tmp_path / "run.csv") == MOMENTS
    loss, score, size = drawn.pop().axes
    assert [axis.get_title(loc="left") for axis in (loss, score, size)] == [
        *("training loss", "accuracy", "encoder parameters left")
    ]
    assert [list(axis.lines[0].get_xdata()) for axis in (loss, score, size)] == [[2, 4, 6], [3, 6], [0, 2, 3, 4, 6, 6]]
    assert list(size.lines[0].get_ydata()) == [1, 1, 0.5, 0.5, 0.5, 0.5]
    for axis in (loss, score, size):
        assert list(axis.lines[-1].get_xdata()) == [3, 3]  # the cut
    write_report(tmp_path, RESULT | {"metrics": None}, None, None, [MOMENTS[0], MOMENTS[-1]._replace(score=None)])
    assert len(drawn.pop().axes) == 2  # no score, no cut


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
