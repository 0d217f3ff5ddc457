"""Checkpoints with a manifest, which shows that they are complete, and the folder of an unfinished run."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import cast

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from ..core.errors import SensibertError
from ..core.files import make_folder, sync_entries, sync_tree, write_atomically, writing
from ..models import base_of, sites
from ..models.masks import masks_of
from ..models.modules import want_finite
from ..models.structure import STRUCTURE, is_trimmed, save_structure
from .manifest import MANIFEST, MEMORY, check_manifest, check_without_digests, write_manifest

SNAPSHOT = "snapshot"  # in the folder of the run: the model at the cut
BRANCHES = "branches"  # in the folder of the run: a folder for each run that goes on from its warm-up
LOGS = "runs"  # in the folder of the run: what TensorBoard reads
EMBEDDINGS = "embeddings.npy"  # in the folder of the run: those of the original model
DIGEST = ".sha256"  # suffix of the file with the digest of a file
PART = ".part"  # suffix of a file that is being written
MARKER = ".sensibert-run"  # in the folder of an unfinished run; the process that runs in it holds its lock
# Arguments of a Trainer (numbers and texts) that the weights at a step depend on.
LEARNS_BY = (
    *("learning_rate", "gradient_accumulation_steps", "weight_decay", "max_grad_norm", "optim", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "lr_scheduler_type", "warmup_steps", "bf16", "fp16", "seed", "data_seed"),
)


def seal(checkpoint: str | Path, model: nn.Module, memory: dict) -> None:
    """Add the structure of the model and the memory of the run to a checkpoint, then mark it as complete.

    SensibertError, and no mark, if a weight is not finite: nothing could be resumed from it."""
    folder = Path(checkpoint)
    want_finite(model.named_parameters(), f"training: cannot go on after {folder.name}")
    if is_trimmed(model) or masks_of(model) is not None:
        save_structure(model, folder / STRUCTURE)
    text = json.dumps(memory)
    write_atomically(folder / MEMORY, lambda path: Path(path).write_text(text))
    sync_tree(folder)  # before the manifest: a power cut may not leave a mark on files without content
    sync_entries(folder.parent)
    write_manifest(folder)


def check_checkpoint(checkpoint: str | Path) -> bool:
    """SensibertError if the folder is not a complete checkpoint of a sensibert run with finite weights. Returns whether
    its manifest has digests; those of version 0.1 have sizes alone."""
    folder = Path(checkpoint)
    if not (has_digests := check_manifest(folder, "checkpoint", required=(MEMORY,))):
        check_without_digests(folder)
    for file in folder.glob("model*.safetensors"):
        try:
            with safe_open(file, "pt") as weights:
                want_finite(((name, weights.get_tensor(name)) for name in weights.keys()), str(folder))  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise SensibertError(f"{folder}: damaged checkpoint, {file.name} cannot be read ({error})") from None
    return has_digests


def learns_by(arguments: TrainingArguments) -> dict[str, object]:
    """The arguments named in LEARNS_BY, as JSON values."""
    values = {"batch_size": arguments.train_batch_size, **{name: getattr(arguments, name) for name in LEARNS_BY}}
    return {name: value if isinstance(value, int | float | None) else str(value) for name, value in values.items()}


def refuse_trimmed_weights(model: nn.Module, weights: Mapping[str, Tensor], prefix: str = "", *_: object) -> None:
    """Pre-hook of load_state_dict: SensibertError if these are the weights of a model trimmed further than this one."""
    trimmable = {id(base_of(model).get_parameter(m.parameter)) for site in sites(model) for m in site.members}
    for name, weight in model.named_parameters():
        given = weights.get(prefix + name)
        if id(weight) in trimmable and given is not None and given.numel() < weight.numel():
            raise SensibertError(
                f"resume: {name} is {tuple(given.shape)} in the checkpoint of a trimmed model, and "
                f"{tuple(weight.shape)} in this one: want TrimTrainer in place of Trainer (or "
                "a subclass of TrimTrainer and your trainer), which trims the model first"
            )


def want_same(checkpoint: str | Path, was: dict[str, object], now: dict[str, object]) -> None:
    """SensibertError naming the first setting in which a checkpoint differs from the run that would resume from it."""
    for name in was | now:
        if was.get(name) != now.get(name):
            raise SensibertError(
                f"resume: {checkpoint} has {name} {was.get(name)}, and this run {now.get(name)}: want the same"
            )


OF_A_STEP = ("processes", "batch_size", "gradient_accumulation_steps")  # their product: the rows of a step


def want_same_run(checkpoint: str | Path, was: dict[str, object], now: dict[str, object]) -> None:
    """`want_same`, but another number of processes may share the rows of a step.

    SensibertError if these are not as many rows."""
    if was.get("processes") != now.get("processes"):
        rows, here = (_rows_of_step(settings) for settings in (was, now))
        count = cast(int, now["processes"])
        if rows is None or here is None:
            want_same(checkpoint, {"processes": was.get("processes")}, {"processes": count})
        elif rows != here:
            share = f"{rows}, {rows // count} in each process" if rows % count == 0 else f"processes that divide {rows}"
            raise SensibertError(
                f"resume: {checkpoint} has {rows} rows a step, with processes {was['processes']}, and this run {here}, "
                f"with processes {count}: want {share}"
            )
        was, now = ({name: s[name] for name in s if name not in OF_A_STEP} for s in (was, now))
    want_same(checkpoint, was, now)


def _rows_of_step(settings: dict[str, object]) -> int | None:
    """Of all processes together; None if the settings do not tell."""
    numbers = [number for name in OF_A_STEP if isinstance(number := settings.get(name), int)]
    return math.prod(numbers) if len(numbers) == len(OF_A_STEP) else None


def checkpoint_of(arguments: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint of the present step."""
    assert arguments.output_dir is not None  # TrainingArguments fills it in
    name, output = f"checkpoint-{state.global_step}", Path(arguments.output_dir)
    trials = output.glob(f"*/{name}") if state.is_hyper_param_search else ()  # only the Trainer knows their names
    return max(trials, key=lambda folder: folder.stat().st_mtime, default=output / name)


