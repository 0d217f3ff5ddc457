"""Sensitivities compare by value, are read only if they fit their layout, and predict between the points of a curve."""

from dataclasses import replace

import pytest
import torch

from sensibert.core.artifacts import Sensitivity
from sensibert.core.errors import SensibertError
from sensibert.core.grid import Grid

from .small import GRID, layout, sensitivity


def test_sensitivities_that_differ_anywhere_are_not_equal():
    scores = sensitivity().scores
    first = Sensitivity(layout(), scores, "fisher", 1024, seed=3)
    assert first == Sensitivity(layout(), {name: score.clone() for name, score in scores.items()}, "fisher", 1024, 3)
    assert first != Sensitivity(layout(), scores, "fisher", 1024, seed=4)
    other = scores | {"layer.0.head": scores["layer.0.head"] + 1}
    assert first != Sensitivity(layout(), other, "fisher", 1024, seed=3)
    assert first != Sensitivity(layout(), {"layer.0.head": scores["layer.0.head"]}, "fisher", 1024, seed=3)
    assert first != "a sensitivity"


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"layer.0.head": torch.zeros(3)},
            r"scores of layer.0.head are torch.float32 \(3,\), want torch.float32 \(4",
        ),
        ({"layer.0.ffn": torch.zeros(6).half()}, r"scores of layer.0.ffn are torch.float16 \(6,\), want torch.float32"),
        ({"layer.0.ffn": torch.zeros(6, 1)}, r"scores of layer.0.ffn are torch.float32 \(6, 1\), want"),
    ],
)
def test_a_file_of_scores_that_do_not_fit_is_refused(tmp_path, changed, message):
    made = sensitivity()
    replace(made, scores=made.scores | changed).save(tmp_path / "file")
    with pytest.raises(SensibertError, match=f"file: not a readable sensibert sensitivity file .*{message}"):
        Sensitivity.load(tmp_path / "file")


def test_a_file_of_scores_of_blocks_is_read():
    scores = {w.parameter: torch.rand(GRID.shape(w.rows, w.cols)) for w in layout().weights}
    facts = {"layout": layout(), "statistic": "fisher", "grid": GRID}
    assert Sensitivity._of_file(scores, facts).grid == GRID
    with pytest.raises(SensibertError, match=r"scores of up.weight are torch.float32 \(2, 2\), want .* \(6, 32\)"):
        Sensitivity._of_file(scores, facts | {"grid": Grid.element()})


def test_the_course_of_the_loss_is_linear_between_the_points_of_a_curve():
    made = replace(sensitivity(), curves={"layer.0.ffn": [(0, 0.0), (2, 1.0), (6, 5.0)]})
    assert [made.predicted_rise("layer.0.ffn", gone) for gone in (0, 1, 2, 4, 6)] == [0, 0.5, 1, 3, 5]
    for site, gone, message in (
        ("layer.0.ffn", 7, "gone is 7, want 0 to 6 units of layer.0.ffn"),
        ("layer.0.ffn", -1, "gone is -1, want 0 to 6"),
        ("layer.0.head", 1, "site is 'layer.0.head', want one of layer.0.ffn"),
    ):
        with pytest.raises(SensibertError, match=f"^predicted_rise: {message}"):
            made.predicted_rise(site, gone)
    with pytest.raises(SensibertError, match="site is 'layer.0.ffn', want a sensitivity of method obs"):
        sensitivity().predicted_rise("layer.0.ffn", 1)
