"""Which outputs are refused before the work, one cause at a time; tests/test_bad_place.py has whole commands."""

import os

import pytest

from sensibert.core.errors import SensibertError
from sensibert.core.output_paths import (
    _may_be_moved,
    aside_of,
    check_apart,
    check_file,
    check_movable,
    check_output,
    unfinished_name,
)


def refused(message, function, *args, **kwargs) -> None:
    with pytest.raises(SensibertError, match=f"^output: {message}|^output is {message}"):
        function(*args, **kwargs)


def test_a_new_folder_an_empty_one_and_one_to_replace_are_taken(tmp_path):
    check_output(tmp_path / "a" / "b" / "c", overwrite=False)
    check_output(tmp_path, overwrite=False)
    (tmp_path / "file").write_text("")
    check_output(tmp_path, overwrite=True)
    refused(".* exists and is not empty, want a new folder or --overwrite", check_output, tmp_path, False)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_folder_is_refused(tmp_path, overwrite):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    refused("'.', want the name of a new folder", check_output, ".", overwrite)
    refused(".*file is a file, want", check_output, tmp_path / "file", overwrite)
    for name in ("link", "broken"):
        refused(f".*{name} is a link, want", check_output, tmp_path / name, overwrite)
    refused(r"cannot write .* \(.*/file is a file\)", check_output, tmp_path / "file" / "a" / "b", overwrite)
    refused(r"cannot write 'a\\x00' \(.*null", check_output, "a\0", overwrite)
    refused(r"cannot write .* \(File name too long\)", check_output, tmp_path / ("x" * 300), overwrite)


@pytest.mark.parametrize("name", ["dense", "report"])
def test_a_file_or_link_where_a_folder_will_be_written(tmp_path, name):
    (tmp_path / name).mkdir()
    check_movable(tmp_path)
    (tmp_path / name).rmdir()
    (tmp_path / name).write_text("")
    refused(f".*{name} is no folder", check_movable, tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    refused(f".*{name} is no folder", check_movable, tmp_path)


def test_what_a_killed_command_left_aside_is_not_forgotten(tmp_path):
    output = tmp_path / "out"
    assert aside_of(output) == tmp_path / "out.replaced"
    aside_of(output).mkdir()
    refused(".*out.replaced is what was in .*out when a command was killed; rename or delete it", check_movable, output)
    output.mkdir()
    check_movable(output)  # the exchange was finished


def test_in_a_sticky_folder_only_the_owner_moves(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    owner = (tmp_path / "mine").stat().st_uid
    for sticky, user, may in ((True, owner, True), (True, owner + 1, False), (False, owner + 1, True), (True, 0, True)):
        tmp_path.chmod(0o1777 if sticky else 0o777)
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        assert _may_be_moved(tmp_path / "mine") == may
        if not may:
            refused(".* belongs to another user, who alone may move it", check_movable, tmp_path / "mine")


def test_an_output_holds_no_input_and_not_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "out" / "inside").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "out" / "data.csv").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    check_apart("out", model="model", train_file=None, teacher="not-there")
    check_apart("out", model="out.csv")
    refused(r".*holds the train_file of this run \(out/data.csv\)", check_apart, "out", train_file="out/data.csv")
    refused(r".*holds the model of this run \(out\)", check_apart, "out", model="out")
    (tmp_path / "model" / "weights").symlink_to(tmp_path / "out" / "data.csv")
    refused("out holds the model of this run", check_apart, "out", model="model")
    refused(".* holds the working folder", check_apart, tmp_path.parent)
    monkeypatch.setenv("HOME", str(tmp_path / "out" / "inside"))
    refused("out holds the home folder", check_apart, "out")


def test_a_file_is_written_only_where_there_is_none_or_on_request(tmp_path, monkeypatch):
    check_file(tmp_path / "new", overwrite=False, model=str(tmp_path))
    assert not any(tmp_path.iterdir())
    (tmp_path / "old").write_text("old")
    check_file(tmp_path / "old", True, model=None, plan="not-there")
    refused(".*old exists, want a new file or --overwrite", check_file, tmp_path / "old", False)
    refused(".* is a folder, want the name of a file", check_file, tmp_path, True)
    refused(".*there is no folder .*nowhere", check_file, tmp_path / "nowhere" / "new", True)
    for given in (tmp_path / "old", tmp_path):
        message = ".*old is the plan of this command or a part of it"
        refused(message, check_file, tmp_path / "old", True, plan=str(given))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    refused(".*Permission denied", check_file, tmp_path / "new", False)
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "old"


def test_names_of_what_is_not_finished_are_hidden_and_differ():
    names = {unfinished_name("out") for _ in range(20)}
    assert len(names) == 20 and all(name.startswith(".out.") and len(name) == 13 for name in names)
