"""The models in a folder, each opened in its runtime, and one forward pass of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from transformers import AutoConfig

from ..core.errors import SensibertError, described
from ..core.folder_facts import read_family
from ..models.modules import positions
from ..saving.folder import load
from .graphs import INT8_FILE, RUNTIMES, Graph, input_names, random_inputs

BATCHES = (1, 32)
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
PAIRED = {".xml": ".bin"}  # a graph whose weights are in a second file
IDLE_S = 0.01  # before the passes of a model: the threads of the runtime that ran last spin on for a while


class Place(NamedTuple):
    """Where a model is: a folder, and its file for a runtime, or no file for the weights of torch."""

    folder: str
    runtime: str
    file: str | None


class Entry(NamedTuple):
    """A model in a runtime. size: bytes of its files. seconds: of loading it. longest: tokens of a text; None: any."""

    folder: str
    runtime: str
    size: int
    seconds: float
    model: nn.Module
    inputs: tuple[str, ...]
    vocabulary: int
    longest: int | None


def places_in(folder: str) -> list[Place]:
    """The models in a folder, or in those of a family; SensibertError if there is none."""
    path, found = Path(folder), []
    if (family := read_family(path / "result.json")) is not None:
        return [place for row in family["rows"] for place in places_in(str(path / row["folder"]))]
    if any(file for pattern in WEIGHTS for file in path.glob(pattern)):
        found.append(Place(folder, "torch", None))
    graphs = {name: runtime.file for name, runtime in RUNTIMES.items()} | {"onnx int8": INT8_FILE}
    found += [Place(folder, name, str(path / file)) for name, file in graphs.items() if (path / file).is_file()]
    if not found:
        raise SensibertError(f"folder: {folder} holds no model and no graph, want a folder of finetune, trim or export")
    return found


def opened(place: Place, threads: int | None) -> Entry:
    """The model in its runtime; SensibertError if the runtime is missing or cannot open it."""
    folder, name, begin = place.folder, place.runtime, time.perf_counter()
    if place.file is None:
        model = load(folder)[0].eval()
        seconds = time.perf_counter() - begin
        size = sum(file.stat().st_size for pattern in WEIGHTS for file in Path(folder).glob(pattern))
        names = input_names(model, None)
        return Entry(folder, name, size, seconds, model, names, model.config.vocab_size, positions(model))
    config, file = AutoConfig.from_pretrained(folder, trust_remote_code=False), Path(place.file)
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
    longest = graph.longest or getattr(config, "max_position_embeddings", None)
    shown = "torch.export" if name == "torch" else name
    return Entry(folder, shown, size, seconds, graph, graph.inputs, config.vocab_size, longest)


def one_pass(entry: Entry, rows: int, length: int) -> float:
    """Milliseconds of a forward pass that follows another one, as in a latency budget."""
    inputs: dict[str, Tensor] = random_inputs(entry.inputs, entry.vocabulary, rows, length)
    inputs["attention_mask"].fill_(1)
    time.sleep(IDLE_S)
    entry.model(**inputs)  # wakes its threads, and reads its weights into the caches
    begin = time.perf_counter()
    entry.model(**inputs)
    return 1e3 * (time.perf_counter() - begin)
