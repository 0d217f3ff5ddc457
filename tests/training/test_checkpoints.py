"""Which checkpoints can be trusted, and what a failed run leaves behind."""

import contextlib
import itertools
import json
import os
import re
import signal

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file

from sensibert.core.artifacts import UnitPlan
from sensibert.core.budget import Budget
from sensibert.core.errors import SensibertError
from sensibert.core.files import writing
from sensibert.core.output_paths import check_file, check_output
from sensibert.models import layout_of
from sensibert.models.structure import read_structure
from sensibert.training.checkpoints import (
    MANIFEST,
    MARKER,
    MEMORY,
    STRUCTURE,
    begin,
    check_checkpoint,
    checkpoints,
    latest_checkpoint,
    partial_folder,
    seal,
    workspace,
)
from sensibert.trimming.trim import trim
from tests.helpers import tiny_model
from tests.runs import tree


@pytest.fixture(scope="module")
def model():
    return tiny_model(head="")


WEIGHTS = {"weight": torch.ones(2)}
SIZE = len(save(WEIGHTS))


def sealed(folder, step, model):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file(WEIGHTS, checkpoint / "model.safetensors")
    seal(checkpoint, model, {"metrics_at_cut": None, "seconds": {"warm": 1.5}})
    return checkpoint


def poison(checkpoint):
    save_file({"weight": torch.tensor([1, float("inf")])}, checkpoint / "model.safetensors")


def without_sums(checkpoint, content=None):
    """With a manifest of version 0.1, sizes alone, and other weights: not finite ones, or this content."""
    poison(checkpoint)
    if content is not None:
        (checkpoint / "model.safetensors").write_bytes(content)
    (checkpoint / MANIFEST).write_text(json.dumps(sizes_of(checkpoint)))


def sizes_of(checkpoint):
    """The manifest of version 0.1."""
    return {name: entry["bytes"] for name, entry in listed(checkpoint)["files"].items()}


def listed(checkpoint):
    return json.loads((checkpoint / MANIFEST).read_text())


def relist(checkpoint, change):
    """Change the manifest, as damage to it would."""
    manifest = listed(checkpoint)
    change(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def test_a_sealed_checkpoint_is_complete_and_has_the_memory_of_the_run(tmp_path, model):
    checkpoint = sealed(tmp_path, 3, model)
    check_checkpoint(checkpoint)
    assert json.loads((checkpoint / MEMORY).read_text())["seconds"] == {"warm": 1.5}
    assert not (checkpoint / STRUCTURE).exists()  # of a model that was never cut
    assert listed(checkpoint)["files"].keys() == {"model.safetensors", MEMORY}
    assert all(len(entry["sha256"]) == 64 for entry in listed(checkpoint)["files"].values())


def test_a_manifest_of_an_earlier_version_has_sizes_alone(tmp_path, model):
    checkpoint = sealed(tmp_path, 3, model)
    sizes = sizes_of(checkpoint)
    assert check_checkpoint(checkpoint)
    (checkpoint / MANIFEST).write_text(json.dumps(sizes))
    assert not check_checkpoint(checkpoint)
    for name in ("trainer_state.json", MEMORY):
        (checkpoint / name).write_text("[}")
        sizes[name] = 2
        (checkpoint / MANIFEST).write_text(json.dumps(sizes))
        with pytest.raises(SensibertError, match="checkpoint-3: damaged checkpoint, its state cannot be read"):
            check_checkpoint(checkpoint)


def test_a_flipped_bit_in_any_file_is_found(tmp_path, model):
    """Of a checkpoint as Trainer makes it, in the first, a middle and the last byte of every file, folders included."""
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / "1_Pooling").mkdir(parents=True)
    names = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "1_Pooling/config.json")
    for name in names:
        (checkpoint / name).write_bytes(b"something " * 5)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 4}')
    cut = tiny_model(head="")
    layout = layout_of(cut)
    keep = {site.name: torch.arange(site.units) > 1 for site in layout.sites}
    save_file(WEIGHTS, checkpoint / "model.safetensors")
    seal(checkpoint, trim(cut, UnitPlan(layout, keep, Budget.parse("50%params"), "fisher")), {"seconds": {}})
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
    assert {STRUCTURE, MEMORY, "model.safetensors", *map(os.path.basename, names)} <= {path.name for path in files}
    for file in files:
        content = file.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(SensibertError, match=f"damaged checkpoint, .*{file.name} has other content"):
                check_checkpoint(checkpoint)
        file.write_bytes(content)
    check_checkpoint(checkpoint)


