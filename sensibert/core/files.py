"""Atomic writes: a file is written completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import SensibertError


def write_atomically(path: str | Path, write: Callable[[str], object]) -> None:
    """Call write(temporary path in the same folder), then rename it to `path`.

    SensibertError if the system refuses (no space, no permission); an existing file is then unchanged."""
    path, temporary = Path(path), None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise SensibertError(f"{path}: cannot be written ({error})") from error
        raise


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
        if not isinstance(error, (OSError, SafetensorError)) and "os error" not in str(error).lower():
            if "PytorchStreamWriter" not in str(error):
                raise
        reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SensibertError(f"output: cannot write {path} ({reason}){hint}") from None
