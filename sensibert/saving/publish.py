"""A finished folder -> its final path, in one step, for every command that writes a folder.

A folder that is already there is exchanged with the new one: at every moment the path is the old folder or the new
one, each complete. Files of the old folder that no command of ours writes are kept.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

from ..core.errors import SensibertError
from ..core.files import make_folder, sync_entries, sync_tree
from ..core.output_paths import aside_of, check_movable
from ..models.structure import STRUCTURE
from .model_card import CODE, is_card
from .sentence_transformers import BESIDE

# What a model folder consists of: not kept when another model takes its place.
MODEL = (
    *("config.json", "generation_config.json", "model.safetensors", "model-?????-of-?????.safetensors"),
    *("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model-?????-of-?????.bin"),
    *("pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    *("tf_model.h5", "training_args.bin", STRUCTURE, CODE),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "bpe.codes", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("spm.model", "chat_template.jinja"),
    # of `deploy`: graphs for other runtimes
    *("onnx/model.onnx", "onnx/model_quantized.onnx", "torch/model.pt2"),
    *("openvino/openvino_model.xml", "openvino/openvino_model.bin"),
    # of sentence-transformers, with its modules: 1_Pooling, 2_Dense, ...
    *(*BESIDE, "[0-9]_*/config.json", "[0-9]_*/model.safetensors", "[0-9]_*/pytorch_model.bin"),
)
RUN = ("result.json", "recipe.json", "sensitivity.safetensors", "plan.safetensors")
REPORT = (
    "summary.txt",
    "ranking.csv",
    "curves.csv",
    "kept.png",
    "sensitivity.png",
    "curves.png",
    "report.html",
    "front.png",
)
REPLACED = (*MODEL, *RUN, *(f"dense/{name}" for name in MODEL), *(f"report/{name}" for name in REPORT))


def publish(new: Path, target: Path, overwrite: bool, hint: str = "want a new folder or --overwrite") -> None:
    """Move the folder `new` to `target`, on the same file system. On return the target is on the disk.

    overwrite: replace the model in an existing folder. Its other files and folders are kept, unless the new folder has
    their names. OSError if the system refuses, and SensibertError, which ends in the hint, if the target is not empty
    and overwrite is False; the target is then unchanged."""
    taken = f"output: {target} exists and is not empty, {hint}"
    exists = target.is_dir() and any(target.iterdir())
    if exists and not overwrite:
        raise SensibertError(taken)
    make_folder(target.parent)
    if exists:
        check_movable(target)
        _keep_others(target, new, Path(), _members(target))
    sync_tree(new)
    sync_entries(new.parent)
    try:
        if exists:
            _exchange(new, target)
        else:
            os.replace(new, target)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise SensibertError(taken) from None  # it has appeared in between
    sync_entries(target.parent)
    if new.exists():  # the old folder now
        shutil.rmtree(new, ignore_errors=True)
        if new.exists():
            logging.getLogger("sensibert").warning("output: %s, which was replaced, cannot be deleted", new)


def _members(folder: Path) -> set[str]:
    """The subfolders that a run wrote for its budgets, by its result.json."""
    try:
        rows = json.loads((folder / "result.json").read_text()).get("rows") or ()
        return {row["folder"] for row in rows}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):  # none, or not of a run
        return set()


def _keep_others(old: Path, new: Path, inside: Path, members: Collection[str] = ()) -> None:
    """Give the new folder what is in the old one, is no member and matches none of REPLACED. Names that are taken
    stay."""
    for path in sorted((old / inside).iterdir()):
        name = inside / path.name
        if path.name in members and inside == Path():
            continue
        if path.is_dir() and not path.is_symlink():
            if name.as_posix() not in ("dense", "report") and not (new / name).exists():
                (new / name).mkdir(parents=True)
            _keep_others(old, new, name)
        elif not any(_fits(name, pattern) for pattern in REPLACED) and not (inside == Path() and is_card(path)):
            copy_file(path, new / name)
    if (new / inside).is_dir():
        shutil.copymode(old / inside, new / inside)  # after its content, which it may forbid to add


def _fits(name: Path, pattern: str) -> bool:
    return len(name.parts) == len(Path(pattern).parts) and name.match(pattern)


def copy_file(old: Path, new: Path) -> None:
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
