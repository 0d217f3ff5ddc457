"""A complete run, in order: fine-tune, trim during training, score, export."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from .branches import Branches, add_baseline
from .callback import Choose, Shared
from .core.arguments import checked
from .core.device import device_of
from .core.files import writing
from .core.folder_facts import read_result
from .core.json_text import parse_json
from .core.output_paths import check_apart, check_output, try_move
from .family import train_family, write_family
from .floor import Search
from .inputs import check_family, load_data, load_model
from .models import layout_of
from .report.progress import Silent, display
from .run_form import Vocabulary, held_out
from .run_options import PATHS, RECIPE, RESULT, Options
from .run_output import write_model
from .run_training import Inputs, train
from .saving.publish import publish
from .trainer_arguments import check_run
from .training.checkpoints import LOGS, partial_folder, remove, sealed, workspace
from .training.started import Started

OF_PLACE = ("output", "keep_checkpoints")  # settings that change nothing in the output
# Entries of a result.json that a summary shows.
NOTED = {
    *("task", "method", "budget", "scope", "metrics", "metrics_at_cut", "warnings", "flops_length", "output"),
    *(f"{size}_{when}" for size in ("encoder_params", "total_params", "flops") for when in ("before", "after")),
}


def check_place(options: Options) -> None:
    """SensibertError if the output is taken, or if replacing it would delete an input of the run."""
    check_output(options.output, options.overwrite)
    inputs = {name: getattr(options, name) for name in PATHS if name != "output"}
    check_apart(options.output, **inputs)
    check_apart(partial_folder(options.output), **inputs)


@checked
def finetune_and_trim(options: Options, choose: Choose | None = None, accept_unfinished: bool = False) -> dict:
    """Fine-tune a model on a task, trim it to a budget meanwhile, write the folder; return the content of result.json.

    choose: (model, micro-batches, budget) -> Plan, in place of analyze and allocate. accept_unfinished: also write a
    model that is larger than the budget, because the training ended before the last cut or `choose` kept more; without
    it, SensibertError, and the checkpoints stay. With `budgets` the content of the family's result.json.

    In several processes (torchrun, accelerate launch) all have to call it, and all return the same. They share each
    batch; the first one analyzes, scores and writes."""
    started = time.perf_counter()
    check_run(options)
    processes = Started.connect(device_of(options.device))
    with processes.told_once():
        return _finetune_and_trim(options.resolved(), processes, started, choose, accept_unfinished)


def _finetune_and_trim(
    options: Options, processes: Started, started: float, choose: Choose | None, accept_unfinished: bool
) -> dict:
    if options.resume and not options.overwrite:
        if (result := processes.by_first(partial(finished, options))) is not None:
            if processes.first:
                logging.getLogger("sensibert").warning("resume: %s is of this run, which is finished", options.output)
            return result
    processes.by_first(partial(check_place, options))
    place = workspace(options.output, options.resume, options.overwrite, options.keep_checkpoints)
    with display(options.quiet) if processes.first else Silent() as shown, ExitStack() as stack:
        folder, checkpoint = processes.by_first(lambda: stack.enter_context(place))
        processes.by_first(lambda: try_move(options.output, folder))
        shown("load")
        check_family(options.model)
        vocabulary = Vocabulary.of(options)
        data = load_data(options, vocabulary.tokenizer)
        schedule = options.trim.schedule.for_task(data.task.recovery, data.task.trim_start)
        options = replace(options, trim=replace(options.trim, schedule=schedule, budget=_first_budget(options)))
        shared = Shared() if options.baseline or options.budgets or options.keep else None
        rows = held_out(options, data, vocabulary)
        inputs = Inputs(vocabulary, data, rows, folder, choose, accept_unfinished, shared, shown, processes)
        return _run(inputs, options, Branches(options, folder, checkpoint, started, partial(train, inputs)))


def _first_budget(options: Options) -> str:
    """Of the warm-up. With a measured budget it measures costs for all runs that branch from it, and refuses one that
    cannot be reached: so the smallest of those that are like the first."""
    measured = [budget for budget in options.parsed_budgets() if budget.measured]
    if not measured:
        return options.trim.budget
    kind = measured[0].kind, measured[0].relative
    return str(min((each for each in measured if (each.kind, each.relative) == kind), key=lambda each: each.value))


def finished(options: Options) -> dict | None:
    """The content of result.json if the output is of a finished run with these settings and nothing is left of an
    unfinished one; else None. options: resolved."""
    output, known = Path(options.output), options.settings()
    if sealed(partial_folder(output)) or not (output / RESULT).is_file() or not (output / RECIPE).is_file():
        return None
    try:
        was, result = (
            Options.from_settings(parse_json((output / RECIPE).read_text())).settings(),
            read_result(output / RESULT),
        )
    except (OSError, ValueError):  # `check_place` says that the output is taken
        return None
    same = all(value is None or was[name] == value for name, value in known.items() if name not in OF_PLACE)
    if not same or not NOTED <= result.keys():
        return None
    remove(partial_folder(output))  # what is left where its deletion was interrupted
    return result


def _run(inputs: Inputs, options: Options, branches: Branches) -> dict:
    """Train all models that the options ask for, and write the output; return the content of result.json."""
    folder, data = branches.folder, inputs.data
    if options.budgets:
        layout = layout_of(load_model(options.model, data))
        result = train_family(branches, data.main_metric, layout, write_model)
        inputs.shown("write")
        _publish(options, folder, partial(write_family, run=folder, result=result, settings=options.settings()))
        inputs.shown.end()
        return result
    if options.keep:
        trained = Search(branches, data, layout_of(load_model(options.model, data))).find()
    elif options.baseline:
        baseline = branches.baseline()
        trained = branches.run("trimmed", options)
        add_baseline(trained.result, baseline)
    else:
        trained = train(inputs, options, folder, branches.checkpoint, branches.started)
    inputs.shown("write")
    write = partial(write_model, options=options, trained=trained)
    inputs.processes.by_first(lambda: _publish(options, folder, write))
    inputs.shown.end()
    return inputs.processes.by_first(lambda: trained.result)


def _publish(options: Options, folder: Path, write: Callable[[Path], None]) -> None:
    """Write the output folder next to the checkpoints, then move it to its final path."""
    output = Path(options.output)
    final = folder / "final" / output.resolve().name  # the model card takes its title from the folder
    with writing(output, "; --resume continues from the last complete checkpoint"):
        shutil.rmtree(final.parent, ignore_errors=True)  # of a run that was killed here
        write(final)
        if (folder / LOGS).exists():
            os.replace(folder / LOGS, final / LOGS)
        publish(final, output, options.overwrite, "want --resume --overwrite to write this run there")
        shutil.rmtree(final.parent, ignore_errors=True)
