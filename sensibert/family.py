"""A family: a model for each of several budgets, from one warm-up and one analysis."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .branches import Branches, Trained
from .core import cost
from .core.budget import Budget
from .core.budgets import folder_name
from .core.layout import Layout
from .report.plots import write_front
from .run_options import RECIPE, RESULT, Options
from .saving.publish import copy_file
from .training.checkpoints import BRANCHES

MODEL = "model"  # in the folder of a branch: the finished model folder
# Facts of a member's result.json that are those of the family.
COMMON = (
    *("task", "model", "method", "scope", "grid", "seed", "steps", "flops_length", "metrics_at_cut", "cut_step"),
    *("encoder_params_before", "total_params_before", "flops_before", "mb_before"),
)
OWN = (
    *("budget", "weights", "mb_after", "encoder_params_after", "total_params_after", "flops_after", "metrics"),
    "warnings",
)
Write = Callable[[Path, Options, Trained], None]  # a model folder


def member(options: Options, budget: Budget, folder: str = "") -> Options:
    """The options of the run that makes one model. folder: inside the output."""
    output = str(Path(options.output) / folder) if folder else options.output
    trim = replace(options.trim, budget=str(budget))
    return replace(options, budgets=None, keep=None, baseline=False, output=output, trim=trim)


def train_family(branches: Branches, metric: str, layout: Layout, write: Write) -> dict[str, Any]:
    """Train a model for every budget, each into the folder of its branch; return the content of result.json.

    metric: the main one. layout: of the untrimmed model. A resumed run skips the models that are finished.
    SensibertError, before anything is trained, for a budget of parameters or FLOPs that the model cannot meet."""
    options, rows, common = branches.options, [], {}
    for budget in options.parsed_budgets():
        if not budget.measured:  # the others are measured in their runs
            cost.want_reach(layout, budget, options.trim.parsed_grid())
    baseline = branches.baseline() if options.baseline else None
    for budget in options.parsed_budgets():
        name, begun = folder_name(budget), time.perf_counter()
        found = branches.finished(name)
        if found is None:
            own = member(options, budget, name)
            trained = branches.run(name, own)
            result = trained.result
            result["metrics_baseline"] = baseline and baseline["metrics"]
            target = branches.folder / BRANCHES / name / MODEL
            shutil.rmtree(target, ignore_errors=True)  # of a run that was killed here
            write(target, own, trained)
            analysis = result["seconds"].get("analyze", 0.0)
            spent = {"seconds": round(time.perf_counter() - begun - analysis, 3), "analysis_seconds": analysis}
            row = {"folder": name, **{fact: result[fact] for fact in OWN}, **spent}
            found = branches.finish(name, {"row": row, "common": {fact: result[fact] for fact in COMMON}})
        rows.append(found["row"])
        common = found["common"]
    shared = branches.warm_seconds() + sum(row.pop("analysis_seconds") for row in rows)
    seconds = {"warm_up_and_analysis": round(shared, 3)} | ({"baseline": baseline["seconds"]} if baseline else {})
    total = sum(seconds.values()) + sum(row["seconds"] for row in rows)
    return {
        **common,
        "metric": metric,
        "metrics_baseline": baseline and baseline["metrics"],
        "rows": rows,
        "seconds": seconds | {"total": round(total, 3)},
        "output": options.output,
    }


def write_family(folder: Path, run: Path, result: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write the folder of a family. run: the folder of the run, with its branches."""
    folder.mkdir(parents=True)
    for row in result["rows"]:
        source = run / BRANCHES / row["folder"] / MODEL
        shutil.copytree(source, folder / row["folder"], copy_function=lambda old, new: copy_file(Path(old), Path(new)))
    write_front(folder / "report", result)
    for name, content in ((RESULT, result), (RECIPE, settings)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
