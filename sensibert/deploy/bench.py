"""How fast model folders are, side by side, in every runtime that they have a file for."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..core.arguments import at_least_one
from ..core.errors import SensibertError, described
from ..models.modules import positions
from ..saving.folder import load
from .graphs import INT8_FILE, RUNTIMES, Graph, input_names, random_inputs
from .probe_timing import processor

BATCHES, LENGTH, ROUNDS = (1, 32), 128, 20
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
PAIRED = {".xml": ".bin"}  # a graph whose weights are in a second file


class Place(NamedTuple):
    """Where a model is: a folder, and its file for a runtime, or no file for the weights of torch."""

    folder: str
    runtime: str
    file: str | None


class _Entry(NamedTuple):
    """A model in a runtime. size: bytes of its files. seconds: of loading it. longest: tokens of a text; None: any."""

    folder: str
    runtime: str
    size: int
    seconds: float
    model: nn.Module
    inputs: tuple[str, ...]
    vocabulary: int
    longest: int | None


def measure(
    folders: Sequence[str], length: int = LENGTH, threads: int | None = None, rounds: int = ROUNDS
) -> tuple[dict, list[dict]]:
    """(the machine, one row for each model and runtime): size in MB, seconds to load, memory that loading and a pass of
    the largest of BATCHES take, and for each of BATCHES the median, 10th and 90th percentile of the milliseconds of one
    forward pass of rows of `length` tokens.

    Passes of all models take turns, so that a machine whose speed drifts slows all of them. SensibertError for a folder
    without a model."""
    at_least_one(length=length, threads=threads, rounds=rounds)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        places = [place for folder in folders for place in _places(folder)]
        entries = [opened(place, threads) for place in places]
        for entry in entries:
            if length > (entry.longest or length):
                raise SensibertError(
                    f"length is {length}, want at most {entry.longest}, the positions of {entry.folder}"
                )
        times = {rows: _times(entries, rows, length, rounds) for rows in BATCHES}
    finally:
        torch.set_num_threads(before)
    from .peak_memory import peak_mb

    found = []
    for number, (place, entry) in enumerate(zip(places, entries, strict=True)):
        row = {"folder": entry.folder, "runtime": entry.runtime, "mb": entry.size / 1e6, "load_s": entry.seconds}
        row["peak_mb"] = peak_mb(place, length, threads)
        found.append(row | {f"batch_{rows}_ms": _spread(times[rows][number]) for rows in BATCHES})
    return {"processor": processor(), "threads": threads or before, "length": length, "rounds": rounds}, found


def _places(folder: str) -> list[Place]:
    """The models in a folder; SensibertError if there is none."""
    path, found = Path(folder), []
    if any(file for pattern in WEIGHTS for file in path.glob(pattern)):
        found.append(Place(folder, "torch", None))
    graphs = {name: runtime.file for name, runtime in RUNTIMES.items()} | {"onnx int8": INT8_FILE}
    found += [Place(folder, name, str(path / file)) for name, file in graphs.items() if (path / file).is_file()]
    if not found:
        raise SensibertError(f"folder: {folder} holds no model and no graph, want a folder of finetune, trim or export")
    return found


def opened(place: Place, threads: int | None) -> _Entry:
    """The model in its runtime; SensibertError if the runtime is missing or cannot open it."""
    folder, name, begin = place.folder, place.runtime, time.perf_counter()
    if place.file is None:
        model = load(folder)[0].eval()
        seconds = time.perf_counter() - begin
        size = sum(file.stat().st_size for pattern in WEIGHTS for file in Path(folder).glob(pattern))
        names = input_names(model, None)
        return _Entry(folder, name, size, seconds, model, names, model.config.vocab_size, positions(model))
    config, file = AutoConfig.from_pretrained(folder, trust_remote_code=False), Path(place.file)
    longest = getattr(config, "max_position_embeddings", None)
    runtime = RUNTIMES[name.partition(" ")[0]]
    runtime.want_packages(name)
    begin = time.perf_counter()
    try:
        graph: Graph = runtime.open(file, threads)
    except SensibertError:
        raise
    except Exception as error:  # of the runtime
        raise SensibertError(f"{file}: {name} cannot open it ({described(error)})") from error
    seconds = time.perf_counter() - begin
    size = file.stat().st_size
    if file.suffix in PAIRED:
        size += file.with_suffix(PAIRED[file.suffix]).stat().st_size
    shown = "torch.export" if name == "torch" else name
    return _Entry(folder, shown, size, seconds, graph, graph.inputs, config.vocab_size, longest)


def one_pass(entry: _Entry, rows: int, length: int) -> float:
    """Milliseconds of one forward pass."""
    inputs: dict[str, Tensor] = random_inputs(entry.inputs, entry.vocabulary, rows, length)
    inputs["attention_mask"].fill_(1)
    begin = time.perf_counter()
    entry.model(**inputs)
    return 1e3 * (time.perf_counter() - begin)


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
        _Entry(name, "torch", 0, 0, model.eval(), input_names(model, None), model.config.vocab_size, positions(model))
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
def _times(entries: list[_Entry], rows: int, length: int, rounds: int, limit_s: float = math.inf) -> list[list[float]]:
    """Milliseconds of the passes of each entry, without a first one that warms up unless it takes all the time."""

    times: list[list[float]] = [[] for _ in entries]
    end = time.perf_counter() + limit_s
    for turn in range(rounds + 1):
        if turn and time.perf_counter() > end:
            break
        for taken, entry in zip(times, entries, strict=True):
            taken.append(one_pass(entry, rows, length))
    return [taken[1:] or taken for taken in times]


def _spread(milliseconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(milliseconds, n=10, method="inclusive") if len(milliseconds) > 1 else milliseconds * 9
    return {"median": statistics.median(milliseconds), "p10": cuts[0], "p90": cuts[-1]}