def test_a_flipped_bit_in_the_manifest_is_found(tmp_path, model):
    checkpoint = sealed(tmp_path, 4, model)
    content = (checkpoint / MANIFEST).read_bytes()
    for place in (i for i, byte in enumerate(content) if byte not in b" \n"):
        for bit in (1, 4, 64):
            (checkpoint / MANIFEST).write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            with pytest.raises(SensibertError, match="checkpoint-4: (not a complete|damaged|truncated) checkpoint"):
                check_checkpoint(checkpoint)


def test_a_trimmed_model_leaves_its_structure(tmp_path):
    cut = tiny_model(head="")
    layout = layout_of(cut)
    keep = {site.name: torch.arange(site.units) > 1 for site in layout.sites}
    checkpoint = sealed(tmp_path, 4, trim(cut, UnitPlan(layout, keep, Budget.parse("50%params"), "fisher")))
    assert read_structure(checkpoint / STRUCTURE)["layer.1.head"].tolist() == [2, 3]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 3), f"model.safetensors has 3 bytes, want {SIZE}"),
        (lambda folder: (folder / "model.safetensors").unlink(), "damaged checkpoint, model.safetensors is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "not a complete checkpoint"),
        (lambda folder: (folder / MANIFEST).unlink(), "not a complete checkpoint"),
        *(
            (lambda folder, text=text: (folder / MANIFEST).write_text(text), "not a complete checkpoint")
            for text in ("[]", "3", "null", '"x"', '{"x": "y"}', "[" * 100_000, '{"version": 2}', "\0")
        ),
        *(
            (lambda folder, text=text: (folder / MANIFEST).write_text(text), f"{MANIFEST} does not list {MEMORY}")
            for text in ("{}", '{"model.safetensors": 1}', '{"version": 2, "files": {}}')
        ),
        (lambda folder: relist(folder, lambda m: m["files"].pop(MEMORY)), f"does not list {MEMORY}"),
        (lambda folder: relist(folder, lambda m: m["files"].pop("model.safetensors")), "does not list model.safetens"),
        (lambda folder: relist(folder, lambda m: m["files"].update(x=3)), "not a complete checkpoint"),
        (lambda folder: relist(folder, lambda m: m["files"][MEMORY].pop("sha256")), "not a complete checkpoint"),
        (lambda folder: relist(folder, lambda m: m.update(version=3)), "not a complete checkpoint"),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b""), "does not list optimizer.pt"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * SIZE), "model.safetensors has other content"),
        (lambda folder: (folder / MEMORY).write_bytes(bytes((folder / MEMORY).stat().st_size)), f"{MEMORY} has other"),
        (lambda folder: without_sums(folder, b"x" * SIZE), "damaged checkpoint, model.safetensors cannot be read"),
        (lambda folder: without_sums(folder), "weight has NaN or infinite values, want finite weights"),
    ],
)
def test_damage_is_noticed(tmp_path, model, damage, message):
    checkpoint = sealed(tmp_path, 5, model)
    damage(checkpoint)
    with pytest.raises(SensibertError, match=message):
        check_checkpoint(checkpoint)


