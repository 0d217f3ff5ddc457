"""A folder comes to its path in one step, keeps what is not the model's, and is on the disk when the call returns."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sensibert import SensibertError
from sensibert.core import files
from sensibert.core.output_paths import check_output
from sensibert.saving import publish as module
from sensibert.saving.publish import publish
from sensibert.training.checkpoints import MANIFEST, seal
from tests.helpers import tiny_model
from tests.runs import tree

CARD = "---\nlibrary_name: transformers\ntags: [sensibert, pruned]\n---\n# small\n"


def folder(path: Path, **content: str) -> Path:
    """A folder with these files; `__` in a name stands for a slash, `_` for a dot."""
    for name, text in content.items():
        file = path / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


@pytest.fixture(params=["exchange", "two steps"])
def system(request, monkeypatch):
    """With the call that exchanges two folders, and without it."""
    if request.param == "two steps":
        monkeypatch.setattr(module.sys, "platform", "other")
    return request.param


def test_the_model_is_replaced_and_everything_else_is_kept(tmp_path, system):
    out = folder(
        tmp_path / "out",
        **{"config_json": "old", "model-00001-of-00002_safetensors": "old", "result_json": "old", "vocab_txt": "old"},
        dense__config_json="old",
        report__kept_png="old",
        README_md=CARD,
        notes_txt="mine",
        report__notes_txt="mine",
        backup__model_safetensors="mine",
        my_safetensors="m",
    )
    for name in (
        "dense/notes.txt",
        "model_backup.safetensors",
        "report/mine.png",
        "tokenizer-notes.json",
        "private/key",
    ):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    (out / "empty" / "deep").mkdir(parents=True)
    os.chmod(out / "private", 0o700)
    (out / "link").symlink_to("nowhere")
    os.chmod(out, 0o750)
    new = folder(tmp_path / "new", config_json="new", notes_txt="new")
    publish(new, out, overwrite=True)
    names = ["backup/model.safetensors", "config.json", "link", "my.safetensors", "notes.txt", "report/notes.txt"]
    names += ["dense/notes.txt", "model_backup.safetensors", "report/mine.png", "tokenizer-notes.json", "private/key"]
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if not p.is_dir()) == sorted(names)
    assert (out / "empty" / "deep").is_dir() and (out / "private").stat().st_mode & 0o777 == 0o700
    assert (out / "config.json").read_text() == (out / "notes.txt").read_text() == "new"
    assert (out / "report" / "notes.txt").read_text() == (out / "backup" / "model.safetensors").read_text() == "mine"
    assert out.stat().st_mode & 0o777 == 0o750
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_former_tokenizer_goes_with_its_model(tmp_path):
    out = folder(tmp_path / "out", vocab_txt="old", chat__template_jinja="x", README_md="mine", tokenizer_model="old")
    (out / "chat_template.jinja").write_text("old")
    publish(folder(tmp_path / "new", config_json="new"), out, overwrite=True)
    assert tree(out) == {"README.md": b"mine", "config.json": b"new", "chat": None, "chat/template.jinja": b"x"}


@pytest.mark.parametrize("name", ["dense", "report"])
def test_a_file_where_a_folder_is_to_be_is_refused_before_any_work(tmp_path, name):
    out = folder(tmp_path / "out", config_json="old")
    (out / name).write_text("mine")
    with pytest.raises(SensibertError, match=f"out/{name} is no folder, and one of that name may be written"):
        check_output(out, overwrite=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_mounted_volume_inside_is_refused(tmp_path):
    out = folder(tmp_path / "out", config_json="old", data__a_txt="x")
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(out / "data")], capture_output=True).returncode:
        pytest.skip("this system cannot mount")
    try:
        (out / "data" / "precious").write_text("mine")
        with pytest.raises(SensibertError, match="out/data is a mount point, want an output without one"):
            publish(folder(tmp_path / "new", config_json="new"), out, overwrite=True)
        assert (out / "data" / "precious").read_text() == "mine" and (out / "config.json").read_text() == "old"
    finally:
        subprocess.run(["umount", str(out / "data")], check=True)


def test_the_names_of_new_folders_are_on_the_disk_too(tmp_path, calls):
    publish(folder(tmp_path / "new", config_json="new"), tmp_path / "a" / "b" / "out", overwrite=False)
    synced = [path for name, path in calls if name == "sync"]
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(synced)


def test_without_overwrite_only_an_empty_folder_is_replaced(tmp_path):
    new, out = folder(tmp_path / "new", config_json="new"), folder(tmp_path / "out", a="mine")
    with pytest.raises(SensibertError, match=r"out exists and is not empty, want a new folder or --overwrite"):
        publish(new, out, overwrite=False)
    assert tree(out) == {"a": b"mine"}
    (out / "a").unlink()
    publish(new, out, overwrite=False)
    assert tree(out) == {"config.json": b"new"}


def test_a_second_step_that_fails_is_undone(tmp_path, monkeypatch):
    monkeypatch.setattr(module.sys, "platform", "other")
    new, out = folder(tmp_path / "new", config_json="new"), folder(tmp_path / "out", config_json="old")
    replace, failed = os.replace, []

    def fails_once(source, target):
        if target == out and not failed:
            failed.append(source)
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        replace(source, target)

    monkeypatch.setattr(module.os, "replace", fails_once)
    with pytest.raises(PermissionError):
        publish(new, out, overwrite=True)
    assert failed == [new] and tree(out) == {"config.json": b"old"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out"]


def test_what_a_kill_between_the_two_steps_leaves_is_named(tmp_path):
    folder(tmp_path / "out.replaced", config_json="old")
    with pytest.raises(SensibertError, match=r"out\.replaced is what was in .*out when a command was killed; rename"):
        check_output(tmp_path / "out", overwrite=True)


def test_a_mount_point_is_refused():
    with pytest.raises(SensibertError, match="/proc is a mount point, want a folder inside it"):
        check_output("/proc", overwrite=True)


@pytest.fixture
def calls(monkeypatch):
    """The calls that decide what a power cut leaves, in their order: (name, path)."""
    made: list[tuple[str, Path]] = []
    for name in ("replace", "link"):
        original = getattr(os, name)

        def recorded(source, target, *args, _name=name, _original=original, **options):
            made.append((_name, Path(target)))
            return _original(source, target, *args, **options)

        monkeypatch.setattr(os, name, recorded)
    exchange, remove, synced = module._exchange, shutil.rmtree, os.fsync

    def recorded_exchange(new, target):
        made.append(("exchange", target))
        exchange(new, target)

    def recorded_remove(path, *args, **options):
        made.append(("remove", Path(path)))
        remove(path, *args, **options)

    def recorded_sync(handle):
        made.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}"))))
        synced(handle)

    monkeypatch.setattr(module, "_exchange", recorded_exchange)
    monkeypatch.setattr(shutil, "rmtree", recorded_remove)
    monkeypatch.setattr(os, "fsync", recorded_sync)
    return made


def test_everything_is_on_the_disk_before_the_exchange_and_removed_after_it(tmp_path, calls):
    out, new = folder(tmp_path / "out", a_txt="mine"), folder(tmp_path / "new", config_json="{}", report__a_png="")
    publish(new, out, overwrite=True)
    at = calls.index(("exchange", out))
    parts = {new, new / "config.json", new / "report", new / "report" / "a.png", new / "a.txt", tmp_path}
    assert {path for name, path in calls[:at] if name == "sync"} == parts
    assert calls.index(("link", new / "a.txt")) < calls.index(("sync", new / "a.txt"))
    assert calls[at + 1 :] == [("sync", tmp_path), ("remove", new)]


def test_a_checkpoint_is_on_the_disk_before_its_manifest(tmp_path, calls):
    checkpoint = folder(tmp_path / "checkpoint-1", model_safetensors="weights", optimizer_pt="state", rng__a="b")
    seal(checkpoint, tiny_model(), {})
    at = calls.index(("replace", checkpoint / MANIFEST))
    synced = [path for name, path in calls[:at] if name == "sync"]
    files_ = {p for p in checkpoint.rglob("*") if p.name != MANIFEST}
    assert files_ | {checkpoint, tmp_path} <= set(synced)
    assert synced[-1].name.startswith(f".{MANIFEST}.")  # the manifest itself, under its temporary name
    assert calls[at + 1 :] == [("sync", checkpoint)]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, calls):
    files.write_atomically(tmp_path / "plan", lambda path: Path(path).write_text("plan"))
    (name, temporary), *rest = calls
    assert name == "sync" and temporary.parent == tmp_path and temporary.name.startswith(".plan.")
    assert rest == [("replace", tmp_path / "plan"), ("sync", tmp_path)]