def checkpoints(folder: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>`, newest first, complete or not."""
    by_step = {p.name.rpartition("-")[2]: p for p in Path(folder).glob("checkpoint-*")}
    return [by_step[step] for step in sorted(filter(str.isdecimal, by_step), key=int, reverse=True)]


def sealed(folder: str | Path) -> list[Path]:
    """Checkpoints with a manifest. Writing of the others was interrupted."""
    return [checkpoint for checkpoint in checkpoints(folder) if (checkpoint / MANIFEST).exists()]


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest sound checkpoint; None if none was completed; SensibertError if all completed ones are damaged.

    A warning tells which damaged ones were passed over, and why."""
    damaged: list[SensibertError] = []
    for checkpoint in sealed(folder):
        try:
            check_checkpoint(checkpoint)
        except SensibertError as error:
            damaged.append(error)
        else:
            for passed_over in damaged:
                message = "resume: %s; the run continues from %s, the newest checkpoint that is whole"
                logging.getLogger("sensibert").warning(message, passed_over, checkpoint.name)
            return checkpoint
    if damaged:
        raise SensibertError(f"resume: {damaged[0]}, and no other checkpoint is whole; want --overwrite to begin again")
    return None


def partial_folder(output: str | Path) -> Path:
    """The folder of an unfinished run, with checkpoints and teacher. `output` appears when the run is complete."""
    output = Path(output)
    return output.with_name(output.name + ".partial")


def _is_run_folder(folder: Path) -> bool:
    """Whether a run made the folder. Earlier versions left no marker: their checkpoints tell."""
    return (folder / MARKER).exists() or bool(sealed(folder))


def begin(folder: Path, checkpoint: Path | None) -> None:
    """Delete what the run does not go on from: newer checkpoints, which are damaged, or without a checkpoint all of a
    former run. Called when the inputs of the run have been read. checkpoint: in the folder, or of a shared warm-up."""
    known = checkpoints(folder)
    if checkpoint is None:
        _clear(folder)
    else:
        delete(known[: known.index(checkpoint)] if checkpoint in known else known)


def delete(known: Sequence[Path]) -> None:
    """Delete checkpoints. First all lose their mark: one that is half deleted, by a process that was killed, is no
    damaged one."""
    for checkpoint in known:
        (checkpoint / MANIFEST).unlink(missing_ok=True)
    for checkpoint in known:
        if not checkpoint.is_symlink():
            shutil.rmtree(checkpoint)


def _clear(folder: Path) -> None:
    """Delete what a run has written into its folder, except the marker, which is locked."""
    delete([path for path in checkpoints(folder) if path.is_dir() and not path.is_symlink()])
    for path in (folder / "final", *(folder / name for name in (SNAPSHOT, BRANCHES, LOGS))):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    for name in (EMBEDDINGS, EMBEDDINGS + DIGEST):
        (folder / name).unlink(missing_ok=True)
    (folder / EMBEDDINGS).with_suffix(PART).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete the folder of a run, if it is one, unless others have put files there."""
    if not _is_run_folder(folder):
        return
    with suppress(OSError):
        _clear(folder)
        if {path.name for path in folder.iterdir()} <= {MARKER}:
            shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A context in which no other process runs in the folder; SensibertError if one does."""
    lock = FileLock(folder / MARKER, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SensibertError(f"output: another run is writing to {folder}, want another folder") from None
    except NotImplementedError:  # a file system without locks
        folder.joinpath(MARKER).touch()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def workspace(
    output: str | Path, resume: bool, overwrite: bool, keep: bool = False
) -> Iterator[tuple[Path, Path | None]]:
    """(the run's folder, the checkpoint to resume from). The folder of a run that succeeds is deleted, unless `keep`.

    A failed run leaves only its complete checkpoints, or nothing if it has none. What a former run left stays until
    `begin`; files of others stay. SensibertError, with nothing changed, if the folder holds an unfinished run and
    neither `resume` nor `overwrite` is given, if it holds anything but a run, or if another process runs in it."""
    partial = partial_folder(output)
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        what = "a link" if partial.is_symlink() else "a file"
        raise SensibertError(f"output: {partial}, the folder of the unfinished run, is {what}, want another output")
    if partial.exists() and any(partial.iterdir()) and not _is_run_folder(partial):
        raise SensibertError(
            f"output: {partial} exists and is not the folder of an unfinished run, want another output"
        )
    checkpoint = latest_checkpoint(partial) if resume else None
    if not resume and not overwrite and checkpoints(partial):
        raise SensibertError(f"output: {partial} holds an unfinished run, want --resume or --overwrite")
    made = [folder for folder in (partial, *partial.parents) if not folder.exists()]
    with ExitStack() as stack:
        with writing(partial):
            make_folder(partial)
            stack.enter_context(_locked(partial))
        try:
            yield partial, checkpoint
        except BaseException:
            for begun in (partial / "final", *(c for c in checkpoints(partial) if c not in sealed(partial))):
                shutil.rmtree(begun, ignore_errors=True)
            if not checkpoints(partial):
                remove(partial)
                for folder in made[1:]:
                    if folder.is_dir() and not any(folder.iterdir()):
                        folder.rmdir()
            raise
        if not keep:
            remove(partial)
