"""Measured costs: how long a forward pass takes in a runtime, or how large its weights file is, by what layers keep.

Probes are models of the same architecture with random weights, in which every layer keeps the same number of heads or
of neurons. Passes of all probes take turns, so that a machine whose speed drifts slows all of them.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.arguments import checked, one_of, show
from ..core.artifacts import Plan, UnitPlan
from ..core.budget import Budget
from ..core.cost import counts_of, limit, spent
from ..core.cost_table import MEASURED, RUNTIMES, WEIGHTS, CostTable
from ..core.errors import SensibertError
from ..core.layout import Layout
from ..models import layout_of
from ..models.modules import positions
from ..models.reloadable import stock_class, stock_config
from ..models.unfinished import reached
from ..models.weight_bits import with_weights
from ..saving.folder import new_folder
from ..trimming.trim import trim
from . import probe_timing
from .export import RUNTIMES_OF_GRAPHS, plain
from .graphs import INT8_FILE, input_names, quantize, random_inputs, trace
from .graphs import RUNTIMES as GRAPHS
from .probe_timing import PROBES, clock_of, median_times, processor, table_from
from .timed_models import times_in_torch

KINDS = {"heads": "head", "ffn": "ffn"}  # column of a table -> kind of a site
SHARES = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of the units of a layer, in the probes of latency
VOCABULARY = 1024  # of the probes of latency: rows that are not read cost nothing
CLOSE = 0.03  # a measured cost this close to a predicted one confirms it
PROMISED = {"ms": 0.05, "MB": 0.0}  # a result costs no more than this above its budget, or the run says so
TRIES = 3  # tables of costs that are corrected by a measurement, before the last plan is taken


@dataclass(frozen=True)
class Target:
    """What is measured. kind: `latency` or `size`. batch, length: rows and tokens of a forward pass, and threads: of a
    CPU, for latency. weights, vocabulary: of a file, as in CostTable. SensibertError for a value that cannot be, or a
    runtime that is not installed."""

    kind: str
    runtime: str = "torch"
    batch: int = 1
    length: int = 128
    threads: int = 1
    weights: str = "fp32"
    vocabulary: int = 0

    def __post_init__(self) -> None:
        for name, known in (("kind", MEASURED), ("runtime", RUNTIMES), ("weights", WEIGHTS)):
            if (value := getattr(self, name)) not in known:
                raise SensibertError(f"{name} is {show(value)}, {one_of(value, known)}")
        for name in ("batch", "length", "threads"):
            if getattr(self, name) < 1:
                raise SensibertError(f"{name} is {getattr(self, name)}, want at least 1")
        if self.runtime == "cuda" and (self.kind == "size" or not torch.cuda.is_available()):
            why = "has no file of its own" if self.kind == "size" else "has no GPU here"
            raise SensibertError(f"runtime is 'cuda', which {why}; want {', '.join(RUNTIMES[:-1])}")
        if self.kind == "size" and self.weights == "bf16" and self.runtime != "torch":
            raise SensibertError(f"weights is 'bf16', which a graph for {self.runtime} has not; want fp32 or fp16")
        if self.runtime not in ("torch", "cuda"):
            GRAPHS[self.graph].want_packages(self.runtime)

    @classmethod
    def of(cls, table: CostTable) -> Target | None:
        """What a table holds; None if it cannot be measured here: on another device, or without its runtime."""
        try:
            target = cls(
                *(table.kind, table.runtime, table.batch, table.length, table.threads, table.weights, table.vocabulary)
            )
        except SensibertError:
            return None
        return target if target.device == table.device else None

    @property
    def graph(self) -> str:
        """The name of the graph's format."""
        return self.runtime.partition("-")[0]

    @property
    def device(self) -> str:
        """The device that a measurement here is of."""
        if self.kind == "size":
            return ""
        return torch.cuda.get_device_name() if self.runtime == "cuda" else processor()


