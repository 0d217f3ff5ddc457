"""The embeddings of the original model, made once before the training."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from ..core.files import write_atomically, writing
from ..core.progress import Progress, unseen
from ..core.rows import Rows
from .checkpoints import DIGEST, PART
from .manifest import digest_of
from .predict import predict

CHUNK = 16384  # texts whose embeddings are in memory at a time
IN_MEMORY = 2**28  # bytes of a file up to which it is read into memory; larger ones are mapped


def _digest_beside(file: Path) -> Path:
    return file.with_name(file.name + DIGEST)


def _is_whole(file: Path) -> bool:
    """Whether a file is there and has the content that was written; a warning tells if it has another."""
    try:
        noted = _digest_beside(file).read_bytes()
    except FileNotFoundError:  # writing was interrupted, or an earlier version wrote the file
        return False
    if whole := file.is_file() and digest_of(file).encode() == noted:
        return whole
    logging.getLogger("sensibert").warning("resume: %s is damaged; it is made again", file)
    return False


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
    """Embeddings [texts, H], fp32, read from a file, which is written first if it does not exist or is damaged.

    progress: called for every batch, with the phase `embed` and the texts that are done."""
    if not _is_whole(file):
        temporary = file.with_suffix(PART)
        # A map in memory would end the process when the disk is full.
        with writing(file), open(temporary, "wb") as content:
            for begin in range(0, len(texts), CHUNK):
                end = min(begin + CHUNK, len(texts))
                share = partial(_tell, progress, range(begin, end), len(texts))
                part = np.asarray(predict(model, texts.part(begin, end), collator, autocast=autocast, progress=share))
                if begin == 0:
                    header = {"descr": "<f4", "fortran_order": False, "shape": (len(texts), part.shape[1])}
                    np.lib.format.write_array_header_1_0(content, header)
                content.write(np.ascontiguousarray(part, "<f4").data)
        os.replace(temporary, file)
        write_atomically(_digest_beside(file), lambda path: Path(path).write_text(digest_of(file)))
    return np.load(file, mmap_mode="r" if file.stat().st_size > IN_MEMORY else None)


def _tell(progress: Progress, part: range, texts: int, _: str, done: int, batches: int | None) -> None:
    """Tell `progress` how many of all texts are done, from the batches of a part."""
    progress("embed", part.start + (len(part) * done // batches if batches else 0), texts)
