"""The exception that the package raises for bad input."""

from __future__ import annotations


class SensibertError(ValueError):
    """Bad input, in one line: the argument or file, the value, and what was expected."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error, to quote in ours; in our words where it asks to run foreign code."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which sensibert does not run"
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
