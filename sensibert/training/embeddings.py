"""The embeddings of the original model, made once before the training."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from ..core.progress import Progress, unseen
from ..core.rows import Rows
from .checkpoints import PART
from .predict import predict

CHUNK = 16384  # texts whose embeddings are in memory at a time
IN_MEMORY = 2**28  # bytes of a file up to which it is read into memory; larger ones are mapped


class Texts(Protocol):
    """Encoded texts; part(begin, end): those of a range."""

    def __len__(self) -> int: ...
    def part(self, begin: int, end: int, /) -> Rows: ...


def saved_embeddings(
    file: Path,
    model: nn.Module,
    texts: Texts,
    collator: Callable,
    autocast: torch.dtype | None = None,
    progress: Progress = unseen,
) -> np.ndarray:
    """Embeddings [texts, H], fp32, read from a file, which is written first if it does not exist.

    progress: called for every batch, with the phase `embed` and the texts that are done."""
    if not file.exists():
        temporary, rows = file.with_suffix(PART), None
        for begin in range(0, len(texts), CHUNK):
            end = min(begin + CHUNK, len(texts))
            share = partial(_tell, progress, range(begin, end), len(texts))
            part = np.asarray(predict(model, texts.part(begin, end), collator, autocast=autocast, progress=share))
            if rows is None:
                rows = np.lib.format.open_memmap(temporary, "w+", np.float32, (len(texts), part.shape[1]))
            rows[begin:end] = part
        assert rows is not None  # there are texts
        rows.flush()
        os.replace(temporary, file)
    return np.load(file, mmap_mode="r" if file.stat().st_size > IN_MEMORY else None)


def _tell(progress: Progress, part: range, texts: int, _: str, done: int, batches: int | None) -> None:
    """Tell `progress` how many of all texts are done, from the batches of a part."""
    progress("embed", part.start + (len(part) * done // batches if batches else 0), texts)