@checked
def measure_costs(model: PreTrainedModel, target: Target) -> CostTable:
    """The costs of a model's layers by the heads and neurons they keep; the model, trimmed or not, is unchanged.

    Seconds for torch and for sizes; about a minute for a runtime of graphs, since every probe is exported."""
    target, weights = replace(target, weights="fp32"), target.weights if target.kind == "size" else "fp32"
    probes = _probes(model, target)
    costs = costs_of(probes.models, target)
    facts = probes.facts | {"device": target.device}
    table = CostTable.from_dict(table_from(facts, probes.levels, probes.sites, costs))
    if target.kind == "size":
        counts, whole = counts_of(layout_of(model)), costs[0]
        if counts != counts_of(layout_of(probes.models[0])):  # trimmed before: a fraction is one of what is there
            whole = spent(layout_of(model), counts, Budget(1.0, "size", True, table=table))
        table = replace(table, whole=round(whole))
    return table if weights == "fp32" else size_in_form(table, probes.models[0], weights)


def size_in_form(table: CostTable, model: nn.Module, weights: str, vocabulary: int | None = None) -> CostTable:
    """Sizes of the file in another form, computed from a table with all rows of the embeddings, in fp32 or in the same
    precision. `settle` corrects them for the model that is chosen.

    model: untrimmed. vocabulary: rows that its embeddings keep; None: all."""
    rows, width = model.get_input_embeddings().weight.shape  # type: ignore[operator]
    layout, removed, others = layout_of(model), 0 if vocabulary is None else (rows - vocabulary) * width, rows * width
    if table.runtime == "torch":
        others = layout.total_params - sum(site.units * site.params for site in layout.sites)
    elif table.runtime.endswith("int8"):
        weights = "fp32"  # the graph has 8 bits, whatever the folder has
    return table.in_form(weights, removed, others, vocabulary or 0)


@checked
def write_probes(model: PreTrainedModel, folder: str | Path, target: Target) -> None:
    """Write graphs and a script that times them on a device with nothing but the runtime, to a new folder."""
    if target.runtime not in RUNTIMES_OF_GRAPHS or target.kind != "latency":
        raise SensibertError(f"runtime is {target.runtime!r}, {one_of(target.runtime, RUNTIMES_OF_GRAPHS)}")
    probes = _probes(model, target)
    with new_folder(Path(folder).resolve(), False) as made:
        files = [_write(each, made / str(number), target) for number, each in enumerate(probes.models)]
        content = {
            "facts": probes.facts,
            "levels": probes.levels,
            "sites": probes.sites,
            "files": [file.relative_to(made).as_posix() for file in files],
            "inputs": input_names(probes.models[0], None),
            "vocabulary": probes.models[0].config.vocab_size,
        }
        (made / PROBES).write_text(json.dumps(content, indent=1) + "\n")
        shutil.copy(probe_timing.__file__, made)


class _Probes(NamedTuple):
    """Models whose costs make a table, and what `table_from` needs beside these."""

    models: list[PreTrainedModel]
    facts: dict[str, Any]
    levels: dict[str, list[int]]
    sites: dict[str, int]


def _probes(model: PreTrainedModel, target: Target) -> _Probes:
    base = _random_model(model, target)
    layout = layout_of(base)
    levels = {name: _levels(layout, kind, target) for name, kind in KINDS.items()}
    counts = [{site.name: site.units for site in layout.sites}]
    for name, kind in KINDS.items():
        counts += [_even(layout, kind, count) for count in levels[name][:-1]]
    facts = {"kind": target.kind, "runtime": target.runtime, "family": layout.family, "hidden": layout.hidden}
    facts |= {"threads": target.threads, "batch": target.batch, "length": target.length}
    sites = {name: sum(site.kind == kind for site in layout.sites) for name, kind in KINDS.items()}
    return _Probes([_trimmed(base, layout, each) for each in counts], facts, levels, sites)


