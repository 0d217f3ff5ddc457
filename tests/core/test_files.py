"""A file is written whole or not at all, and the system's refusal names the path."""

import errno
import os
import resource
import signal

import pytest

from sensibert.core.errors import SensibertError
from sensibert.core.files import make_folder, sync_entries, sync_tree, write_atomically, writing


def filled(size: int):
    def write(path: str) -> None:
        with open(path, "wb") as file:
            file.write(b"x" * size)

    return write


@pytest.fixture
def small_disk():
    """No file can grow past 1,000 bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_is_written_replaces_the_old_one_and_can_be_read_by_all(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    write_atomically(tmp_path / "file", filled(10))
    assert (tmp_path / "file").read_bytes() == b"x" * 10 and os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, small_disk):
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(SensibertError, match="file: cannot be written"):
        write_atomically(tmp_path / "file", filled(2000))
    assert (tmp_path / "file").read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_of_the_writer_passes_and_leaves_nothing(tmp_path):
    def fail(path: str) -> None:
        raise KeyError("name")

    with pytest.raises(KeyError):
        write_atomically(tmp_path / "file", fail)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (Exception("No space left on device (os error 28)"), r"No space left on device \(os error 28\)"),
        (RuntimeError("[enforce] PytorchStreamWriter failed\nat line 2"), r"\[enforce\] PytorchStreamWriter failed"),
    ],
)
def test_a_refusal_names_the_path_whichever_library_it_comes_from(error, reason):
    with pytest.raises(SensibertError, match=rf"^output: cannot write folder/file \({reason}\); try again$"):
        with writing("folder/file", "; try again"):
            raise error


@pytest.mark.parametrize("error", [KeyError("name"), RuntimeError("out of memory"), SensibertError("trim: no")])
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught:
        with writing("file"):
            raise error
    assert caught.value is error


def test_no_file_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        write_atomically(tmp_path / "file", filled(1))
        make_folder(tmp_path / "a" / "b")
        sync_tree(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("number, passes", [(errno.EINVAL, True), (errno.EBADF, True), (errno.EIO, False)])
def test_a_system_that_cannot_sync_a_folder_is_no_error_but_a_broken_disk_is(tmp_path, monkeypatch, number, passes):
    def refuses(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuses)
    if passes:
        sync_entries(tmp_path)
    else:
        with pytest.raises(OSError, match="Input/output error"):
            sync_entries(tmp_path)
