"""The exception that the package raises for bad input."""

from __future__ import annotations


class SensibertError(ValueError):
    """Bad input, in one line: the argument or file, the value, and what was expected."""
