"""What a run leaves: the facts of result.json, and the folder of a model."""

from __future__ import annotations

import json
import time
from pathlib import Path

from torch import nn

from .branches import Trained, add_seconds
from .callback import TrimCallback
from .core.files import write_atomically
from .data.task_data import TaskData
from .data.tasks import PRESETS
from .deploy.export import RUNTIMES_OF_GRAPHS, export_for
from .models.masks import cost_of
from .models.unfinished import unfinished
from .report.plots import write_report
from .run_options import RECIPE, RESULT, Options
from .saving.folder import export
from .training.run_memory import RunMemory
from .training.trainer import TrimTrainer

GRAPH = "export"  # folder in the output with the graph that a budget of latency or size is met by
LEARNED = 0.01  # a main metric that is no more than this above that of a constant answer is worth a warning
FAR_BELOW = 0.05  # and so is one that is more than this below the one at the cut


def nothing_learned(data: TaskData, metrics: dict[str, float] | None) -> str | None:
    """A sentence about a main metric that a constant answer would reach too; None for any other."""
    if metrics is None:
        return None
    name, constant = data.main_metric, data.constant_score()
    if metrics[name] > constant + LEARNED:
        return None
    return (
        f"{name} is {metrics[name]:.4f}, and the same answer for every row would score {constant:.4f}: "
        "a lower learning rate may help, or more steps"
    )


def score_warnings(data: TaskData, metrics: dict | None, at_cut: dict | None) -> list[str]:
    """Sentences about a main metric that shows that nothing was learned, or that far more was lost than usual."""
    if metrics is None:
        return []
    name, text = data.main_metric, nothing_learned(data, metrics)
    found = [] if text is None else [text]
    if at_cut is not None and at_cut[name] - metrics[name] > FAR_BELOW:
        found.append(
            f"{name} fell from {at_cut[name]:.4f} at the cut to {metrics[name]:.4f}: "
            "a larger budget or more steps lose less"
        )
    return found


def result_of(
    options: Options, data: TaskData, model: nn.Module, callback: TrimCallback, steps: int, metrics: dict | None
) -> dict:
    trim, memory = options.trim, callback.memory
    return {
        "task": data.task.name,
        "model": options.model,
        "method": trim.method,
        "budget": str(callback.budget) if trim.trims else None,
        "scope": trim.scope,
        "grid": trim.grid,
        "seed": options.seed,
        "steps": steps,
        "encoder_params_before": memory.params_before[0],
        "encoder_params_after": cost_of(model, "encoder")[0],
        "total_params_before": memory.params_before[1],
        "total_params_after": cost_of(model, "model")[0],
        "flops_before": memory.flops_before,
        "flops_after": cost_of(model, trim.scope, trim.flops_length)[1],
        "flops_length": trim.flops_length,
        "metrics": metrics,
        "metrics_at_cut": memory.metrics_at_cut,
        "metrics_baseline": None,
        "cut_step": min(callback.cuts) if callback.cuts else None,
        "samples": callback.sensitivity.samples if callback.sensitivity is not None else None,
        "warnings": callback.warnings,
        "output": options.output,
    }


def add_times(result: dict, memory: RunMemory) -> None:
    """Add the seconds of the phases so far to the content of result.json."""
    seconds = memory.seconds
    result["seconds"] = {phase: round(s, 3) for phase, s in (*seconds.items(), ("total", sum(seconds.values())))}


def throughput_of(memory: RunMemory, trainer: TrimTrainer) -> dict[str, dict[str, float]]:
    """What training takes before the first cut and after the last one, as far as this run measured it."""
    speed = {"before": memory.tokens_per_s("warm", "train"), "after": memory.tokens_per_s("recover")}
    found = {"tokens_per_s": {name: round(value, 1) for name, value in speed.items() if value}}
    for name in ("ops_per_step", "peak_memory_gb"):
        values: list[float] = getattr(trainer, name, [])
        found[name] = {"before": values[0], "after": values[-1]} if len(values) > 1 else {}
    return {name: values for name, values in found.items() if values}


def _card_facts(options: Options, result: dict) -> dict[str, object]:
    """For the model card: scores, the names of its data, and the base model, if it is of the hub."""
    facts: dict[str, object] = {name: result[name] for name in ("metrics", "metrics_baseline")}
    facts["base_model"] = None if Path(options.model).exists() else options.model
    for part in ("train", "validation"):
        file = getattr(options, f"{part}_file")
        facts[f"{part}_data"] = Path(file).name if file else options.task if options.task in PRESETS else None
    return {name: value for name, value in facts.items() if value}


def write_model(folder: Path, options: Options, trained: Trained) -> None:
    """Write a model, its results and its report into a new folder."""
    tokenizer = trained.tokenizer
    assert tokenizer is not None  # of a training that is finished
    model, callback, result = trained.model, trained.callback, trained.result
    names = ("task", "method", "seed") if unfinished(model) else ("task", "method", "budget", "seed")
    info = {name: result[name] for name in names}
    info["max_length"] = callback.memory.inputs["max_length"]
    info |= _card_facts(options, result)
    begin = time.perf_counter()
    weights = result["weights"]
    export(model, folder, tokenizer, options.layout, info=info, accept_unfinished=True, weights=weights)
    result["mb_after"] = round(sum(file.stat().st_size for file in folder.glob("model*.safetensors")) / 1e6, 3)
    if callback.budget.measured and options.trim.runtime in RUNTIMES_OF_GRAPHS:
        score = None if result["metrics"] is None else trained.score
        result["graph"] = export_for(options.trim.runtime, model, str(folder / GRAPH), tokenizer, score, weights)
    add_seconds(result, "write", time.perf_counter() - begin)
    text = json.dumps(result, indent=2)
    plan = callback.whole_plan(model)
    write_report(folder / "report", result, callback.sensitivity, plan, trained.moments)
    write_atomically(folder / RESULT, lambda path: Path(path).write_text(text + "\n"))
    (folder / RECIPE).write_text(json.dumps(options.settings(), indent=2) + "\n")
    if callback.sensitivity is not None:
        callback.sensitivity.save(folder / "sensitivity.safetensors")
    plan.save(folder / "plan.safetensors")
