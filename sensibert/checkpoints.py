"""Where a run lives until it is finished, and which of its checkpoints can be trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import nn

from .artifacts import write_atomically
from .errors import SensibertError
from .models.structure import is_trimmed, save_structure

MANIFEST = "sensibert_manifest.json"
STRUCTURE = "structure.safetensors"
MEMORY = "sensibert_run.json"


def _files(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file() and p.name != MANIFEST}


def seal(checkpoint: str | Path, model: nn.Module, memory: dict) -> None:
    """Add structure and memory (what the run must not forget) to a checkpoint, then mark it as whole, last of all."""
    folder = Path(checkpoint)
    if is_trimmed(model):
        save_structure(model, folder / STRUCTURE)
    text = json.dumps(memory)
    write_atomically(folder / MEMORY, lambda path: Path(path).write_text(text))
    manifest = json.dumps(_files(folder))
    write_atomically(folder / MANIFEST, lambda path: Path(path).write_text(manifest))


def check_checkpoint(checkpoint: str | Path) -> None:
    """SensibertError if the folder is not a whole checkpoint of ours."""
    folder = Path(checkpoint)
    try:
        wanted = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        raise SensibertError(f"{folder}: not a whole checkpoint ({MANIFEST} is missing or unreadable)") from None
    found = _files(folder)
    for name, size in wanted.items():
        if found.get(name) != size:
            raise SensibertError(f"{folder}: truncated checkpoint, {name} has {found.get(name, 0)} bytes, want {size}")


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint; None where none was begun; SensibertError if all of them are damaged."""
    found = sorted(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    last: SensibertError | None = None
    for checkpoint in found:
        try:
            check_checkpoint(checkpoint)
        except SensibertError as error:
            last = last or error
        else:
            return checkpoint
    if last is not None:
        raise last
    return None


def partial_folder(output: str | Path) -> Path:
    """Where a run lives until it is finished: checkpoints, the teacher. `output` appears only when it is complete."""
    output = Path(output)
    return output.with_name(output.name + ".partial")


def check_output(output: str | Path, overwrite: bool) -> None:
    """SensibertError if something is there already."""
    output = Path(output)
    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise SensibertError(f"output: {output} exists and is not empty, want a new folder or --overwrite")


def open_workspace(output: str | Path, resume: bool, overwrite: bool) -> tuple[Path, Path | None]:
    """(the run's folder, the checkpoint to resume from). SensibertError where something is in the way."""
    partial = partial_folder(output)
    check_output(output, overwrite)
    checkpoint = None
    if resume:
        checkpoint = latest_checkpoint(partial)
    elif partial.exists() and any(partial.glob("checkpoint-*")) and not overwrite:
        raise SensibertError(f"output: {partial} holds an unfinished run, want --resume or --overwrite")
    else:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        (partial / ".probe").write_text("")
        (partial / ".probe").unlink()
    except OSError as error:
        raise SensibertError(f"output: cannot write to {partial} ({error.strerror})") from None
    return partial, checkpoint
