"""The sizes of library caches: set by importing sensibert, unless the environment sets them."""

import os

from sensibert.core.library_caches import CAPACITIES
from tests import fresh

CODE = "import os, sensibert; print(*(os.environ[name] for name in {names!r}))"


def test_importing_sensibert_enlarges_the_caches_that_the_environment_does_not_set(tmp_path, monkeypatch):
    for name in CAPACITIES:
        monkeypatch.delenv(name, raising=False)
    code = CODE.format(names=list(CAPACITIES))
    assert fresh.run(code, cwd=tmp_path, interpreter=True).split() == [str(entries) for entries in CAPACITIES.values()]
    first = next(iter(CAPACITIES))
    monkeypatch.setenv(first, "7")
    assert fresh.run(code, cwd=tmp_path, interpreter=True).split()[0] == "7"
    assert os.environ[first] == "7"
