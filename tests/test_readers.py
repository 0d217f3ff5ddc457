"""The files that fuzzing starts from are whole: each reader takes its own, and refuses an empty one."""

import pytest

from sensibert import SensibertError
from tests.fuzz.readers import targets


def test_every_reader_takes_its_file_and_refuses_an_empty_one(tmp_path):
    names = []
    for name, whole, reader in targets(tmp_path):
        reader(whole)
        with pytest.raises(SensibertError):
            reader(b"")
        names.append(name)
    assert len(names) == len(set(names)) > 20
