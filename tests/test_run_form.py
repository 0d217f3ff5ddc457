"""What the form of a file costs is said."""

import pytest

from sensibert.core.config import TrimConfig
from sensibert.run_form import Taken, precisions


def taken(weights="fp16", fewer=False, budgeted=False):
    return Taken(tokenizer=None, weights=weights, fewer=fewer, budgeted=budgeted)


def test_a_form_that_loses_is_worth_a_warning():
    (text,) = taken().warnings("accuracy", {"accuracy": 0.9}, {"accuracy": 0.89})
    assert "accuracy is 0.8900 as the file holds the model, and was 0.9000 as it was trained" in text
    assert taken().warnings("accuracy", {"accuracy": 0.9}, {"accuracy": 0.899}) == []
    assert taken().warnings("accuracy", None, {"accuracy": 0.1}) == []
    assert taken().warnings("accuracy", {"accuracy": 0.9}, None) == []


@pytest.mark.parametrize(
    ("form", "ways"),
    [
        (taken(), "--weights fp32"),  # with a budget of parameters, a larger one would not help
        (taken("fp32", fewer=True, budgeted=True), "a larger budget or --vocabulary all"),
        (taken("fp16", fewer=True, budgeted=True), "a larger budget or --vocabulary all or --weights fp32"),
    ],
)
def test_the_warning_names_what_this_run_can_change(form, ways):
    (text,) = form.warnings("accuracy", {"accuracy": 0.9}, {"accuracy": 0.5})
    assert text.endswith(f"trained: {ways} may lose less")


def test_a_graph_in_8_bits_leaves_no_precision_to_choose():
    assert precisions(TrimConfig("12MB", runtime="onnx-int8")) == ("fp32",)
    assert precisions(TrimConfig("12MB")) == ("fp32", "fp16")
    assert precisions(TrimConfig("12MB", weights="bf16")) == ("bf16",)
