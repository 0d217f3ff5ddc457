"""The one exception a user of the package has to know."""

from __future__ import annotations


class SensibertError(ValueError):
    """Bad input, said in one line: which argument or file, what came, what was wanted."""
