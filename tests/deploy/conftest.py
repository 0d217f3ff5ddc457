"""Exports of many graphs in one process."""

import pytest


@pytest.fixture(scope="package", autouse=True)
def graphs_are_many(one_table_of_onnx_ops):
    """All tests here share that table."""
