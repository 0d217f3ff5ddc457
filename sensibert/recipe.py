"""A complete run, in order: fine-tune, trim during training, score, export."""

from __future__ import annotations

import json
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from .branches import Branches, Make, Trained, WarmUp, add_baseline
from .callback import Choose, Shared, TrimCallback
from .core.arguments import checked
from .core.errors import SensibertError
from .core.files import write_atomically, writing
from .data.embedding_data import EmbeddingData
from .data.encode import Features
from .data.task_data import TaskData
from .data.tasks import PRESETS
from .family import RESULT, train_family, write_family
from .floor import Search
from .inputs import (
    check_family,
    check_room,
    load_data,
    load_model,
    load_teacher,
    load_tokenizer,
    to_best_device,
)
from .models import layout_of
from .models.embedding import EmbeddingModel
from .models.masks import cost_of
from .models.structure import STRUCTURE
from .models.unfinished import unfinished
from .report.plots import write_report
from .run_inputs import made_from, want_same_inputs
from .run_options import SNAPSHOT, Options
from .saving.folder import export
from .saving.output_paths import check_apart, check_output
from .saving.publish import publish
from .training.checkpoints import EMBEDDINGS, begin, partial_folder, workspace
from .training.distillation import Distillation
from .training.embeddings import saved_embeddings
from .training.finetune import finetune
from .training.predict import predict
from .training.run_memory import RunMemory
from .training.trainer import TrimTrainer

RECIPE = "recipe.json"
LEARNED = 0.01  # a main metric that is no more than this above that of a constant answer is worth a warning
FAR_BELOW = 0.05  # and so is one that is more than this below the one at the cut


def training_arguments(options: Options, folder: Path) -> TrainingArguments:
    """options: resolved."""
    assert options.epochs is not None and options.learning_rate is not None and options.batch_size is not None
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        weight_decay=options.weight_decay,
        optim="adamw_torch_fused",
        bf16=options.autocast() is not None,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
        save_strategy="steps" if options.save_steps else "epoch",
        save_steps=options.save_steps or 500,
        save_total_limit=None if options.save_before_cut else 2,  # a limit would delete the one before the cut
        logging_steps=50,
        logging_nan_inf_filter=False,  # reads the loss of every step; TrimTrainer raises for one that is not finite
        report_to="none",
        disable_tqdm=options.quiet,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # copies from pinned memory
    )


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
    it, SensibertError, and the checkpoints stay. With `budgets` the content of the family's result.json."""
    started = time.perf_counter()
    options.want_data()
    options = options.resolved()
    check_place(options)
    if options.quiet:
        transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with workspace(options.output, options.resume, options.overwrite, options.keep_checkpoints) as (folder, checkpoint):
        check_family(options.model)
        tokenizer = load_tokenizer(options.model)
        data = load_data(options, tokenizer)
        schedule = options.trim.schedule.for_task(data.task.recovery, data.task.trim_start)
        options = replace(options, trim=replace(options.trim, schedule=schedule))
        shared = Shared() if options.baseline or options.budgets or options.keep else None
        inputs = Inputs(tokenizer, data, folder, choose, accept_unfinished, shared)
        return _run(inputs, options, Branches(options, folder, checkpoint, started, partial(_train, inputs)))


@dataclass(frozen=True)
class Inputs:
    """What all trainings of a run have in common. folder: of the run."""

    tokenizer: PreTrainedTokenizerBase
    data: TaskData
    folder: Path
    choose: Choose | None
    accept_unfinished: bool
    shared: Shared | None  # by runs that branch from one warm-up


