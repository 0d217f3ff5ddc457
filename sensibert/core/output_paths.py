"""Checks that a folder or file can be written before any work is done."""

from __future__ import annotations

import os
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
    if os.path.ismount(output):
        raise SensibertError(f"output: {output} is a mount point, want a folder inside it")
    for name in ("dense", "report"):
        if os.path.lexists(output / name) and (output / name).is_symlink() | (not (output / name).is_dir()):
            raise SensibertError(f"output: {output / name} is no folder, and one of that name may be written")
    for folder, inside, _ in os.walk(output):
        for path in (os.path.join(folder, name) for name in inside):
            if os.path.ismount(path):
                raise SensibertError(f"output: {path} is a mount point, want an output without one")
    if aside_of(output).exists() and not output.exists():
        raise SensibertError(
            f"output: {aside_of(output)} is what was in {output} when a command was killed; rename or delete it first"
        )


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
    for name, given in inputs.items():
        if given is not None and os.path.exists(given) and path.exists() and path.resolve() in _files_of(given):
            raise SensibertError(f"output: {path} is the {name} of this command or a part of it, want another file")
