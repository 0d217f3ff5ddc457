"""Outputs that are taken, hold an input, or cannot be written: refused in one line, and nothing is lost."""

import errno
import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from sensibert import SensibertError, commands, recipe
from sensibert.core.output_paths import check_output, is_mount, try_move
from tests.refusals import finetune_arguments, folders, refused, untouched
from tests.runs import command, tree

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("bad"))


def test_an_output_that_appears_during_the_run_is_not_replaced(here, tmp_path, monkeypatch):
    def appears(*args):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "mine").write_text("mine")

    requested = finetune_arguments(here, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("sensibert.run_output.write_report", appears)
        refused("out exists and is not empty, want --resume --overwrite to write this run there", *requested)
    assert tree(tmp_path / "out") == {"mine": b"mine"}
    assert command(*requested, "--resume", "--overwrite").code == 0
    assert (tmp_path / "out" / "config.json").exists() and (tmp_path / "out" / "mine").read_text() == "mine"


def test_a_file_that_appears_during_the_analysis_is_not_replaced(here, tmp_path, monkeypatch):
    ranked = commands.rank_tensors

    def appears(*args):
        (tmp_path / "s").write_text("mine")
        return ranked(*args)

    monkeypatch.setattr(commands, "rank_tensors", appears)
    rows = ("--train-file", here / "train.csv", "--samples", 8)
    requested = ("analyze", "--model", here / "tuned", *rows, "--output", tmp_path / "s")
    refused("s exists, want a new file or --overwrite", *requested)
    assert tree(tmp_path) == {"s": b"mine"}


def test_a_home_folder_is_a_tilde_in_every_path_and_never_replaced(here, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(here / "tuned", tmp_path / "tuned")
    plan = ("trim", "--model", tmp_path / "tuned", "--plan", here / "plan")
    with untouched(tmp_path):
        refused("holds the model of this run", *plan, "--output=~/tuned", "--overwrite")
        away = ("trim", "--model", here / "tuned", "--plan", here / "plan")
        refused("holds the home folder", *away, "--output=~", "--overwrite")
        refused("holds the home folder", *finetune_arguments(here, "~"), "--overwrite")
    assert command("trim", "--model=~/tuned", "--plan", here / "plan", "--output=~/small").code == 0
    assert command(*finetune_arguments(here, "~/run")).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"tuned", "small", "run"}
    assert command("inspect", "~/small").code == 0


def test_links_into_the_output_are_inputs_too(here, tmp_path):
    shutil.copytree(here / "tuned", tmp_path / "out")
    (tmp_path / "linked").mkdir()
    for file in (tmp_path / "out").iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    with untouched(tmp_path):
        refused(
            "holds the model", *finetune_arguments(here, tmp_path / "out", model=tmp_path / "linked"), "--overwrite"
        )


def test_a_command_does_not_write_over_its_input(here, tmp_path):
    shutil.copytree(here / "tuned", tmp_path / "m")
    scores = tmp_path / "m" / "s"
    shutil.copy(here / "tuned.safetensors", scores)
    random = ("analyze", "--model", tmp_path / "m", "--method", "random", "--overwrite", "--output")
    with untouched(tmp_path):
        refused("model.safetensors is the model of this command", *random, tmp_path / "m" / "model.safetensors")
        refused(
            "s is the sensitivity of this command", "plan", "--sensitivity", scores, "--output", scores, "--overwrite"
        )


def test_the_input_of_a_trim_is_not_its_output(here, tmp_path):
    shutil.copytree(here / "tuned", tmp_path / "tuned")
    shutil.copy(here / "plan", tmp_path / "tuned" / "plan")
    for model, plan, name in (("tuned", here / "plan", "model"), (here / "tuned", "tuned/plan", "plan")):
        requested = ("trim", "--model", tmp_path / model, "--plan", tmp_path / plan)
        with untouched(tmp_path):
            refused(f"tuned holds the {name} of this run", *requested, "--output", tmp_path / "tuned", "--overwrite")


def test_a_folder_that_holds_an_input_is_not_replaced(here, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    shutil.copy(here / "train.csv", tmp_path / "data" / "train.csv")
    requested = {"train-file": tmp_path / "data" / "train.csv"}
    monkeypatch.chdir(tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    for place, message in (
        (tmp_path / "data", "holds the train_file of this run"),
        (here / "model", "holds the model of this run"),
        ("..", "holds the .* of this run"),
    ):
        refused(message, *finetune_arguments(here, place, **requested), "--overwrite")
    assert (tmp_path / "data" / "train.csv").exists() and (here / "model" / "config.json").exists()
    (tmp_path / "data").rename(tmp_path / "run.partial")
    requested = {"train-file": tmp_path / "run.partial" / "train.csv"}
    refused("run.partial holds the train_file", *finetune_arguments(here, tmp_path / "run", **requested), "--overwrite")
    assert (tmp_path / "run.partial" / "train.csv").exists()
    monkeypatch.chdir(tmp_path / "elsewhere")
    refused("holds the working folder", *finetune_arguments(here, tmp_path / "elsewhere"), "--overwrite")


def test_an_output_that_is_taken_is_kept(here, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    data = ("--train-file", here / "train.csv")
    with untouched(here, tmp_path):
        full, file = tmp_path / "out", tmp_path / "out" / "mine.txt"
        refused("not empty, want a new folder or --overwrite", *finetune_arguments(here, full))
        refused("not empty", *finetune_arguments(here, full), "--dry-run")
        gone = finetune_arguments(here, full, **{"train-file": tmp_path / "gone.csv"})
        refused("no such file", *gone, "--overwrite")  # what is there goes when the new one is complete
        refused("not empty", "trim", "--model", here / "tuned", "--plan", here / "plan", "--output", full)
        refused("exists, want a new file or --overwrite", "analyze", "--model", here / "tuned", "--output", file, *data)
        refused("exists, want a new file", "plan", "--sensitivity", here / "tuned.safetensors", "--output", file)
        refused("is a folder, want the name of a file", "plan", "--sensitivity", here / "plan", "--output", full)


def test_checkpoints_that_are_truncated_or_in_the_way(here, tmp_path):
    checkpoint = tmp_path / "out.partial" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"half")
    sizes = {"model.safetensors": 4000, "sensibert_run.json": 2}  # as version 0.1 listed them
    (checkpoint / "sensibert_manifest.json").write_text(json.dumps(sizes))
    with untouched(here, tmp_path):
        refused("holds an unfinished run, want --resume or --overwrite", *finetune_arguments(here, tmp_path / "out"))
        message = "truncated checkpoint, model.safetensors has 4 bytes, want 4000"
        refused(message, *finetune_arguments(here, tmp_path / "out"), "--resume")
        (checkpoint / "sensibert_manifest.json").write_text("{")
        refused("not a complete checkpoint", *finetune_arguments(here, tmp_path / "out"), "--resume")
        (checkpoint / "sensibert_manifest.json").write_text(json.dumps(sizes))


def test_a_place_where_nothing_can_be_written(here, tmp_path):
    (tmp_path / "file").write_text("")
    with untouched(here, tmp_path):
        for place in (tmp_path / "file" / "out", "/proc/nowhere/out"):
            refused("cannot write", *finetune_arguments(here, place))
            refused("cannot write", "trim", "--model", here / "tuned", "--plan", here / "plan", "--output", place)
            scores = here / "tuned.safetensors"
            refused("output: cannot write", "plan", "--sensitivity", scores, "--output", place)
            refused("cannot write", "analyze", "--model", here / "tuned", "--method", "random", "--output", place)


@pytest.mark.parametrize("name, reason", [("x" * 5000, "File name too long"), ("a\0b", "(lstat: )?embedded null.*")])
def test_a_name_that_no_file_can_have(here, tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    for call in (
        finetune_arguments(here, name),
        ("trim", "--model", here / "tuned", "--plan", here / "plan", "--output", name),
        ("analyze", "--model", here / "tuned", "--method", "random", "--output", name),
    ):
        assert len(refused(rf"output: cannot write '.*\({reason}\)", *call)) < 200
    refused("train_file: xxx", *finetune_arguments(here, "out", **{"train-file": "x" * 5000}))
    refused("model: xxx", *finetune_arguments(here, "out", model="x" * 5000))
    assert not list(tmp_path.iterdir())


@contextmanager
def files_up_to(size: int):
    """No file may grow beyond size: to whoever writes, the same refusal as that of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_half_written(here, tmp_path):
    trims = ("trim", "--model", here / "tuned", "--plan", here / "plan", "--output", tmp_path / "small")
    scores = here / "tuned.safetensors"
    with untouched(here, tmp_path):
        with files_up_to(20_000):  # less than the weights
            refused("cannot write a checkpoint to .*out.partial", *finetune_arguments(here, tmp_path / "out"))
            refused("cannot write", *trims)
        with files_up_to(1000):
            refused("cannot be written|cannot write", "plan", "--sensitivity", scores, "--output", tmp_path / "plan")


def test_a_disk_that_fills_at_the_end_costs_only_the_end(here, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    requested = finetune_arguments(here, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("sensibert.run_output.write_report", full)
        message = (
            r"cannot write .*out \(No space left on device\); --resume continues from the last complete checkpoint"
        )
        refused(message, *requested)
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    assert sorted(p.name for p in (tmp_path / "out.partial").iterdir()) == [".sensibert-run", "checkpoint-3"]
    done = command(*requested, "--resume", "--json")
    assert done.code == 0 and done.json["steps"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("length", [246, 247, 255])
def test_a_name_too_long_for_the_folders_beside_it_is_refused_before_the_work(here, tmp_path, monkeypatch, length):
    """Of 255 bytes that a name may have, folders that are not complete take more than the output."""
    place, trained = tmp_path / ("x" * length), []
    monkeypatch.setattr(recipe, "load_data", lambda *args: trained.append(args))
    monkeypatch.setattr(commands, "load_folder", lambda *args: trained.append(args))
    plan = ("trim", "--model", here / "tuned", "--plan", here / "plan", "--output", place)
    texts = ("trim", "--model", here / "tuned", "--train-file", here / "train.csv", "--budget", "50%params")
    refused("File name too long", *finetune_arguments(here, place))
    refused("File name too long", *plan)
    refused("File name too long", *texts, "--output", place)
    refused("File name too long", "export", here / "tuned", "--to", "torch", "--output", place)
    refused("File name too long", "analyze", "--model", here / "tuned", "--method", "random", "--output", place)
    assert not trained and not list(tmp_path.iterdir())


@pytest.mark.parametrize("exists", [False, True])
def test_a_place_that_nothing_can_be_moved_to_is_refused_before_the_work(here, tmp_path, monkeypatch, exists):
    """As when OUTPUT.partial, or an empty OUTPUT, is a link to or a mount of another disk."""
    move, trained = os.replace, []
    monkeypatch.setattr(recipe, "load_data", lambda *args: trained.append(args))
    if exists:
        (tmp_path / "out").mkdir(mode=0o750)

    def other_disk(old, new):
        if os.fspath(new) == str(tmp_path / "out"):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        move(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", other_disk)
        refused(
            r"cannot write .*out \(Invalid cross-device link, when a folder is moved there\)",
            *finetune_arguments(here, tmp_path / "out"),
        )
        plan = ("trim", "--model", here / "tuned", "--plan", here / "plan", "--output", tmp_path / "out")
        refused("cannot write .*out .Invalid cross-device", *plan)
    assert not trained and [path.name for path in tmp_path.iterdir()] == ["out"] * exists
    assert command(*plan).code == 0
    if exists:
        assert not list(tmp_path.glob(".*"))


def test_trying_a_place_leaves_it_as_it_was(tmp_path):
    (tmp_path / "empty").mkdir(mode=0o711)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "work").mkdir()
    inode = (tmp_path / "full").stat().st_ino
    before = tree(tmp_path)
    for name in ("new", "deep/er/new", "empty", "full"):
        try_move(tmp_path / name)
        try_move(tmp_path / name, tmp_path / "work")
        assert tree(tmp_path) == before
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o711
    assert (tmp_path / "full").stat().st_ino == inode


def test_a_mount_of_the_same_disk_is_seen(tmp_path, monkeypatch):
    (tmp_path / "out here").mkdir()
    assert not is_mount(tmp_path / "out here")
    escaped = str(tmp_path / "out here").replace(" ", r"\040")
    line, read_text = f"36 35 8:1 /elsewhere {escaped} rw - ext4 /dev/sda1 rw", Path.read_text
    fake = lambda self, *args, **more: line if "mountinfo" in str(self) else read_text(self, *args, **more)  # noqa: E731
    monkeypatch.setattr(Path, "read_text", fake)
    with pytest.raises(SensibertError, match="out here is a mount point, want a folder inside it"):
        check_output(tmp_path / "out here", overwrite=True)


def test_a_config_in_the_home_folder(here, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("budget: 60%params\nwidth_multiple: 4\nsensitivity: ~/s\n")
    shutil.copy(here / "tuned.safetensors", tmp_path / "s")
    assert command("plan", "--dry-run", "--config=~/c.yaml").code == 0


def test_a_finished_run_is_said_to_be_finished_when_it_is_resumed(here, tmp_path, caplog):
    requested = finetune_arguments(here, tmp_path / "out")
    first = command(*requested, "--json")
    before = tree(tmp_path)
    again = command(*requested, "--resume", "--json")
    assert again.code == 0 and again.json == first.json and tree(tmp_path) == before
    assert "out is of this run, which is finished" in caplog.text
    refused("exists and is not empty", *requested, "--resume", "--seed", 5)
    refused("exists and is not empty", *requested)
    (tmp_path / "out" / "result.json").write_text("{}")
    refused("exists and is not empty", *requested, "--resume")