def _run(inputs: Inputs, options: Options, branches: Branches) -> dict:
    """Train all models that the options ask for, and write the output; return the content of result.json."""
    write, folder, data = partial(_write_model, inputs.tokenizer), branches.folder, inputs.data
    if options.budgets:
        layout = layout_of(load_model(options.model, data))
        result = train_family(branches, data.main_metric, layout, write)
        _publish(options, folder, partial(write_family, run=folder, result=result, settings=options.settings()))
        return result
    if options.keep:
        trained = Search(branches, data, layout_of(load_model(options.model, data))).find()
    elif options.baseline:
        baseline = branches.baseline()
        trained = branches.run("trimmed", options)
        add_baseline(trained.result, baseline)
    else:
        trained = _train(inputs, options, folder, branches.checkpoint, branches.started)
    _publish(options, folder, partial(write, options=options, trained=trained))
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
    tokenizer, data, shared = inputs.tokenizer, inputs.data, inputs.shared
    set_seed(options.seed)
    loaded = load_model(options.model, data)
    check_room(loaded, data)
    model = EmbeddingModel(loaded, data.pooling) if isinstance(data, EmbeddingData) else loaded
    autocast = options.autocast()

    def score(model: nn.Module) -> tuple[dict[str, float] | None, Any]:
        if data.validation is None:
            return None, None
        logits = predict(model, data.validation, data.collator, autocast=autocast)
        return data.compute_metrics(logits), logits

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
        if shared is None:
            return score(model)[0]
        shared.metrics = score(model)[0] if shared.metrics is None else shared.metrics
        return shared.metrics

    saves = options.save_before_cut
    callback = (make or TrimCallback)(
        options.trim, before_cut=before_cut, save_before_cut=saves, choose=inputs.choose, shared=inputs.shared
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
        to_best_device(model)
        data = _with_original(data, model, inputs.folder / EMBEDDINGS, autocast)
        callback.memory.spend("embed")
    assert data.train is not None  # `load_data` reads the training file
    trainer = finetune(
        model,
        data.train,
        data.collator,
        training_arguments(options, folder),
        [callback],
        checkpoint,
        options.packing,
        lr_shape=options.trim.schedule.lr(not options.trim.trims, callback.left()),
        teacher=lambda: teacher,
        distil=Distillation(options.distil, options.temperature),
    )
    if make is WarmUp:
        return Trained(loaded, callback, {}, None)
    if not inputs.accept_unfinished and (excess := callback.excess(model)) is not None:
        raise SensibertError(
            f"finetune: the run ended at step {trainer.state.global_step} of {trainer.state.max_steps} with {excess}; "
            "--resume continues from the last complete checkpoint; export(..., accept_unfinished=True) writes its model"
        )
    metrics, logits = score(model)
    at_cut = {f"{name}_at_cut": value for name, value in (callback.memory.metrics_at_cut or {}).items()}
    trainer.log({f"sensibert/{name}": value for name, value in {**at_cut, **(metrics or {})}.items()})
    callback.memory.spend("evaluate")
    callback.warnings += score_warnings(data, metrics, callback.memory.metrics_at_cut)
    result = _result(options, data, model, callback, trainer.state.global_step, metrics)
    result["throughput"] = _throughput(callback.memory, trainer)
    return Trained(loaded, callback, result, logits)


def _with_original(data: EmbeddingData, model: nn.Module, file: Path, autocast: torch.dtype | None) -> EmbeddingData:
    """Adds the embeddings of the model as it is now."""

    def embed(texts: Features) -> np.ndarray:
        if texts is data.train:
            return saved_embeddings(file, model, texts, data.collator, autocast)
        return np.asarray(predict(model, texts, data.collator, autocast=autocast))

    return data.with_labels(embed)


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
    trim, memory, seconds = options.trim, callback.memory, callback.memory.seconds
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
        "seconds": {phase: round(s, 3) for phase, s in (*seconds.items(), ("total", sum(seconds.values())))},
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
    facts: dict[str, object] = {name: result[name] for name in ("metrics", "metrics_baseline")}
    facts["base_model"] = None if Path(options.model).exists() else options.model
    for part in ("train", "validation"):
        file = getattr(options, f"{part}_file")
        facts[f"{part}_data"] = Path(file).name if file else options.task if options.task in PRESETS else None
    return {name: value for name, value in facts.items() if value}


def _publish(options: Options, folder: Path, write: Callable[[Path], None]) -> None:
    """Write the output folder next to the checkpoints, then move it to its final path."""
    output = Path(options.output)
    final = folder / "final" / output.resolve().name  # the model card takes its title from the folder
    with writing(output, "; --resume continues from the last complete checkpoint"):
        shutil.rmtree(final.parent, ignore_errors=True)  # of a run that was killed here
        write(final)
        publish(final, output, options.overwrite, "want --resume --overwrite to write this run there")
        shutil.rmtree(final.parent, ignore_errors=True)


def _write_model(tokenizer: PreTrainedTokenizerBase, folder: Path, options: Options, trained: Trained) -> None:
    """Write a model, its results and its report into a new folder."""
    model, callback, result, _ = trained
    names = ("task", "method", "seed") if unfinished(model) else ("task", "method", "budget", "seed")
    info = {name: result[name] for name in names}
    info["max_length"] = callback.memory.inputs["max_length"]
    info |= _card_facts(options, result)
    export(model, folder, tokenizer, options.layout, info=info, accept_unfinished=True)
    text = json.dumps(result, indent=2)
    plan = callback.whole_plan(model)
    write_report(folder / "report", result, callback.sensitivity, plan)
    write_atomically(folder / RESULT, lambda path: Path(path).write_text(text + "\n"))
    (folder / RECIPE).write_text(json.dumps(options.settings(), indent=2) + "\n")
    if callback.sensitivity is not None:
        callback.sensitivity.save(folder / "sensitivity.safetensors")
    plan.save(folder / "plan.safetensors")
