"""Batches: the collator that pads them, and the micro-batches of an analysis."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.rows import Rows
from .encode import IGNORED, Features
from .packing import Packer


class Collator:
    """Items -> a batch of int64 or float32 tensors, padded on the right to the longest item.

    pad_to_multiple_of: pad to the next multiple, but not beyond max_length, where the model may have no positions.
    Labels are padded with -100, everything but input_ids and labels with 0. A batch without padding has no
    attention_mask: attention is faster without one."""

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None, max_length: int | None = None) -> None:
        self.pad_to_multiple_of, self.max_length = pad_to_multiple_of, max_length
        self.padding = {"input_ids": pad_token_id, "labels": IGNORED}  # everything else: 0

    def __call__(self, items: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        lengths = {len(item["input_ids"]) for item in items}
        longest = self._width(max(lengths), self.pad_to_multiple_of)
        batch = {}
        for name, first in items[0].items():
            if name == "attention_mask" and lengths == {longest}:
                continue
            values = [item[name] for item in items]
            if isinstance(first, list) and not isinstance(first[0], float):  # those are several labels of one item
                padded = np.full((len(items), longest), self.padding.get(name, 0), np.int64)
                for row, value in zip(padded, values):
                    row[: len(value)] = value
                batch[name] = torch.from_numpy(padded)
            elif isinstance(first, np.ndarray):
                batch[name] = torch.from_numpy(np.stack(values))
            else:
                batch[name] = torch.tensor(values)
        return batch

    def extended(self, batch: Mapping[str, Tensor], multiple: int) -> dict[str, Tensor]:
        """A batch of this collator, padded further to a multiple of `multiple` tokens."""
        more = self._width(batch["input_ids"].shape[1], multiple) - batch["input_ids"].shape[1]
        if more and "attention_mask" not in batch:
            batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
        return {
            name: pad(value, (0, more), value=self.padding.get(name, 0)) if _of_tokens(value) else value
            for name, value in batch.items()
        }

    def packer(self, data: object, batch_size: int) -> Packer | None:
        """Makes packed batches of `batch_size` rows; None for data without flat arrays."""
        return Packer(data, batch_size, self.padding) if isinstance(data, Features) else None

    def _width(self, longest: int, multiple: int | None) -> int:
        width = longest + -longest % multiple if multiple else longest
        return width if self.max_length is None else max(longest, min(width, self.max_length))


def _of_tokens(value: Tensor) -> bool:
    """Whether it has a number for each token; vectors of items are floats."""
    return value.dim() == 2 and not value.is_floating_point()


def micro_batches(
    data: Rows, collator: Callable[[list], dict], samples: int, size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of `size` rows from `samples` random rows, drawn without replacement and sorted by length, the longest
    first, to save padding. Rows with other columns, as in a concatenation of data sets, are not in the same batch."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    drawn = sorted((data[row] for row in order), key=_length, reverse=True)
    kinds: dict[Hashable, list] = {}
    for row in drawn:
        kinds.setdefault((*row, row.get("dataset_name")), []).append(row)
    for rows in kinds.values():
        for begin in range(0, len(rows), size):
            yield collator(rows[begin : begin + size])


def _length(row: Mapping[str, Any]) -> int:
    """The tokens of a row, or the characters of one with texts, which its collator tokenizes."""
    if "input_ids" not in row and any(isinstance(value, str) for value in row.values()):
        return sum(len(str(value)) for value in row.values())
    return len(row["input_ids"])
