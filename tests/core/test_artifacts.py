"""Sensitivities compare by value. What their curves predict is tested with the method that makes them."""

from sensibert.core.artifacts import Sensitivity

from .small import layout, sensitivity


def test_sensitivities_that_differ_anywhere_are_not_equal():
    scores = sensitivity().scores
    first = Sensitivity(layout(), scores, "fisher", 1024, seed=3)
    assert first == Sensitivity(layout(), {name: score.clone() for name, score in scores.items()}, "fisher", 1024, 3)
    assert first != Sensitivity(layout(), scores, "fisher", 1024, seed=4)
    other = scores | {"layer.0.head": scores["layer.0.head"] + 1}
    assert first != Sensitivity(layout(), other, "fisher", 1024, seed=3)
    assert first != Sensitivity(layout(), {"layer.0.head": scores["layer.0.head"]}, "fisher", 1024, seed=3)
    assert first != "a sensitivity"
