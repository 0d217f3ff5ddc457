"""Checks that a folder or file can be written before any work is done."""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from .errors import SensibertError


def check_output(output: str | Path, overwrite: bool) -> None:
    """SensibertError if the folder `output` cannot be written: it is a file or link, or is not empty."""
    output = _possible(output)
    if not output.name:
        raise SensibertError(f"output is {str(output)!r}, want the name of a new folder")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        what = "a link" if output.is_symlink() else "a file"
        raise SensibertError(f"output: {output} is {what}, want the name of a new folder, or of one to replace")
    if output.exists() and not overwrite and any(output.iterdir()):
        raise SensibertError(f"output: {output} exists and is not empty, want a new folder or --overwrite")
    check_movable(output)


def _possible(path: str | Path) -> Path:
    """The path; SensibertError for a name that no file can have."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        shown = repr(str(path))[:80]
        raise SensibertError(f"output: cannot write {shown} ({getattr(error, 'strerror', None) or error})") from None
    parent = next(parent for parent in Path(path).absolute().parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise SensibertError(f"output: cannot write {path} ({parent} is a file)")
    return Path(path)


def check_movable(output: Path) -> None:
    """SensibertError if no folder can be moved to this path."""
    if is_mount(output):
        raise SensibertError(f"output: {output} is a mount point, want a folder inside it")
    for name in ("dense", "report"):
        if os.path.lexists(output / name) and (output / name).is_symlink() | (not (output / name).is_dir()):
            raise SensibertError(f"output: {output / name} is no folder, and one of that name may be written")
    if output.exists() and not _may_be_moved(output):
        raise SensibertError(f"output: {output} belongs to another user, who alone may move it; want another folder")
    mounts = _mounts()
    for folder, inside, _ in os.walk(output):
        for path in (os.path.join(folder, name) for name in inside):
            if is_mount(path, mounts):
                raise SensibertError(f"output: {path} is a mount point, want an output without one")
    if aside_of(output).exists() and not output.exists():
        raise SensibertError(
            f"output: {aside_of(output)} is what was in {output} when a command was killed; rename or delete it first"
        )


def is_mount(path: str | Path, mounts: set[str] | None = None) -> bool:
    """Whether something is mounted there, also a folder or file of the same disk, which Python alone does not see.
    mounts: of `_mounts`, for many paths."""
    folder, name = os.path.split(os.path.abspath(path))  # a link to a mount is none
    return os.path.ismount(path) or os.path.join(os.path.realpath(folder), name) in (
        _mounts() if mounts is None else mounts
    )


def _mounts() -> set[str]:
    """Every path at which something is mounted; none on systems without /proc."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in lines}


def _may_be_moved(path: Path) -> bool:
    """In a folder with the sticky bit, such as /tmp, only its owner and that of the file may move a file."""
    parent, user = path.absolute().parent.stat(), os.geteuid() if hasattr(os, "geteuid") else 0
    return not parent.st_mode & stat.S_ISVTX or user in (0, parent.st_uid, path.lstat().st_uid)


def unfinished_name(name: str) -> str:
    """A new name for a folder that gets its final name when it is complete."""
    return f".{name}.{secrets.token_hex(4)}"


def try_move(output: str | Path, workplace: Path | None = None) -> None:
    """Move an empty folder from the workplace, by default beside the output, to the output, and take it back:
    SensibertError before the work if the last step of a command would fail. A folder with files is not moved."""
    output = Path(output).absolute()
    anchor = next(parent for parent in output.parents if parent.exists())
    probe = (workplace or anchor) / unfinished_name(output.name)
    moved = [probe]
    try:
        probe.mkdir()
        if output.parent.exists() and not (output.exists() and any(output.iterdir())):
            permissions = output.stat().st_mode if output.exists() else None
            os.replace(probe, output)
            moved = [output]
            if permissions is not None:
                output.chmod(stat.S_IMODE(permissions))  # as empty as it was
                moved = []
        else:
            target = anchor / unfinished_name(output.name)
            os.replace(probe, target)
            moved = [target]
    except OSError as error:
        reason = error.strerror or error
        raise SensibertError(f"output: cannot write {output} ({reason}, when a folder is moved there)") from None
    finally:
        for folder in (*moved, probe):
            with suppress(OSError):
                folder.rmdir()


def aside_of(output: Path) -> Path:
    """Where an old folder lies while the new one is moved to its path, on systems that cannot exchange two folders."""
    return output.with_name(f"{output.name}.replaced")


def check_apart(output: str | Path, **inputs: str | None) -> None:
    """SensibertError if replacing `output` would delete an input of the run, or the working folder."""
    target = Path(output).resolve()
    for name, given in inputs.items():
        if given is not None and os.path.exists(given) and any(p.is_relative_to(target) for p in _files_of(given)):
            raise SensibertError(f"output: {output} holds the {name} of this run ({given}), want another folder")
    for name, folder in (("working folder", "."), ("home folder", os.path.expanduser("~"))):
        if Path(folder).resolve().is_relative_to(target):
            raise SensibertError(f"output: {output} holds the {name}, want another folder")


def _files_of(given: str) -> list[Path]:
    """A file, or a folder and the files in it, without links."""
    path = Path(given)
    return [each.resolve() for each in (path, *(path.iterdir() if path.is_dir() else ()))]


def check_file(path: str | Path, overwrite: bool, **inputs: str | None) -> None:
    """SensibertError if the file `path` cannot be written, or is an input or a file of a model that is one."""
    path = _possible(path)
    if path.is_dir():
        raise SensibertError(f"output: {path} is a folder, want the name of a file")
    if os.path.lexists(path) and not overwrite:
        raise SensibertError(f"output: {path} exists, want a new file or --overwrite")
    if not path.parent.is_dir():
        raise SensibertError(f"output: cannot write {path} (there is no folder {path.parent})")
    if not os.access(path.parent, os.W_OK):
        raise SensibertError(f"output: cannot write {path} (Permission denied)")
    if is_mount(path) or (path.exists() and not _may_be_moved(path)):
        raise SensibertError(f"output: {path} cannot be replaced (it is mounted, or another user's), want another file")
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # as `write_atomically` does
        os.close(handle)
        os.unlink(temporary)
    except OSError as error:
        raise SensibertError(f"output: cannot write {path} ({error.strerror or error})") from None
    for name, given in inputs.items():
        if given is not None and os.path.exists(given) and path.exists() and path.resolve() in _files_of(given):
            raise SensibertError(f"output: {path} is the {name} of this command or a part of it, want another file")
