"""A complete run, in order: fine-tune, trim during training, score, export."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from .callback import Choose, TrimCallback
from .core.arguments import checked
from .core.errors import SensibertError
from .core.files import write_atomically, writing
from .data.embedding_data import EmbeddingData
from .data.encode import Features
from .data.task_data import TaskData
from .data.tasks import PRESETS
from .deploy.bench import against_untrimmed
from .inputs import (
    check_family,
    check_room,
    load_data,
    load_model,
    load_teacher,
    load_tokenizer,
    to_device,
)
from .models.embedding import EmbeddingModel
from .models.masks import cost_of
from .models.modules import weights_digest
from .models.structure import STRUCTURE
from .models.unfinished import unfinished
from .report.plots import write_report
from .report.progress import Display, display
from .report.trainer_logs import ShowLogs
from .run_options import SNAPSHOT, Options
from .saving.folder import export
from .saving.output_paths import check_apart, check_output
from .saving.publish import publish
from .trainer_arguments import check_run, training_arguments
from .training.checkpoints import EMBEDDINGS, LOGS, begin, partial_folder, want_same, workspace
from .training.distillation import Distillation
from .training.embeddings import saved_embeddings
from .training.evaluations import evaluations_of
from .training.finetune import finetune
from .training.predict import predict
from .training.run_memory import RunMemory
from .training.trainer import TrimTrainer

RESULT, RECIPE = "result.json", "recipe.json"
# Entries of a model's config that change nothing of what it computes, or are compared elsewhere.
NOT_COMPARED = (
    *("_name_or_path", "transformers_version", "architectures", "dtype", "id2label", "label2id", "auto_map"),
    "sensibert",
)
LEARNED = 0.01  # a main metric that is no more than this above that of a constant answer is worth a warning
FAR_BELOW = 0.05  # and so is one that is more than this below the one at the cut


def check_place(options: Options) -> None:
    """SensibertError if the output is taken, or if replacing it would delete an input of the run."""
    check_output(options.output, options.overwrite)
    inputs = {name: getattr(options, name) for name in ("model", "train_file", "validation_file", "teacher")}
    check_apart(options.output, **inputs)
    check_apart(partial_folder(options.output), **inputs)


@checked
def finetune_and_trim(options: Options, choose: Choose | None = None, accept_unfinished: bool = False) -> dict:
    """Fine-tune a model on a task, trim it to a budget meanwhile, write the folder; return the content of result.json.

    choose: (model, micro-batches, budget) -> Plan, in place of analyze and allocate. accept_unfinished: also write a
    model that is larger than the budget, because the training ended before the last cut or `choose` kept more; without
    it, SensibertError, and the checkpoints stay."""
    started = time.perf_counter()
    check_run(options)
    options = options.resolved()
    check_place(options)
    with (
        display(options.quiet) as shown,
        workspace(options.output, options.resume, options.overwrite, options.keep_checkpoints) as (folder, checkpoint),
    ):
        return _run(options, folder, checkpoint, started, choose, accept_unfinished, shown)


def _run(
    options: Options,
    folder: Path,
    checkpoint: Path | None,
    started: float,
    choose: Choose | None,
    accept_unfinished: bool,
    shown: Display,
) -> dict:
    shown("load")
    check_family(options.model)
    tokenizer = load_tokenizer(options.model)
    data = load_data(options, tokenizer)
    schedule = options.trim.schedule.for_task(data.task.recovery, data.task.trim_start)
    options = replace(options, trim=replace(options.trim, schedule=schedule))
    set_seed(options.seed)
    loaded = load_model(options.model, data)
    check_room(loaded, data)
    original = type(loaded), copy.deepcopy(loaded.config)
    model = EmbeddingModel(loaded, data.pooling) if isinstance(data, EmbeddingData) else loaded
    autocast = options.autocast()

    def score(model: nn.Module) -> dict[str, float] | None:
        if data.validation is None:
            return None
        logits = predict(model, data.validation, data.collator, autocast=autocast, progress=shown)
        metrics = data.compute_metrics(logits)
        shown.scored(metrics, data.main_metric)
        return metrics

    def evaluate(model: nn.Module) -> dict[str, float]:
        callback.memory.spend(callback.phase)
        metrics = score(model)
        callback.memory.spend("evaluate")
        return metrics or {}

    if checkpoint is None or not (checkpoint / STRUCTURE).exists():  # resumed before the cut, which makes a new one
        shutil.rmtree(folder / SNAPSHOT, ignore_errors=True)
    teacher = load_teacher(options, data, folder)

    def before_cut(model: nn.Module) -> dict[str, float] | None:
        nonlocal teacher
        if options.teacher == SNAPSHOT:
            assert isinstance(model, PreTrainedModel)  # the one that was loaded above: no embedding model has a teacher
            shutil.rmtree(folder / SNAPSHOT, ignore_errors=True)
            # atomic: a resumed run needs the same teacher
            export(model, folder / SNAPSHOT, tokenizer, accept_unfinished=True)
            teacher = load_teacher(options, data, folder)
        return score(model)

    callback = TrimCallback(
        options.trim,
        before_cut=before_cut,
        save_before_cut=options.save_before_cut,
        choose=choose,
        progress=shown,
    )
    made_from = _made_from(options, data, model, teacher)
    callback.prepare(model, checkpoint)
    if checkpoint is not None:
        _want_same_inputs(checkpoint, callback.memory, made_from)
    callback.memory.inputs = made_from
    with writing(folder):
        begin(folder, checkpoint)
    callback.memory.restart_clock(started)
    callback.memory.spend("load")
    if isinstance(data, EmbeddingData):
        to_device(model, options.device)
        shown("embed")
        data = _with_original(data, model, folder / EMBEDDINGS, autocast, shown)
        callback.memory.spend("embed")
    assert data.train is not None  # `load_data` reads the training file
    trainer = finetune(
        model,
        data.train,
        data.collator,
        training_arguments(options, folder, None if data.validation is None else data.main_metric),
        [callback, ShowLogs(shown)],
        checkpoint,
        options.packing,
        printed=False,
        eval_dataset=data.validation,
        score=evaluate,
        lr_shape=options.trim.schedule.lr(not options.trim.trims, callback.left()),
        teacher=lambda: teacher,
        distil=Distillation(options.distil, options.temperature),
    )
    if not accept_unfinished and (excess := callback.excess(model)) is not None:
        raise SensibertError(
            f"finetune: the run ended at step {trainer.state.global_step} of {trainer.state.max_steps} with {excess}; "
            "--resume continues from the last complete checkpoint; export(..., accept_unfinished=True) writes its model"
        )
    evaluations, state = evaluations_of(trainer.state), trainer.state
    last = state.best_global_step if options.best else state.global_step
    metrics = evaluations.get(last or 0) or score(model)
    callback.memory.spend("evaluate")
    callback.warnings += score_warnings(data, metrics, callback.memory.metrics_at_cut)
    result = _result(options, data, model, callback, state.global_step, metrics)
    result["best_step"] = last if options.best else None
    listed = evaluations.items() if options.eval_steps else ()
    result["evaluations"] = [{"step": step, **scores} for step, scores in listed]
    result["throughput"] = _throughput(callback.memory, trainer)
    shown("measure")
    result |= against_untrimmed(loaded, *original)
    callback.memory.spend("measure")
    shown("write")
    _write_output(options, folder, loaded, tokenizer, callback, result)
    shown.end()
    return result


def _with_original(
    data: EmbeddingData, model: nn.Module, file: Path, autocast: torch.dtype | None, shown: Display
) -> EmbeddingData:
    """Adds the embeddings of the model as it is now."""

    def embed(texts: Features) -> np.ndarray:
        if texts is data.train:
            return saved_embeddings(file, model, texts, data.collator, autocast, shown)
        return np.asarray(predict(model, texts, data.collator, autocast=autocast))

    return data.with_labels(embed)


def _made_from(
    options: Options, data: TaskData, model: PreTrainedModel | EmbeddingModel, teacher: nn.Module | None
) -> dict[str, object]:
    """What the weights of a run depend on besides its settings, with digests of weights and encoded rows."""

    def rows(features: Features | None) -> str:
        return "none" if features is None else f"{len(features)} rows with digest {features.digest()[:16]}"

    def weights(given: nn.Module) -> str:
        return f"weights with digest {weights_digest(given)[:16]}"

    labels = ", ".join(data.label_names) or "none"
    made_from: dict[str, object] = {"seed": options.seed, "task": data.task.name, "labels": labels}
    made_from["max_length"] = options.max_length or data.task.max_length
    made_from |= {"train_file": rows(data.train), "validation_file": rows(data.validation), "model": weights(model)}
    config = json.loads(json.dumps(model.config.to_dict(), default=str))  # as it is read from a checkpoint
    made_from["config"] = {name: value for name, value in config.items() if name not in NOT_COMPARED}
    if options.teacher is None:
        return made_from
    teaches = SNAPSHOT if options.teacher == SNAPSHOT or teacher is None else weights(teacher)
    return made_from | {"teacher": teaches, "distil": options.distil, "temperature": options.temperature}


def _want_same_inputs(checkpoint: Path, memory: RunMemory, made_from: dict[str, object]) -> None:
    """SensibertError naming the first input that is not the one that the checkpoint was made from."""
    was, now = dict(memory.inputs), dict(made_from)
    if not was:  # of version 0.1
        logging.getLogger("sensibert").warning(
            "resume: %s does not say which model and data it was made from, so they are not compared", checkpoint
        )
        return
    if not (checkpoint / STRUCTURE).exists():  # before the cut: no snapshot was made
        scored = evaluations_of(TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)))
        for inputs in (was, now):
            if not scored:
                inputs.pop("validation_file")
            if inputs.get("teacher") == SNAPSHOT:
                for name in ("teacher", "distil", "temperature"):
                    del inputs[name]
    then, here = (cast("dict[str, object]", part.pop("config", {})) for part in (was, now))
    want_same(checkpoint, was, now)
    shared = then.keys() & here.keys()  # another version of transformers may have other entries
    want_same(checkpoint, *({f"config.{name}": part[name] for name in sorted(shared)} for part in (then, here)))


def score_warnings(data: TaskData, metrics: dict | None, at_cut: dict | None) -> list[str]:
    """Sentences about a main metric that shows that nothing was learned, or that far more was lost than usual."""
    if metrics is None:
        return []
    name, found = data.main_metric, []
    score, constant = metrics[name], data.constant_score()
    if score <= constant + LEARNED:
        found.append(f"{name} is {score:.4f}, and the same answer for every row would score {constant:.4f}")
    if at_cut is not None and at_cut[name] - score > FAR_BELOW:
        found.append(
            f"{name} fell from {at_cut[name]:.4f} at the cut to {score:.4f}: a larger budget or more steps lose less"
        )
    return found


def _result(
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
        "samples": callback.sensitivity.samples if callback.sensitivity is not None else None,
        "warnings": callback.warnings,
        "output": options.output,
    }


def _throughput(memory: RunMemory, trainer: TrimTrainer) -> dict[str, dict[str, float]]:
    """What training takes before the first cut and after the last one, as far as this run measured it."""
    speed = {"before": memory.tokens_per_s("warm", "train"), "after": memory.tokens_per_s("recover")}
    found = {"tokens_per_s": {name: round(value, 1) for name, value in speed.items() if value}}
    for name in ("ops_per_step", "peak_memory_gb"):
        values: list[float] = getattr(trainer, name, [])
        found[name] = {"before": values[0], "after": values[-1]} if len(values) > 1 else {}
    return {name: values for name, values in found.items() if values}


def _card_facts(options: Options, result: dict) -> dict[str, object]:
    """For the model card: scores, the names of its data, and the base model, if it is of the hub."""
    facts: dict[str, object] = {"metrics": result["metrics"] or None}
    facts["base_model"] = None if Path(options.model).exists() else options.model
    for part in ("train", "validation"):
        file = getattr(options, f"{part}_file")
        facts[f"{part}_data"] = Path(file).name if file else options.task if options.task in PRESETS else None
    return {name: value for name, value in facts.items() if value}


def _write_output(
    options: Options,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    callback: TrimCallback,
    result: dict,
) -> None:
    """Build the output folder next to the checkpoints, then move it to its final path."""
    output = Path(options.output)
    final = folder / "final" / output.resolve().name  # the model card takes its title from the folder
    with writing(output, "; --resume continues from the last complete checkpoint"):
        shutil.rmtree(final.parent, ignore_errors=True)  # of a run that was killed here
        names = ("task", "method", "seed") if unfinished(model) else ("task", "method", "budget", "seed")
        info = {name: result[name] for name in names}
        info["max_length"] = callback.memory.inputs["max_length"]
        info |= _card_facts(options, result)
        export(model, final, tokenizer, options.layout, info=info, accept_unfinished=True)
        result["mb_after"] = round(sum(file.stat().st_size for file in final.glob("model*.safetensors")) / 1e6, 3)
        callback.memory.spend("write")
        seconds = callback.memory.seconds
        result["seconds"] = {n: round(s, 3) for n, s in (*seconds.items(), ("total", sum(seconds.values())))}
        text = json.dumps(result, indent=2)
        plan = callback.whole_plan(model)
        write_report(final / "report", result, callback.sensitivity, plan)
        write_atomically(final / RESULT, lambda path: Path(path).write_text(text + "\n"))
        (final / RECIPE).write_text(json.dumps(options.settings(), indent=2) + "\n")
        if callback.sensitivity is not None:
            callback.sensitivity.save(final / "sensitivity.safetensors")
        plan.save(final / "plan.safetensors")
        if (folder / LOGS).exists():
            os.replace(folder / LOGS, final / LOGS)
        publish(final, output, options.overwrite, "want --resume --overwrite to write this run there")
        shutil.rmtree(final.parent, ignore_errors=True)
