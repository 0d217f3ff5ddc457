"""A complete run, in order: fine-tune, trim during training, score, export."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from .branches import Branches, Make, Trained, WarmUp, add_baseline
from .callback import Choose, Shared, TrimCallback
from .core.arguments import checked
from .core.errors import SensibertError
from .core.files import writing
from .core.folder_facts import read_result
from .core.json_text import parse_json
from .core.output_paths import check_apart, check_output, try_move
from .data.embedding_data import EmbeddingData
from .data.encode import Features
from .data.task_data import TaskData
from .deploy.bench import against_untrimmed
from .deploy.costs import measured_facts, missed
from .family import train_family, write_family
from .floor import Search
from .inputs import (
    check_family,
    check_room,
    load_data,
    load_model,
    load_teacher,
    to_device,
)
from .models import layout_of
from .models.embedding import EmbeddingModel
from .models.structure import STRUCTURE
from .report.history import history
from .report.progress import Display, display
from .report.trainer_logs import ShowLogs
from .run_form import Taken, Vocabulary, form_warnings, held_out, size_choice
from .run_inputs import made_from, want_same_inputs
from .run_options import PATHS, RECIPE, RESULT, SNAPSHOT, Options
from .run_output import add_times, result_of, score_warnings, throughput_of, write_model
from .saving.folder import export
from .saving.publish import publish
from .size_choice import HeldOut
from .trainer_arguments import check_run, training_arguments
from .training.checkpoints import EMBEDDINGS, LOGS, begin, partial_folder, remove, sealed, workspace
from .training.distillation import Distillation
from .training.embeddings import saved_embeddings
from .training.evaluations import evaluations_of
from .training.finetune import finetune
from .training.manifest import MANIFEST, check_manifest, write_manifest
from .training.predict import predict
from .training.termination import SaveOnTermination

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
    it, SensibertError, and the checkpoints stay. With `budgets` the content of the family's result.json."""
    started = time.perf_counter()
    check_run(options)
    options = options.resolved()
    if options.resume and not options.overwrite and (result := finished(options)) is not None:
        logging.getLogger("sensibert").warning("resume: %s is of this run, which is finished", options.output)
        return result
    check_place(options)
    with (
        display(options.quiet) as shown,
        workspace(options.output, options.resume, options.overwrite, options.keep_checkpoints) as (folder, checkpoint),
    ):
        try_move(options.output, folder)
        shown("load")
        check_family(options.model)
        vocabulary = Vocabulary.of(options)
        data = load_data(options, vocabulary.tokenizer)
        schedule = options.trim.schedule.for_task(data.task.recovery, data.task.trim_start)
        # A warm-up with a budget of measured costs measures them, for all runs that branch from it.
        measured = next((str(budget) for budget in options.parsed_budgets() if budget.measured), options.trim.budget)
        options = replace(options, trim=replace(options.trim, schedule=schedule, budget=measured))
        shared = Shared() if options.baseline or options.budgets or options.keep else None
        rows = held_out(options, data, vocabulary)
        inputs = Inputs(vocabulary, data, rows, folder, choose, accept_unfinished, shared, shown)
        return _run(inputs, options, Branches(options, folder, checkpoint, started, partial(_train, inputs)))


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


@dataclass(frozen=True)
class Inputs:
    """What all trainings of a run have in common. rows: to choose the form of a file by. folder: of the run."""

    vocabulary: Vocabulary
    data: TaskData
    rows: HeldOut | None
    folder: Path
    choose: Choose | None
    accept_unfinished: bool
    shared: Shared | None  # by runs that branch from one warm-up
    shown: Display


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
        trained = _train(inputs, options, folder, branches.checkpoint, branches.started)
    inputs.shown("write")
    _publish(options, folder, partial(write_model, options=options, trained=trained))
    inputs.shown.end()
    return trained.result


