"""Packed batches: the rows of a batch one after the other, without padding, rounded up to one of a few totals."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .encode import Features

TOTALS = 6  # totals of a data set: each brings new matrix shapes
BATCHES = 512  # drawn batches that the totals are chosen by
ROUND = 16  # totals are multiples of this


def choose_totals(lengths: Sequence[int], batch_size: int, number: int = TOTALS) -> list[int]:
    """`number` totals that random batches are rounded up to with the least padding, smallest first.

    Exact for BATCHES drawn batches, by dynamic programming. Larger batches, which are rare, are not covered."""
    lengths_ = np.asarray(lengths)
    drawn = np.random.default_rng(0).choice(lengths_, (BATCHES, min(batch_size, len(lengths_)))).sum(1)
    sizes, counts = np.unique(drawn + -drawn % ROUND, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    cost, choices = np.where(np.arange(len(sizes) + 1) == 0, 0.0, np.inf), []
    for _ in range(min(number, len(sizes))):
        # [i, j]: cost of the first j sizes, if those from i on are rounded up to the last of them
        rounded = sizes[None, :] * (before[None, 1:] - before[:-1, None])
        total = np.where(
            np.arange(len(sizes))[None, :] >= np.arange(len(sizes))[:, None], cost[:-1, None] + rounded, np.inf
        )
        choices.append(total.argmin(0))
        cost = np.minimum(np.concatenate([[0.0], total.min(0)]), cost)
    totals, end = [], len(sizes)
    for choice in reversed(choices):
        if end:
            totals.append(int(sizes[end - 1]))
            end = int(choice[end - 1])
    return totals[::-1]


class Packer:
    """Numbers of rows -> (batch, lengths of its rows), with the rows sorted by length, the longest first.

    batch: input_ids, position_ids and other fields of tokens [1, T], fields of items [rows]. T: the next total, or
    beyond the largest the next multiple of ROUND. Padding follows the rows; its labels are -100. longest: row of the
    data."""

    def __init__(self, features: Features, batch_size: int, padding: Mapping[str, int]) -> None:
        self.features, self.padding = features, padding
        self.totals, self.longest = choose_totals(features.lengths, batch_size), max(features.lengths)

    def total(self, tokens: int) -> int:
        return next((total for total in self.totals if total >= tokens), tokens + -tokens % ROUND)

    def tokens(self, rows: Sequence[int]) -> tuple[int, int]:
        """The tokens of a batch of these rows, without and with its padding."""
        tokens = int(self._lengths(np.asarray(rows, np.int64)).sum())
        return tokens, self.total(tokens)

    def shares(self, rows: Sequence[int], count: int) -> list[tuple[list[int], float]]:
        """Divide a batch among processes: the rows of each, with about as many tokens, and its fraction of the terms of
        the loss. Those are the rows, or where tokens have labels, the tokens with one.

        The loss of the batch is the sum of the losses of the shares, each times its fraction. A share may have no rows,
        or none with a term: its fraction is 0, unless there is no term at all."""
        if count == 1:
            return [(list(rows), 1.0)]
        parts: list[list[int]] = [[] for _ in range(count)]
        least = [(0, number) for number in range(count)]  # heap of (tokens, process)
        for length, row in sorted(zip((-self._lengths(np.asarray(rows, np.int64))).tolist(), rows, strict=True)):
            tokens, number = heapq.heappop(least)
            parts[number].append(row)
            heapq.heappush(least, (tokens - length, number))
        terms = [self._terms(part) for part in parts]
        total = sum(terms)
        return [(part, share / total if total else 1.0) for part, share in zip(parts, terms, strict=True)]

    def _lengths(self, rows: np.ndarray) -> np.ndarray:
        return self.features.ends[1:][rows] - self.features.ends[:-1][rows]

    def _terms(self, rows: Sequence[int]) -> int:
        labels, ends = self.features.per_token.get("labels"), self.features.ends
        if labels is None:
            return len(rows)
        return sum(int(np.count_nonzero(labels[ends[row] : ends[row + 1]] != -100)) for row in rows)

    def __call__(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
        begins, order = self.features.ends[:-1], np.asarray(rows)
        order = order[np.argsort(-self._lengths(order), kind="stable")]
        lengths = self._lengths(order)
        tokens, batch = int(lengths.sum()), {}
        place = np.arange(tokens) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        source = np.repeat(begins[order], lengths) + place
        fields = {name: values[source] for name, values in self.features.per_token.items()}
        for name, values in {**fields, "position_ids": place}.items():
            flat = np.full((1, self.total(tokens)), self.padding.get(name, 0), np.int64)
            flat[0, :tokens] = values
            batch[name] = torch.from_numpy(flat)
        for name, values in self.features.per_item.items():
            chosen = values[order]
            # as the padding collator does
            batch[name] = torch.tensor(chosen.tolist()) if chosen.ndim == 1 else torch.from_numpy(chosen)
        return batch, lengths.tolist()