def test_the_newest_complete_checkpoint_is_found_by_its_number(tmp_path, model):
    assert latest_checkpoint(tmp_path) is None
    nine, ten = sealed(tmp_path, 9, model), sealed(tmp_path, 10, model)
    (tmp_path / "checkpoint-best").mkdir()  # somebody else's
    assert checkpoints(tmp_path) == [ten, nine] and latest_checkpoint(tmp_path) == ten
    os.truncate(ten / "model.safetensors", 1)
    assert latest_checkpoint(tmp_path) == nine
    os.truncate(nine / "model.safetensors", 2)
    with pytest.raises(
        SensibertError, match="checkpoint-10: truncated.*no other checkpoint is whole; want --overwrite"
    ):
        latest_checkpoint(tmp_path)


def test_a_checkpoint_of_weights_that_are_not_finite_is_passed_over_and_said(tmp_path, model, caplog):
    nine, ten = sealed(tmp_path, 9, model), sealed(tmp_path, 10, model)
    without_sums(ten)
    assert latest_checkpoint(tmp_path) == nine
    message = r"resume: .*checkpoint-10: weight has NaN or infinite values.*; the run continues from checkpoint-9,"
    assert re.search(message, caplog.text)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_sealed(tmp_path, value):
    broken = tiny_model(head="")
    with torch.no_grad():
        broken.encoder.layer[1].output.dense.bias[3] = value
    with pytest.raises(SensibertError, match=r"cannot go on after checkpoint-2: encoder.layer.1.output.dense.bias has"):
        sealed(tmp_path, 2, broken)
    assert latest_checkpoint(tmp_path) is None


def test_a_checkpoint_whose_writing_broke_off_counts_as_none(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None


def test_a_run_that_fails_before_its_first_checkpoint_leaves_no_trace(tmp_path):
    with pytest.raises(KeyError):
        with workspace(tmp_path / "deep" / "out", resume=False, overwrite=False) as (folder, checkpoint):
            assert folder == partial_folder(tmp_path / "deep" / "out") and checkpoint is None
            (folder / "snapshot").mkdir()
            (folder / "checkpoint-1").mkdir()  # broken off
            raise KeyError
    assert tree(tmp_path) == {}


def test_a_run_that_fails_later_keeps_its_complete_checkpoints_and_resumes(tmp_path, model):
    with pytest.raises(KeyError):
        with workspace(tmp_path / "out", resume=False, overwrite=False) as (folder, _):
            saved = sealed(folder, 2, model)
            (folder / "checkpoint-4").mkdir()
            (folder / "final").mkdir()
            raise KeyError
    assert sorted(p.name for p in (tmp_path / "out.partial").iterdir()) == [MARKER, "checkpoint-2"]
    with pytest.raises(SensibertError, match="out.partial holds an unfinished run, want --resume or --overwrite"):
        with workspace(tmp_path / "out", resume=False, overwrite=False):
            pass
    with workspace(tmp_path / "out", resume=True, overwrite=False, keep=True) as (_, checkpoint):
        assert checkpoint == saved
    with workspace(tmp_path / "out", resume=False, overwrite=True) as (folder, checkpoint):
        assert checkpoint is None and (folder / "checkpoint-2").exists()  # until the inputs have been read
        begin(folder, None)
        assert tree(folder) == {MARKER: b""}
    assert tree(tmp_path) == {}


def test_what_a_run_does_not_go_on_from_is_deleted_and_files_of_others_are_not(tmp_path, model):
    with workspace(tmp_path / "out", resume=False, overwrite=False, keep=True) as (folder, _):
        begin(folder, None)
        two, four = sealed(folder, 2, model), sealed(folder, 4, model)
        (four / MEMORY).write_text("damaged")
        (folder / "checkpoint-6").mkdir()  # broken off
        (folder / "notes.txt").write_text("mine")
    with workspace(tmp_path / "out", resume=True, overwrite=False) as (folder, checkpoint):
        assert checkpoint == two and four.exists()
        begin(folder, checkpoint)
        assert {path.name for path in folder.iterdir()} == {MARKER, "checkpoint-2", "notes.txt"}
    assert tree(tmp_path) == {"out.partial": None, f"out.partial/{MARKER}": b"", "out.partial/notes.txt": b"mine"}


def test_a_folder_that_no_run_made_is_left_alone(tmp_path):
    """`out.partial` may be somebody's: without a marker or a complete checkpoint it is refused, whatever is asked."""
    mine = tmp_path / "out.partial"
    (mine / "checkpoint-4").mkdir(parents=True)  # of a Trainer without sensibert
    (mine / "checkpoint-4" / "model.safetensors").write_text("mine")
    before = tree(tmp_path)
    for resume, overwrite in itertools.product((False, True), repeat=2):
        with pytest.raises(SensibertError, match="out.partial exists and is not the folder of an unfinished run"):
            with workspace(tmp_path / "out", resume, overwrite):
                pass
    assert tree(tmp_path) == before


@pytest.mark.parametrize("what", ["a link", "a file"])
def test_a_link_or_file_in_place_of_the_folder_is_refused(tmp_path, what):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / MARKER).write_text("")
    if what == "a link":
        (tmp_path / "out.partial").symlink_to(tmp_path / "mine")
    else:
        (tmp_path / "out.partial").write_text("kept")
    before = tree(tmp_path)
    with pytest.raises(SensibertError, match=f"is {what}, want another output"):
        with workspace(tmp_path / "out", resume=False, overwrite=True):
            pass
    assert tree(tmp_path) == before


