"""Kernel programs and bindings are built once a session, when a test first asks for them."""

import os
from functools import cache
from pathlib import Path

import pytest

from . import bindings, runner


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that the workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "native"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def kernel(tmp_path_factory, shared):
    """kernel("block_sensitivity", "tsan")(*arrays) builds tests/native/block_sensitivity.cpp and runs it."""
    folder = tmp_path_factory.mktemp("kernels")

    @cache
    def program(op: str, kind: str):
        return runner.build(runner.HERE / f"{op}.cpp", kind, folder, shared)

    return lambda op, kind="plain": lambda *arrays, **env: runner.run(program(op, kind), *arrays, **env)


@pytest.fixture(scope="session")
def binding(tmp_path_factory, shared):
    """binding("block_sensitivity") builds the binding and kernel of an op for CPU tensors: the library."""
    return cache(lambda op, *defines: bindings.build(op, tmp_path_factory.mktemp("binding"), shared, *defines))
