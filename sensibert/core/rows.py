"""A data set as this package reads it."""

from typing import Any, Protocol


class Rows(Protocol):
    """A data set with a length and an index, whose items are dicts: of input_ids, or of texts for a collator that
    tokenizes them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...
