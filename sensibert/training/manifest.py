"""The manifest of a folder: size and SHA-256 of every file in it, by which damage is found."""

from __future__ import annotations

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..core.errors import SensibertError
from ..core.files import write_atomically
from ..core.json_text import parse_json
from ..models.structure import STRUCTURE

MANIFEST = "sensibert_manifest.json"
MEMORY = "sensibert_run.json"
VERSION = 2  # 1, without a number: names and sizes alone
WEIGHTS = ("*.safetensors", "*.bin")
# Files that a resumed training reads: one that is there must be in the manifest.
READ = (
    *("model*.safetensors", "pytorch_model*.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("config.json", TRAINER_STATE_NAME, MEMORY, STRUCTURE),
)


def write_manifest(folder: Path) -> None:
    """Write the manifest of a folder, whose files are on the disk. It marks the folder as complete."""
    facts = ((name, folder / name) for name in _names(folder))
    files = {name: {"bytes": file.stat().st_size, "sha256": digest_of(file)} for name, file in facts}
    text = json.dumps({"version": VERSION, "files": files}, indent=1)
    write_atomically(folder / MANIFEST, lambda path: Path(path).write_text(text))


def check_manifest(folder: Path, what: str, required: tuple[str, ...] = ()) -> bool:
    """Whether the manifest has digests, which those of version 0.1 have not. what: is in the folder, for messages.

    SensibertError naming the first file that is missing, damaged or not listed; required: names that must be."""
    sizes, digests = _entries(folder, what)
    for name in (*required, *(n for n in _names(folder) if any(fnmatch(n, pattern) for pattern in READ))):
        if name not in sizes:
            raise SensibertError(f"{folder}: damaged {what}, its {MANIFEST} does not list {name}")
    if not any(fnmatch(name, pattern) for name in sizes for pattern in WEIGHTS):
        raise SensibertError(f"{folder}: damaged {what}, its {MANIFEST} lists no weights")
    for name, size in sizes.items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else None
        if actual is None:
            raise SensibertError(f"{folder}: damaged {what}, {name} is missing")
        if actual != size:
            raise SensibertError(f"{folder}: truncated {what}, {name} has {actual} bytes, want {size}")
        if digests is not None and digests[name] != digest_of(folder / name):
            raise SensibertError(f"{folder}: damaged {what}, {name} has other content than when it was written")
    return digests is not None


def check_without_digests(checkpoint: Path) -> None:
    """SensibertError if the state in a checkpoint of version 0.1, of which only sizes are known, cannot be read."""
    try:
        parse_json((checkpoint / MEMORY).read_text())
        if (checkpoint / TRAINER_STATE_NAME).exists():
            TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SensibertError(f"{checkpoint}: damaged checkpoint, its state cannot be read ({error})") from None


def _names(folder: Path) -> list[str]:
    """Paths of the files in a folder and its folders, except its manifest."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST)


def digest_of(file: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while part := content.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def _entries(folder: Path, what: str) -> tuple[dict[str, int], dict[str, str] | None]:
    """Name -> size, and name -> SHA-256 or, for a manifest of version 0.1, None."""
    try:
        manifest = parse_json((folder / MANIFEST).read_text())
        if all(isinstance(size, int) for size in manifest.values()) and "version" not in manifest:
            return manifest, None
        if manifest["version"] != VERSION:
            raise ValueError(f"version {manifest['version']}")
        files = manifest["files"]
        return (
            {name: int(entry["bytes"]) for name, entry in files.items()},
            {name: str(entry["sha256"]) for name, entry in files.items()},
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise SensibertError(f"{folder}: not a complete {what} ({MANIFEST} is missing or unreadable)") from None
