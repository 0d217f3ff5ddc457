"""How fast model folders are, side by side, in every runtime that they have a file for."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..core.arguments import at_least_one
from ..core.errors import SensibertError
from ..models.modules import positions
from .graphs import input_names
from .opened import BATCHES, Entry, one_pass, opened, places_in
from .peak_memory import peak_mb
from .probe_timing import processor

LENGTH, ROUNDS = 128, 20


def measure(
    folders: Sequence[str], length: int = LENGTH, threads: int | None = None, rounds: int = ROUNDS
) -> tuple[dict, list[dict]]:
    """(the machine, one row for each model and runtime): size in MB, seconds to load, memory that loading and a pass of
    the largest of BATCHES take, and for each of BATCHES the median, 10th and 90th percentile of the milliseconds of one
    forward pass of rows of `length` tokens.

    Models take turns, so that a machine whose speed drifts slows all of them, with two passes each: the second one is
    measured, as in a latency budget, since the first wakes threads and fills the caches. SensibertError for a folder
    without a model."""
    at_least_one(length=length, threads=threads, rounds=rounds)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        places = [place for folder in folders for place in places_in(folder)]
        entries = [opened(place, threads) for place in places]
        for entry in entries:
            if length > (entry.longest or length):
                raise SensibertError(
                    f"length is {length}, want at most {entry.longest}, the positions of {entry.folder}"
                )
        times = {rows: _times(entries, rows, length, rounds) for rows in BATCHES}
    finally:
        torch.set_num_threads(before)
    found = []
    for number, (place, entry) in enumerate(zip(places, entries, strict=True)):
        row = {"folder": entry.folder, "runtime": entry.runtime, "mb": entry.size / 1e6, "load_s": entry.seconds}
        row["peak_mb"] = peak_mb(place, length, threads)
        found.append(row | {f"batch_{rows}_ms": _spread(times[rows][number]) for rows in BATCHES})
    return {"processor": processor(), "threads": threads or before, "length": length, "rounds": rounds}, found


def against_untrimmed(model: PreTrainedModel, kind: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, Any]:
    """{"latency": `side_by_side` of the untrimmed and the trimmed model, "mb_before": megabytes of the untrimmed one}.

    kind, config: of the untrimmed model. Both are made anew, with random weights: a Trainer leaves its mixed precision
    in the model that it trained."""
    untrimmed, trimmed = kind(config), type(model)(copy.deepcopy(model.config))
    size = sum(tensor.numel() * tensor.element_size() for tensor in untrimmed.parameters())
    return {"latency": side_by_side({"before": untrimmed, "after": trimmed}), "mb_before": round(size / 1e6, 3)}


def side_by_side(models: Mapping[str, PreTrainedModel], limit_s: float = 3) -> dict[str, Any]:
    """Median milliseconds of one forward pass of models in memory, in turn, as `measure` does; on the CPU.

    Returns {"threads", "length", and for each of BATCHES "batch_<rows>_ms": {name: milliseconds}}. limit_s: seconds a
    batch size after which no further round begins."""
    entries = [
        Entry(name, "torch", 0, 0, model.eval(), input_names(model, None), model.config.vocab_size, positions(model))
        for name, model in models.items()
    ]
    length = min(LENGTH, *(entry.longest or LENGTH for entry in entries))
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "length": length}
    for rows in BATCHES:
        times = _times(entries, rows, length, ROUNDS, limit_s)
        medians = [round(statistics.median(taken), 3) for taken in times]
        found[f"batch_{rows}_ms"] = dict(zip(models, medians, strict=True))
    return found


@torch.inference_mode()
def _times(entries: list[Entry], rows: int, length: int, rounds: int, limit_s: float = math.inf) -> list[list[float]]:
    """Milliseconds of the passes of each entry."""
    times: list[list[float]] = [[] for _ in entries]
    end = time.perf_counter() + limit_s
    for turn in range(rounds):
        if turn and time.perf_counter() > end:
            break
        for taken, entry in zip(times, entries, strict=True):
            taken.append(one_pass(entry, rows, length))
    return times


def _spread(milliseconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(milliseconds, n=10, method="inclusive") if len(milliseconds) > 1 else milliseconds * 9
    return {"median": statistics.median(milliseconds), "p10": cuts[0], "p90": cuts[-1]}
