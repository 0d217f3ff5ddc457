"""What an export can be asked for, checked before anything slow is imported."""

from __future__ import annotations

from .arguments import one_of
from .errors import SensibertError

RUNTIME_NAMES = ("onnx", "openvino", "torch", "executorch")


def check_export(to: str, int8: bool, fp16_embeddings: bool) -> None:
    """SensibertError for an unknown runtime, or an option that it does not have."""
    if to not in RUNTIME_NAMES:
        raise SensibertError(f"to is {to!r}, {one_of(to, RUNTIME_NAMES)}")
    if int8 and to != "onnx":
        raise SensibertError(f"int8 is True and to is {to!r}, want onnx")
    if fp16_embeddings and to not in ("onnx", "openvino"):
        raise SensibertError(f"fp16_embeddings is True and to is {to!r}, want onnx or openvino")
