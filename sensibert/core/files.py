"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import SensibertError


def write_atomically(path: str | Path, write) -> None:
    """Call write(temporary path beside `path`), then rename: the file is there whole or not at all.

    SensibertError where there is no room or no right to write."""
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
    """The system's refusal to write, from whichever library it comes, as a SensibertError."""
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
