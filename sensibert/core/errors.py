"""The exception that the package raises for bad input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class SensibertError(ValueError):
    """Bad input, in one line: the argument or file, the value, and what was expected."""


class Terminated(SensibertError):
    """The process was asked to end, and a training saved its state first."""


class OfAnother(SensibertError):
    """Another process of the same training failed, and says why."""


class Told(OfAnother):
    """Another process failed too, and has said why."""


_IN_OUR_WORDS = {
    "trust_remote_code": "it needs code of its own, which sensibert does not run",
    "weights_only": "its pytorch_model.bin is damaged, or holds more than weights",
    "ignore_mismatched_sizes": "its weights have other shapes than its config.json says",
}


def first_line(error: BaseException) -> str:
    """The first line of a library's error, to quote in ours; in our words where it gives advice for other callers."""
    for sign, words in _IN_OUR_WORDS.items():
        if sign in str(error):
            return words
    text = repr(error) if isinstance(error, KeyError) else str(error)
    lines = (text.strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])[:200]


def described(error: BaseException) -> str:
    """The class of a library's error and its first line."""
    line = first_line(error)
    return line if isinstance(error, KeyError) else f"{type(error).__name__}: {line}"  # that one names its class


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """A context whose SensibertErrors name the argument that the file or folder came from."""
    try:
        yield
    except SensibertError as error:
        raise SensibertError(f"{argument}: {error}") from None