def costs_of(models: Sequence[PreTrainedModel], target: Target) -> list[float]:
    """Microseconds of a forward pass of each model, the median of passes that take turns, or bytes of its file."""
    if target.kind == "latency":
        _want_positions(models, target)
    with tempfile.TemporaryDirectory() as folder:
        if target.kind == "latency" and target.runtime == "torch":
            return times_in_torch(models, Path(folder), target.batch, target.length, target.threads)
        places = [Path(folder) / str(number) for number in range(len(models))]
        if target.kind == "size":
            return [float(_write(model, place, target).stat().st_size) for model, place in zip(models, places)]
        ready = [_opened(model, place, target) for model, place in zip(models, places, strict=True)]
        return median_times(ready, time.perf_counter if target.runtime == "cuda" else clock_of(target.threads))


def _want_positions(models: Sequence[PreTrainedModel], target: Target) -> None:
    for model in models:
        if (longest := positions(model)) is not None and target.length > longest:
            raise SensibertError(
                f"latency_shape: {target.length} tokens, want at most {longest}, the model's positions"
            )


@checked
def settle(model: PreTrainedModel, plan: Plan, choose: Callable[[Budget], Plan], target: Target) -> Plan:
    """Measure what a plan costs, and correct the table and choose again until both agree to CLOSE; a file also until it
    is no larger than the budget.

    model: its architecture counts. The budget of the plan that is returned has the corrected table."""
    layout = plan.layout
    base = _random_model(model, target)
    for tries in range(TRIES + 1):
        table, counts = plan.budget.table, {name: int(keep.sum()) for name, keep in plan.keep.items()}
        assert table is not None  # of a budget of measured costs
        predicted = spent(layout, counts, plan.budget)
        measured = _cost_of(_trimmed(base, layout, counts), base, plan.budget, target)[1]
        fits = target.kind == "latency" or measured <= limit(layout, plan.budget)
        if (fits and abs(measured - predicted) <= CLOSE * predicted) or tries == TRIES:
            break
        try:
            plan = choose(plan.budget.with_table(table.corrected(predicted, measured)))
        except SensibertError:  # the corrected table has no plan within the budget: `missed` tells by how much
            break
    return plan


def _cost_of(model: PreTrainedModel, whole: PreTrainedModel, budget: Budget, target: Target) -> tuple[float, float]:
    """(cost of the untrimmed model, cost of a trimmed one). Times are measured together: a machine that is slower or
    faster than when the table was made changes both by a factor, which is taken out."""
    layout = layout_of(whole)
    known = float(spent(layout, counts_of(layout), budget))
    if target.kind == "size":
        return known, costs_of([model], target)[0]
    before, after = costs_of([whole, model], target)
    return known, after * known / before


def measured_facts(model: PreTrainedModel, budget: Budget) -> dict[str, object]:
    """What a trimmed model costs, and an untrimmed one beside it, in the unit of a budget of measured costs.

    Keys: `of`, what is measured, in words; `unit`, `budget`, `predicted` by the table, and, if they can be measured on
    this device, `before` and `after`."""
    table, layout = budget.table, layout_of(model)
    assert table is not None  # of a budget of measured costs
    whole = _random_model(model, Target(table.kind))
    costs = {"budget": float(limit(layout_of(whole), budget)), "predicted": float(reached(model, budget))}
    if (target := Target.of(table)) is not None:
        alike = _trimmed(whole, layout_of(whole), counts_of(layout))
        costs["before"], costs["after"] = _cost_of(alike, whole, budget, target)
        costs["before"] = float(table.whole or costs["before"])
    shown = {name: budget.in_unit(cost) for name, cost in costs.items()}
    return {"of": table.described(), "unit": MEASURED[table.kind], **shown}


