"""A finished folder -> its final path, in one step, for every command that writes a folder.

A folder that is already there is exchanged with the new one: at every moment the path is the old folder or the new
one, each complete. Files of the old folder that no command of ours writes are kept.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import SensibertError
from ..core.files import sync_entries, sync_tree
from ..models.structure import STRUCTURE
from .model_card import CODE, is_card
from .output_paths import aside_of

# What a model folder consists of: not kept when another model takes its place.
REPLACED = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.*"),
    *(STRUCTURE, CODE, "result.json", "recipe.json", "sensitivity.safetensors", "plan.safetensors"),
    *("dense/*", "report/*.png", "report/*.csv", "report/summary.txt"),
)
TOKENIZER = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "spm.model"),
)


def publish(new: Path, target: Path, overwrite: bool) -> None:
    """Move the folder `new` to `target`, on the same file system. On return the target is on the disk.

    overwrite: replace the model in an existing folder. Its other files are kept, unless the new folder has their names.
    OSError if the system refuses, and SensibertError if the target is not empty and overwrite is False; the target is
    then unchanged."""
    exists = target.is_dir() and any(target.iterdir())
    if exists and not overwrite:
        raise SensibertError(f"output: {target} exists and is not empty, want a new folder or --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    if exists:
        shutil.copymode(target, new)
        gone = (*REPLACED, *TOKENIZER) if (new / "tokenizer_config.json").exists() else REPLACED
        for kept in _others(target, Path(), gone):
            _copy(target / kept, new / kept)
    sync_tree(new)
    sync_entries(new.parent)
    if exists:
        _exchange(new, target)
    else:
        os.replace(new, target)  # fails if files have appeared in it
    sync_entries(target.parent)
    if new.exists():  # the old folder now
        shutil.rmtree(new, ignore_errors=True)


def _others(folder: Path, inside: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """The files and links of a folder that match none of the patterns, as relative paths."""
    for path in sorted((folder / inside).iterdir()):
        name = inside / path.name
        if path.is_dir() and not path.is_symlink():
            yield from _others(folder, name, patterns)
        elif not any(_fits(name, pattern) for pattern in patterns) and not (inside == Path() and is_card(path)):
            yield name


def _fits(name: Path, pattern: str) -> bool:
    return len(name.parts) == len(Path(pattern).parts) and name.match(pattern)


def _copy(old: Path, new: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links. A name that is taken stays."""
    if new.exists() or new.is_symlink():
        return
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _exchange(new: Path, target: Path) -> None:
    """Exchange two folders in one step. Where the system cannot: in two, between which the old one lies beside."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):
            here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
            if libc.renameat2(here, os.fsencode(new), here, os.fsencode(target), exchange) == 0:
                return
            code = ctypes.get_errno()
            if code not in (errno.EINVAL, errno.ENOSYS):  # those: not on this file system
                raise OSError(code, os.strerror(code), str(target))
    aside = aside_of(target)
    os.replace(target, aside)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(aside, target)
        raise
    os.replace(aside, new)
