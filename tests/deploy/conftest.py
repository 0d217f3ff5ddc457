"""Exports of many graphs in one process."""

import functools

import pytest


@pytest.fixture(scope="package", autouse=True)
def one_table_of_onnx_ops():
    """torch.onnx reads the sources of 500 functions for each export, a sixth of its time for so small a model."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield
