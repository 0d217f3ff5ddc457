"""Options of an export that a runtime does not have."""

import pytest

from sensibert.core.errors import SensibertError
from sensibert.core.export_options import check_export


@pytest.mark.parametrize(
    "options", [("onnx", True, True), ("onnx", False, False), ("openvino", False, True), ("torch", False, False)]
)
def test_what_a_runtime_has(options):
    check_export(*options)


@pytest.mark.parametrize(
    "options, message",
    [
        (("tflite", False, False), "to is 'tflite', want one of onnx, openvino, torch, executorch"),
        (("openvino", True, False), "int8 is True and to is 'openvino', want onnx"),
        (("torch", True, False), "int8 is True and to is 'torch', want onnx"),
        (("torch", False, True), "fp16_embeddings is True and to is 'torch', want onnx or openvino"),
    ],
)
def test_what_it_has_not_is_named(options, message):
    with pytest.raises(SensibertError, match=f"^{message}$"):
        check_export(*options)
