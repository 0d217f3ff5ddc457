"""What the form of a file costs is said."""

from sensibert.core.config import TrimConfig
from sensibert.run_form import form_warnings, precisions


def test_a_form_that_loses_is_worth_a_warning():
    (text,) = form_warnings("accuracy", {"accuracy": 0.9}, {"accuracy": 0.89})
    assert "accuracy is 0.8900 as the file holds the model, and was 0.9000 in 32 bits" in text
    assert form_warnings("accuracy", {"accuracy": 0.9}, {"accuracy": 0.899}) == []
    assert (
        form_warnings("accuracy", None, {"accuracy": 0.1}) == form_warnings("accuracy", {"accuracy": 0.9}, None) == []
    )


def test_a_graph_in_8_bits_leaves_no_precision_to_choose():
    assert precisions(TrimConfig("12MB", runtime="onnx-int8")) == ("fp32",)
    assert precisions(TrimConfig("12MB")) == ("fp32", "fp16")
    assert precisions(TrimConfig("12MB", weights="bf16")) == ("bf16",)
