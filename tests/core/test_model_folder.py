"""Which config.json asks for more than its weights can be; tests/test_damaged_files.py has whole commands."""

import json

import pytest

from sensibert.core.errors import SensibertError
from sensibert.core.model_folder import want_model_folder

MODEL = {"model_type": "albert", "num_hidden_layers": 100, "hidden_size": 2048, "intermediate_size": 8192}


def want(folder, **config) -> None:
    (folder / "config.json").write_text(json.dumps(MODEL | config))
    want_model_folder(folder, "model")


def test_layers_that_share_weights_are_counted_once(tmp_path):
    for groups in (None, 0, 100, 101, "one"):
        with pytest.raises(SensibertError, match="^model: .* at least 10.1 GB of weights, and its files have 0.0"):
            want(tmp_path, num_hidden_groups=groups)
    want(tmp_path, num_hidden_groups=1)
    (tmp_path / "model.safetensors").touch()
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(2 * 2**30)  # takes no room
    want(tmp_path)


@pytest.mark.parametrize("layers, fits", [(1000, True), (1001, False)])
def test_the_most_layers(tmp_path, layers, fits):
    small = {"num_hidden_layers": layers, "hidden_size": 2, "intermediate_size": 2}
    if fits:
        want(tmp_path, **small)
    else:
        with pytest.raises(SensibertError, match="with 1,001 layers, want at most 1,000"):
            want(tmp_path, **small)


def test_what_is_no_model_folder_is_named(tmp_path):
    for name in ("owner/name", "name", "a.b-c_d"):
        want_model_folder(name, "model")
    for name in ("", "a/b/c", "a b"):
        with pytest.raises(SensibertError, match="^model: .* is no folder, and cannot be loaded from the hub"):
            want_model_folder(name, "model")
    with pytest.raises(SensibertError, match="has no config.json, want the folder of a model"):
        want_model_folder(tmp_path, "model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SensibertError, match="a config.json with no model_type, want an object that names its"):
        want_model_folder(tmp_path, "model")
    with pytest.raises(SensibertError, match="config.json is a file, want the folder of a model"):
        want_model_folder(tmp_path / "config.json", "model")
