"""Atomic, durable writes: a file is written completely or not at all, and stays after a power cut."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import SensibertError

_SIGNS = ("os error", "PytorchStreamWriter", "inline_container")  # in errors of libraries when they write
_FULL = 2**16  # bytes that are free
_CANNOT_SYNC = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.EBADF, errno.ENOTSUP)


def sync_entries(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, on systems that can do so for folders."""
    try:
        _fsync(folder)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. On return their names are on the disk."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in made:
        sync_entries(each.parent)


def make_readable(path: str | Path) -> None:
    """Give a file the permissions of any new file; temporary files can be read by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def sync_tree(folder: Path) -> None:
    """Wait until a folder, with every file and folder in it, is on the disk."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            sync_tree(path)
        elif path.is_file():
            _fsync(path)
    sync_entries(folder)


def write_atomically(path: str | Path, write: Callable[[str], object]) -> None:
    """Call write(temporary path in the same folder), then rename it to `path`. On return the file is on the disk.

    SensibertError if the system refuses (no space, no permission); an existing file is then unchanged."""
    path, temporary = Path(path), None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        write(temporary)
        make_readable(temporary)
        _fsync(Path(temporary))
        os.replace(temporary, path)
        sync_entries(path.parent)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise SensibertError(f"{path}: cannot be written ({error})") from error
        raise


def _is_full(path: Path) -> bool:
    """Whether the disk of a path is full: not every library says so."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free < _FULL


@contextmanager
def writing(path: str | Path, hint: str = "") -> Iterator[None]:
    """A context that turns errors of the file system, from any library, into a SensibertError.

    path: what is written, for the message. hint: appended to the message. Other errors are raised unchanged."""
    try:
        yield
    except SensibertError:
        raise
    except Exception as error:
        # tokenizers raises a bare Exception, torch.save a RuntimeError
        known = isinstance(error, (OSError, SafetensorError)) or any(sign in str(error) for sign in _SIGNS)
        if not known and not (isinstance(error, RuntimeError) and _is_full(Path(path))):
            raise
        reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SensibertError(f"output: cannot write {path} ({reason}){hint}") from None