def missed(facts: Mapping[str, Any]) -> list[str]:
    """Sentences about a budget that is not met by a measurement, or that was not measured here. facts: as above."""
    unit, budget, after = facts["unit"], facts["budget"], facts.get("after")
    if after is None:
        return [
            f"the budget of {budget:.4g} {unit} is met by the table of costs, and cannot be measured on this device"
        ]
    if after > budget * (1 + PROMISED[unit]):
        return [f"{facts['of']} takes {after:.4g} {unit}, more than the budget of {budget:.4g} {unit}"]
    return []


def _levels(layout: Layout, kind: str, target: Target) -> list[int]:
    """Units that the probes keep, all of them last."""
    sites = [site for site in layout.sites if site.kind == kind]
    most, least = max((site.units for site in sites), default=0), max((site.minimum for site in sites), default=0)
    shares = (0,) if target.kind == "size" else SHARES
    few = (1,) if kind == "head" and target.kind == "latency" else ()
    return [*sorted({max(least, count) for count in (*(round(most * share) for share in shares), *few)} - {most}), most]


def _even(layout: Layout, kind: str, count: int) -> dict[str, int]:
    """Site -> units: `count` in sites of one kind, all in the others."""
    return {site.name: min(count, site.units) if site.kind == kind else site.units for site in layout.sites}


def _random_model(model: PreTrainedModel, target: Target) -> PreTrainedModel:
    """A model with random weights, of the architecture before any trimming; with a small vocabulary for latency."""
    config = copy.deepcopy(stock_config(model.config))
    if target.kind == "latency" and model.get_output_embeddings() is None:
        config.vocab_size = min(config.vocab_size, VOCABULARY)
        config.pad_token_id = 0
    elif target.vocabulary:
        config.vocab_size = target.vocabulary
        config.pad_token_id = min(config.pad_token_id or 0, target.vocabulary - 1)
    return stock_class(model)(config).eval()


def _trimmed(base: PreTrainedModel, layout: Layout, counts: dict[str, int]) -> PreTrainedModel:
    """A copy with the first units of every site."""
    keep = {site.name: torch.arange(site.units) < counts[site.name] for site in layout_of(base).sites}
    made = copy.deepcopy(base)
    if any(counts[site.name] < site.units for site in layout.sites):
        trim(made, UnitPlan(layout_of(base), keep, Budget(1.0, "params", True), "probe"))
    return made.eval()


def _write(model: PreTrainedModel, folder: Path, target: Target) -> Path:
    """The weights file of a model for a runtime."""
    folder.mkdir()
    if target.runtime == "torch":
        with_weights(model, target.weights).save_pretrained(folder)
        return folder / "model.safetensors"
    runtime = GRAPHS[target.graph]
    file = folder / "graph" / Path(runtime.file).name
    file.parent.mkdir()
    halved = target.weights == "fp16" and not target.runtime.endswith("int8")
    runtime.write(trace(plain(model), None, runtime)._replace(half_tables=halved), file)
    if target.runtime.endswith("int8"):
        quantized = file.with_name(Path(INT8_FILE).name)
        quantize(file, quantized)
        return quantized
    return file if target.kind == "latency" or target.graph != "openvino" else file.with_suffix(".bin")


def _opened(model: PreTrainedModel, folder: Path, target: Target) -> Callable[[], object]:
    """One forward pass, on a GPU or of a graph."""
    device = "cuda" if target.runtime == "cuda" else "cpu"
    module: nn.Module
    if target.runtime == "cuda":
        module, names = nn.Module.to(model, device), input_names(model, None)
    else:
        graph = module = GRAPHS[target.graph].open(_write(model, folder, target), target.threads)
        names = graph.inputs
    inputs = random_inputs(names, min(model.config.vocab_size, VOCABULARY), target.batch, target.length)
    inputs["attention_mask"].fill_(1)
    inputs = {name: value.to(device) for name, value in inputs.items()}

    @torch.inference_mode()
    def run() -> None:
        module(**inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    return run
