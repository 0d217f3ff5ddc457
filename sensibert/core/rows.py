"""A data set as this package reads it."""

from typing import Any, Protocol


class Rows(Protocol):
    """A data set with a length and an index, whose items hold input_ids."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...
