"""Kernel programs are built once a session, when a test first asks for them."""

from functools import cache

import pytest

from . import runner


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    """kernel("block_sensitivity", "tsan")(*arrays) builds tests/native/block_sensitivity.cpp and runs it."""
    folder = tmp_path_factory.mktemp("kernels")

    @cache
    def program(op: str, kind: str):
        return runner.build(runner.HERE / f"{op}.cpp", kind, folder)

    return lambda op, kind="plain": lambda *arrays, **env: runner.run(program(op, kind), *arrays, **env)
