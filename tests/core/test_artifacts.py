"""Artifacts are what passes between the verbs: exact after a round trip, and a bad file says what is wrong with it."""

import json
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensibert.core.artifacts import Plan, Sensitivity
from sensibert.core.budget import Budget
from sensibert.core.errors import SensibertError
from sensibert.core.grid import Grid
from sensibert.core.layout import Flops, Layout, Member, Site

GRIDS = [Grid.element(), Grid.row(), Grid.column(), Grid.tensor(), Grid.rows(8), Grid.columns(3), Grid.block(4, 16)]


def layout() -> Layout:
    up, bias, down = Member("up.weight", 0), Member("up.bias", 0), Member("down.weight", 1)
    fused, out = Member("qkv.weight", 0, 8, parts=3), Member("out.weight", 1, 8)
    sites = (
        Site("layer.0.head", "head", 0, 4, (fused, out), out, 1000, Flops(2000, 32), minimum=1),
        Site("layer.0.ffn", "ffn", 0, 6, (up, bias, down), down, 65, Flops(128)),
        Site("layer.1.ffn", "ffn", 1, 0, (up, bias, down), down, 65, Flops(128)),
    )
    return Layout("bert", "0123456789abcdef", sites, 32, 5000, 9000, Flops(7), Flops(8, 0, 9, 10))


def sensitivity() -> Sensitivity:
    values = {"layer.0.head": torch.tensor([0.1, -0.0, float("inf"), 1e-42]), "layer.0.ffn": torch.randn(6)}
    return Sensitivity(layout(), values | {"layer.1.ffn": torch.zeros(0)}, "fisher", 1024, seed=3)


def plan() -> Plan:
    keep = {"layer.0.head": torch.tensor([True, False, True, False]), "layer.0.ffn": torch.rand(6) < 0.5}
    keep["layer.1.ffn"] = torch.zeros(0, dtype=torch.bool)
    return Plan(layout(), keep, Budget.parse("33.3%flops", "model", 384), "fisher", 4321, 98765, {"policy": "global"})


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_grid_is_read_back_from_its_name(grid):
    assert Grid.parse(str(grid)) == grid


@pytest.mark.parametrize("text", ["", "rows", "rows:", "4x", "diagonal", "-1x4", "4 x 4"])
def test_what_is_no_grid_is_refused_by_name(text):
    with pytest.raises(ValueError, match=f"text is {text!r}, want element, row"):
        Grid.parse(text)