def _train(
    inputs: Inputs,
    options: Options,
    folder: Path,
    checkpoint: Path | None,
    started: float,
    make: Make | None = None,
) -> Trained:
    """One training, with its checkpoints in `folder`. The model of a WarmUp is not scored."""
    vocabulary, data, shared, shown = inputs.vocabulary, inputs.data, inputs.shared, inputs.shown
    set_seed(options.seed)
    loaded = load_model(options.model, data)
    before = vocabulary.trim(loaded)
    check_room(loaded, data)
    original = type(loaded), copy.deepcopy(loaded.config)
    model = EmbeddingModel(loaded, data.pooling) if isinstance(data, EmbeddingData) else loaded
    autocast = options.autocast()

    def scored(model: nn.Module) -> tuple[dict[str, float], Any]:
        assert data.validation is not None
        logits = predict(model, data.validation, data.collator, autocast=autocast, progress=shown)
        metrics = data.compute_metrics(logits)
        shown.scored(metrics, data.main_metric)
        return metrics, logits

    def score(model: nn.Module) -> tuple[dict[str, float] | None, Any]:
        return (None, None) if data.validation is None else scored(model)

    def evaluate(model: nn.Module) -> dict[str, float]:
        callback.memory.spend(callback.phase)
        metrics = score(model)[0]
        callback.memory.spend("evaluate")
        return metrics or {}

    if checkpoint is None or not (checkpoint / STRUCTURE).exists():  # resumed before the cut, which makes a new one
        shutil.rmtree(folder / SNAPSHOT, ignore_errors=True)
    if (folder / SNAPSHOT / MANIFEST).exists():  # earlier versions wrote none
        check_manifest(folder / SNAPSHOT, "teacher of this run")
    teacher = load_teacher(options, data, folder)

    def before_cut(model: nn.Module) -> dict[str, float] | None:
        nonlocal teacher
        if options.teacher == SNAPSHOT:
            assert isinstance(model, PreTrainedModel)  # the one that was loaded above: no embedding model has a teacher
            shutil.rmtree(folder / SNAPSHOT, ignore_errors=True)
            # atomic: a resumed run needs the same teacher
            export(model, folder / SNAPSHOT, vocabulary.tokenizer, accept_unfinished=True)
            write_manifest(folder / SNAPSHOT)
            teacher = load_teacher(options, data, folder)
        if shared is None:
            return score(model)[0]
        shared.metrics = score(model)[0] if shared.metrics is None else shared.metrics
        return shared.metrics

    saves, form = options.save_before_cut, size_choice(options, vocabulary, inputs.rows)
    callback = (make or TrimCallback)(
        options.trim,
        before_cut=before_cut,
        save_before_cut=saves,
        choose=inputs.choose,
        shared=shared,
        progress=shown,
        size_choice=form if inputs.choose is None else None,
    )
    found = made_from(options, data, model, teacher)
    callback.prepare(model, checkpoint)
    if checkpoint is not None:
        want_same_inputs(checkpoint, callback.memory, found)
    callback.memory.inputs = found
    with writing(folder):
        begin(folder, checkpoint)
    callback.memory.restart_clock(started)
    callback.memory.spend("load")
    if isinstance(data, EmbeddingData):
        to_device(model, options.device)
        shown("embed")
        data = _with_original(data, model, inputs.folder / EMBEDDINGS, autocast, shown)
        callback.memory.spend("embed")
    assert data.train is not None  # `load_data` reads the training file
    if form is not None and form.rows is None:
        form.rows = HeldOut("training", (data.train, data.collator))
    termination = SaveOnTermination()
    with termination.listening():
        trainer = finetune(
            model,
            data.train,
            data.collator,
            training_arguments(options, folder, None if data.validation is None else data.main_metric),
            [callback, ShowLogs(shown), termination],
            checkpoint,
            options.packing,
            printed=False,
            eval_dataset=data.validation,
            score=evaluate,
            lr_shape=lambda *steps: options.trim.schedule.lr(not options.trim.trims, callback.left())(*steps),
            teacher=lambda: teacher,
            distil=Distillation(options.distil, options.temperature),
        )
    if make is WarmUp:
        return Trained(loaded, callback)
    if not inputs.accept_unfinished and (excess := callback.excess(model)) is not None:
        raise SensibertError(
            f"finetune: the run ended at step {trainer.state.global_step} of {trainer.state.max_steps} with {excess}; "
            "--resume continues from the last complete checkpoint; export(..., accept_unfinished=True) writes its model"
        )
    evaluations, state, logits = evaluations_of(trainer.state), trainer.state, None
    last = state.best_global_step if options.best else state.global_step
    metrics, full = evaluations.get(last or 0), None
    taken = Taken.of(options, vocabulary, callback.memory)
    if taken.changes:
        full = score(model)[0] if metrics is None else metrics
        data, facts = taken.bring(loaded, options, data, vocabulary)
        before, metrics = before | facts, None
    if metrics is None or shared is not None:  # which may compare rows
        metrics, logits = score(model)
    callback.memory.spend("evaluate")
    callback.warnings += score_warnings(data, metrics, callback.memory.metrics_at_cut)
    callback.warnings += form_warnings(data.main_metric, full, metrics)
    result = result_of(options, data, model, callback, state.global_step, metrics) | before
    result |= {"weights": taken.weights, "metrics_in_full": full, "size": callback.memory.size}
    result["best_step"] = last if options.best else None
    listed = evaluations.items() if options.eval_steps else ()
    result["evaluations"] = [{"step": step, **scores} for step, scores in listed]
    result["throughput"] = throughput_of(callback.memory, trainer)
    moments = history(state.log_history, list(callback.cuts), result, data.main_metric)
    shown("measure")
    result |= against_untrimmed(loaded, *original)
    if options.trim.trims and callback.budget.measured:
        result["measured"] = measured_facts(loaded, callback.budget)
        callback.warnings += missed(result["measured"])
    callback.memory.spend("measure")
    add_times(result, callback.memory)
    return Trained(loaded, callback, result, logits, moments, lambda model: scored(model)[0], taken.tokenizer)


def _with_original(
    data: EmbeddingData, model: nn.Module, file: Path, autocast: torch.dtype | None, shown: Display
) -> EmbeddingData:
    """Adds the embeddings of the model as it is now."""

    def embed(texts: Features) -> np.ndarray:
        if texts is data.train:
            return saved_embeddings(file, model, texts, data.collator, autocast, shown)
        return np.asarray(predict(model, texts, data.collator, autocast=autocast))

    return data.with_labels(embed)


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