def test_a_folder_of_a_version_without_markers_is_known_by_its_checkpoints(tmp_path, model):
    saved = sealed(tmp_path / "out.partial", 2, model)
    with workspace(tmp_path / "out", resume=True, overwrite=False, keep=True) as (_, checkpoint):
        assert checkpoint == saved


def test_a_second_run_with_the_same_output_is_refused_while_the_first_one_runs(tmp_path, model):
    read, write = os.pipe()
    first = os.fork()
    if first == 0:  # another process, with the imports of this one
        with contextlib.suppress(BaseException), workspace(tmp_path / "out", False, False):
            os.write(write, b"running")
            signal.pause()
        os._exit(1)
    os.close(write)
    try:
        assert os.read(read, 7) == b"running"
        saved = sealed(tmp_path / "out.partial", 2, model)
        before = tree(tmp_path)
        for resume, overwrite in ((True, False), (True, True), (False, True)):
            with pytest.raises(SensibertError, match="another run is writing to .*out.partial, want another folder"):
                with workspace(tmp_path / "out", resume, overwrite):
                    pass
        assert tree(tmp_path) == before
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    with workspace(tmp_path / "out", resume=True, overwrite=False) as (_, checkpoint):  # a killed run holds no lock
        assert checkpoint == saved


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    check_output(tmp_path / "new", overwrite=False)
    check_output(tmp_path / "full", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "a_file").write_text("kept")
    for taken, message in (("link", "is a link, want"), ("a_file", "is a file, want")):
        with pytest.raises(SensibertError, match=message):
            check_output(tmp_path / taken, overwrite=True)
    with pytest.raises(SensibertError, match="not empty, want a new folder or --overwrite"):
        check_output(tmp_path / "full", overwrite=False)
    check_file(tmp_path / "new", overwrite=False)
    check_file(tmp_path / "full" / "file", overwrite=True)
    for path, message in (("full", "is a folder"), ("full/file", "exists"), ("no/file", "there is no folder")):
        with pytest.raises(SensibertError, match=message):
            check_file(tmp_path / path, overwrite=False)


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(28, "No space left on device"), r"out \(No space left on device\)"),
        (SafetensorError("I/O error: File too large (os error 27)"), "File too large"),
        (Exception("No space left on device (os error 28)"), "No space left"),  # as tokenizers says it
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), "PytorchStreamWriter"),
    ],
)
def test_refusals_of_the_system_become_one_kind_of_error(error, message):
    with pytest.raises(SensibertError, match=f"output: cannot write .*{message}.*; then this"):
        with writing("out", "; then this"):
            raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), SensibertError("budget: no"), KeyError("x")])
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as calls:
        with writing("out"):
            raise error
    assert calls.value is error