@pytest.mark.parametrize("rows, cols", [(8, 12), (7, 5), (1, 1), (0, 4), (3, 0)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_expand_gives_every_element_the_value_of_its_block(grid, rows, cols):
    keep = torch.rand(grid.shape(rows, cols)) < 0.5
    wide = grid.expand(keep, rows, cols)
    height, width = grid.block_size(rows, cols)
    assert wide.shape == (rows, cols)
    for i in range(rows):
        for j in range(cols):
            assert wide[i, j] == keep[i // height, j // width]


def test_a_keep_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"Grid rows:8: keep is \(3, 1\), want \(2, 1\)"):
        Grid.rows(8).expand(torch.ones(3, 1, dtype=torch.bool), 16, 4)
    with pytest.raises(ValueError, match=r"block is \(-1, 0\), want sizes >= 0"):
        Grid(-1, 0)


def test_a_unit_of_a_fused_matrix_owns_a_band_in_every_section():
    member = Member("qkv", 0, span=2, parts=3)  # 4 heads of 2 rows, in q, k and v
    assert member.index(torch.tensor([0, 3]), units=4).tolist() == [0, 1, 6, 7, 8, 9, 14, 15, 16, 17, 22, 23]
    assert member.index(torch.tensor([], dtype=torch.int64), units=4).tolist() == []


@pytest.mark.parametrize("make", [sensitivity, plan])
def test_a_round_trip_changes_no_bit(make, tmp_path):
    written = make()
    written.save(tmp_path / "file")
    read = type(written).load(tmp_path / "file")
    assert read == written and read is not written
    assert read.layout == written.layout
    tensors, again = (a.scores if isinstance(a, Sensitivity) else a.keep for a in (written, read))
    assert list(again) == list(tensors), "sites keep their order"
    for name, tensor in tensors.items():
        assert again[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_artifacts_that_differ_anywhere_are_not_equal():
    first, second = plan(), plan()
    second.keep["layer.0.head"][0] = False
    assert first != second
    assert sensitivity() != Sensitivity(layout(), sensitivity().scores, "fisher", 1024, seed=4)
    assert first != "a plan"


def test_scores_that_share_memory_can_be_saved(tmp_path):
    flat = torch.arange(10.0)
    scores = {"layer.0.head": flat[:4], "layer.0.ffn": flat[4:], "layer.1.ffn": flat[:0]}
    written = Sensitivity(layout(), scores, "taylor")
    written.save(tmp_path / "file")
    assert Sensitivity.load(tmp_path / "file") == written


def test_another_kind_of_file_is_named(tmp_path):
    plan().save(tmp_path / "plan")
    with pytest.raises(SensibertError, match=r"holds sensibert\.plan, want a sensibert sensitivity file"):
        Sensitivity.load(tmp_path / "plan")
    save_file({"a": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(SensibertError, match="holds something else, want a sensibert plan file"):
        Plan.load(tmp_path / "weights")


def test_a_newer_version_is_refused_with_both_versions(tmp_path):
    plan().save(tmp_path / "file")
    metadata = {"format": "sensibert.plan", "version": "2", "facts": json.dumps({"invented": "later"})}
    save_file(load_file(tmp_path / "file"), tmp_path / "newer", metadata)
    with pytest.raises(SensibertError, match="format version 2, this sensibert reads up to 1"):
        Plan.load(tmp_path / "newer")


@pytest.mark.parametrize("facts", ["{", "{}", '{"layout": 3}'])
def test_damaged_facts_are_an_error_of_ours(facts, tmp_path):
    save_file({}, tmp_path / "file", {"format": "sensibert.plan", "version": "1", "facts": facts})
    with pytest.raises(SensibertError, match="not a readable sensibert plan file"):
        Plan.load(tmp_path / "file")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(share, tmp_path):
    path = tmp_path / "file"
    plan().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(SensibertError, match="file: not a readable sensibert plan file") as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["missing", "folder", "text"])
def test_what_is_not_a_file_of_ours_is_named(what, tmp_path):
    path = tmp_path / what
    if what == "folder":
        path.mkdir()
    if what == "text":
        path.write_text("site,unit,score\n" * 100)
    with pytest.raises(SensibertError, match=f"{what}: not a readable sensibert plan file"):
        Plan.load(path)


@pytest.fixture
def small_disk():
    """No file can grow past 1,000 bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, small_disk):
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(SensibertError, match="file: cannot be written"):
        plan().save(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("path", ["missing/file", "file/file"])
def test_a_place_that_takes_no_file_is_named(path, tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(SensibertError, match=f"{path}: cannot be written"):
        sensitivity().save(tmp_path / path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "text, value, kind, relative",
    [
        ("50%params", 0.5, "params", True),
        ("100 % params", 1.0, "params", True),
        ("12.5%flops", 0.125, "flops", True),
        ("5.3Mparams", 5.3e6, "params", False),
        ("1.2Gflops", 1.2e9, "flops", False),
        ("123456params", 123456, "params", False),
        (".5Kparams", 500, "params", False),
        ("8ms", 8, "ms", False),
    ],
)
def test_budgets_are_read(text, value, kind, relative):
    budget = Budget.parse(text, "model", 256)
    assert (budget.value, budget.kind, budget.relative) == (pytest.approx(value, rel=1e-12), kind, relative)
    assert (budget.scope, budget.length) == ("model", 256)
    assert Budget.parse(str(budget), "model", 256) == budget


@pytest.mark.parametrize(
    "text, said",
    [
        ("0%params", r"outside \(0 %, 100 %\]"),
        ("120%params", r"outside \(0 %, 100 %\]"),
        ("0params", r"outside \(0 %, 100 %\]"),
        ("abc", "is not a budget"),
        ("", "is not a budget"),
        ("-1params", "is not a budget"),
        ("50%", "is not a budget"),
        ("50", "is not a budget"),
        ("50%ms", "is not a budget"),
        ("nan%params", "is not a budget"),
        ("1e3params", "is not a budget"),
        ("50%params, 30%flops", "is not a budget"),
    ],
)
def test_what_is_no_budget_is_refused_with_an_example(text, said):
    with pytest.raises(SensibertError, match=f"^budget: {text!r} {said}|^budget: {text!r} is {said}") as caught:
        Budget.parse(text)
    assert "want for example 50%params" in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_scope_is_named():
    with pytest.raises(SensibertError, match="scope is 'head', want encoder or model"):
        Budget.parse("50%params", scope="head")


def test_flops_add_up_and_grow_with_batch_and_length():
    one = Flops(token=2, pair=3, sequence=5, forward=7)
    assert one.at(1, 1) == 17
    assert one.at(4, 10) == 4 * (2 * 10 + 3 * 100 + 5) + 7
    assert (one + one) == one * 2
    assert (one * 3).at(4, 10) == 3 * one.at(4, 10)


def test_a_site_is_found_by_name():
    assert layout().site("layer.0.ffn").units == 6
    with pytest.raises(KeyError):
        layout().site("layer.9.ffn")
