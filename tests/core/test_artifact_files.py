"""A file of an artifact is exact after a round trip, and one that cannot be read is named with its reason."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensibert.core.artifacts import Plan, Sensitivity
from sensibert.core.errors import SensibertError

from .small import block_plan, layout, sensitivity, unit_plan


@pytest.mark.parametrize("make", [sensitivity, unit_plan, block_plan])
def test_a_round_trip_changes_no_bit(make, tmp_path):
    written = make()
    written.save(tmp_path / "file")
    read = type(written).load(tmp_path / "file")
    assert read == written and read.layout == written.layout
    tensors, again = (a.scores if isinstance(a, Sensitivity) else a.keep for a in (written, read))
    for name, tensor in tensors.items():
        assert again[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    flat = torch.arange(10.0)
    scores = {"layer.0.head": flat[:4], "layer.0.ffn": flat[4:], "layer.1.ffn": flat[:0]}
    written = Sensitivity(layout(), scores, "taylor")
    written.save(tmp_path / "file")
    assert Sensitivity.load(tmp_path / "file") == written


def test_another_kind_of_file_is_named(tmp_path):
    unit_plan().save(tmp_path / "plan")
    with pytest.raises(SensibertError, match=r"holds sensibert\.plan, want a sensibert sensitivity file"):
        Sensitivity.load(tmp_path / "plan")
    save_file({"a": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(SensibertError, match="holds something else, want a sensibert plan file"):
        Plan.load(tmp_path / "weights")


def test_a_newer_version_is_refused_with_both_versions(tmp_path):
    unit_plan().save(tmp_path / "file")
    metadata = {"format": "sensibert.plan", "version": "2", "facts": json.dumps({"invented": "later"})}
    save_file(load_file(tmp_path / "file"), tmp_path / "newer", metadata)
    with pytest.raises(SensibertError, match="format version 2, this sensibert reads up to 1"):
        Plan.load(tmp_path / "newer")


@pytest.mark.parametrize("facts", ["{", "{}", '{"layout": 3}'])
def test_damaged_metadata_is_an_error_of_ours(facts, tmp_path):
    save_file({}, tmp_path / "file", {"format": "sensibert.plan", "version": "1", "facts": facts})
    with pytest.raises(SensibertError, match="not a readable sensibert plan file"):
        Plan.load(tmp_path / "file")


@pytest.mark.parametrize("changed", [{"invented": "later"}, {"grid": {"block_rows": -1, "block_cols": 1}}])
def test_metadata_that_no_plan_has_is_an_error_of_ours(changed, tmp_path):
    written = block_plan()
    save_file(written.keep, tmp_path / "file", _metadata(written, tmp_path, changed))
    with pytest.raises(SensibertError, match="file: not a readable sensibert plan file"):
        Plan.load(tmp_path / "file")


def _metadata(plan: Plan, folder, changed: dict) -> dict[str, str]:
    from safetensors import safe_open

    plan.save(folder / "whole")
    with safe_open(folder / "whole", "pt") as file:
        metadata = file.metadata()
    return metadata | {"facts": json.dumps(json.loads(metadata["facts"]) | changed)}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(share, tmp_path):
    path = tmp_path / "file"
    unit_plan().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(SensibertError, match="file: not a readable sensibert plan file") as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["missing", "folder", "text"])
def test_what_is_not_such_a_file_is_named(what, tmp_path):
    path = tmp_path / what
    if what == "folder":
        path.mkdir()
    if what == "text":
        path.write_text("site,unit,score\n" * 100)
    with pytest.raises(SensibertError, match=f"{what}: not a readable sensibert plan file"):
        Plan.load(path)


@pytest.mark.parametrize("path", ["missing/file", "file/file"])
def test_a_path_that_cannot_be_written_is_named(path, tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(SensibertError, match=f"{path}: cannot be written"):
        sensitivity().save(tmp_path / path)
    assert os.listdir(tmp_path) == ["file"]
