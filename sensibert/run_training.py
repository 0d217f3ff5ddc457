"""One training of a run: a model folder -> the trained model with its facts. `recipe` says which ones a run needs."""

from __future__ import annotations

import copy
import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .branches import Make, Trained, WarmUp
from .callback import Choose, Shared, TrimCallback
from .core.errors import SensibertError
from .core.files import writing
from .data.embedding_data import EmbeddingData
from .data.encode import Features
from .data.task_data import TaskData
from .deploy.bench import against_untrimmed
from .deploy.costs import measured_facts, missed
from .inputs import check_room, load_model, load_teacher, to_device
from .models.embedding import EmbeddingModel
from .models.structure import STRUCTURE
from .report.history import history
from .report.progress import Display
from .report.trainer_logs import ShowLogs
from .run_form import Taken, Vocabulary, size_choice
from .run_inputs import made_from, want_same_inputs
from .run_options import SNAPSHOT, Options
from .run_output import add_times, nothing_learned, result_of, score_warnings, throughput_of
from .saving.folder import export
from .size_choice import HeldOut, SizeChoice
from .trainer_arguments import training_arguments
from .training.checkpoints import EMBEDDINGS, begin
from .training.distillation import Distillation
from .training.embeddings import saved_embeddings
from .training.evaluations import evaluations_of
from .training.finetune import finetune
from .training.manifest import MANIFEST, check_manifest, write_manifest
from .training.predict import predict
from .training.started import Started
from .training.termination import SaveOnTermination
from .training.trainer import TrimTrainer


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
    processes: Started


def train(
    inputs: Inputs,
    options: Options,
    folder: Path,
    checkpoint: Path | None,
    started: float,
    make: Make | None = None,
) -> Trained:
    """Train once, with checkpoints in `folder`. The model of a WarmUp is not scored, and others in the first process
    alone.

    checkpoint: to resume from. started: time.perf_counter() when the run began. make: the callback; None: TrimCallback.
    SensibertError for a training that ended before its model met the budget, unless inputs accept that."""
    set_seed(options.seed)
    training = _Training(inputs, options, folder)
    training.prepare(checkpoint, started, make or TrimCallback)
    trainer = training.train(checkpoint)
    if make is WarmUp:
        return Trained(training.loaded, training.callback)
    training.want_finished(trainer)
    return inputs.processes.in_first(lambda: training.measured(trainer), Trained(training.loaded, training.callback))


class _Training:
    """The model of a training, and what its Trainer calls. The methods are called in their order."""

    callback: TrimCallback  # from `prepare` on

    def __init__(self, inputs: Inputs, options: Options, folder: Path) -> None:
        self.inputs, self.options, self.folder, self.data = inputs, options, folder, inputs.data
        self.loaded = load_model(options.model, self.data)
        self.facts = inputs.vocabulary.trim(self.loaded)  # for result.json
        check_room(self.loaded, self.data)
        self.original = type(self.loaded), copy.deepcopy(self.loaded.config)
        self.model: PreTrainedModel | EmbeddingModel = self.loaded
        if isinstance(self.data, EmbeddingData):
            self.model = EmbeddingModel(self.loaded, self.data.pooling)
        self.teacher: nn.Module | None = None
        self.form: SizeChoice | None = None

    def prepare(self, checkpoint: Path | None, started: float, make: Make) -> None:
        """Make the callback, and whatever the training learns from besides the rows: a teacher, embeddings."""
        inputs, options, folder = self.inputs, self.options, self.folder
        if checkpoint is None or not (checkpoint / STRUCTURE).exists():  # resumed before the cut, which makes a new one
            inputs.processes.by_first(lambda: shutil.rmtree(folder / SNAPSHOT, ignore_errors=True))
        if (folder / SNAPSHOT / MANIFEST).exists():  # earlier versions wrote none
            check_manifest(folder / SNAPSHOT, "teacher of this run")
        self.teacher = load_teacher(options, self.data, folder)
        self.form = size_choice(options, inputs.vocabulary, inputs.rows)
        self.callback = make(
            options.trim,
            before_cut=self._before_cut,
            save_before_cut=options.save_before_cut,
            choose=inputs.choose,
            shared=inputs.shared,
            progress=inputs.shown,
            size_choice=self.form if inputs.choose is None else None,
        )
        found = made_from(options, self.data, self.model, self.teacher)
        self.callback.prepare(self.model, checkpoint)
        memory = self.callback.memory
        if checkpoint is not None:
            want_same_inputs(checkpoint, memory, found)
            inputs.vocabulary.want_chosen(checkpoint, memory)
        memory.inputs = found
        with writing(folder):
            inputs.processes.by_first(lambda: begin(folder, checkpoint))
        memory.restart_clock(started)
        memory.spend("load")
        if isinstance(self.data, EmbeddingData):
            to_device(self.model, options.device)
            inputs.shown("embed")
            self.data = self.data.with_labels(self._embed)
            memory.spend("embed")
        if self.form is not None and self.form.rows is None:
            assert self.data.train is not None  # as in `train`
            self.form.rows = HeldOut("training", (self.data.train, self.data.collator))

    def _embed(self, texts: Features) -> np.ndarray:
        """The embeddings of the model as it is now: those of the training texts from a file."""
        data, inputs, autocast = self.data, self.inputs, self.options.autocast()
        if texts is not data.train:
            return np.asarray(predict(self.model, texts, data.collator, autocast=autocast))
        file = inputs.folder / EMBEDDINGS
        saved = partial(saved_embeddings, file, self.model, texts, data.collator, autocast, inputs.shown)
        found = inputs.processes.in_first(saved, None)
        return saved() if found is None else found  # the others read what it has written

    def train(self, checkpoint: Path | None) -> TrimTrainer:
        data, options, trim = self.data, self.options, self.options.trim
        assert data.train is not None  # `load_data` reads the training file
        termination = SaveOnTermination()
        with termination.listening():
            return finetune(
                self.model,
                data.train,
                data.collator,
                training_arguments(options, self.folder, None if data.validation is None else data.main_metric),
                [self.callback, ShowLogs(self.inputs.shown), termination],
                checkpoint,
                options.packing,
                printed=False,
                eval_dataset=data.validation,
                score=self._evaluate,
                # How much is left under a budget of size is known once the form of the file is chosen.
                lr_shape=lambda *steps: trim.schedule.lr(not trim.trims, self.callback.left())(*steps),
                teacher=lambda: self.teacher,
                distil=Distillation(options.distil, options.temperature),
            )

    def _scored(self, model: nn.Module) -> tuple[dict[str, float] | None, Any]:
        """Metrics and logits on the validation rows; None without any."""
        data, shown = self.data, self.inputs.shown
        if data.validation is None:
            return None, None
        logits = predict(model, data.validation, data.collator, autocast=self.options.autocast(), progress=shown)
        metrics = data.compute_metrics(logits)
        shown.scored(metrics, data.main_metric)
        return metrics, logits

    def _metrics(self, model: nn.Module) -> dict[str, float] | None:
        return self.inputs.processes.by_first(lambda: self._scored(model)[0])

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        memory = self.callback.memory
        memory.spend(self.callback.phase)
        metrics = self._metrics(model)
        memory.spend("evaluate")
        return metrics or {}

    def _before_cut(self, model: nn.Module) -> dict[str, float] | None:
        shared = self.inputs.shared
        if self.options.teacher == SNAPSHOT:
            assert isinstance(model, PreTrainedModel)  # the one that was loaded: no embedding model has a teacher
            tokenizer, folder = self.inputs.vocabulary.tokenizer, self.folder / SNAPSHOT
            self.inputs.processes.by_first(partial(_save_snapshot, model, folder, tokenizer))
            self.teacher = load_teacher(self.options, self.data, self.folder)
        if shared is not None and shared.metrics is not None:
            return shared.metrics
        metrics = self._metrics(model)
        if self.inputs.processes.first and (text := nothing_learned(self.data, metrics)) is not None:
            logging.getLogger("sensibert").warning("before the cut, %s", text)
        if shared is not None:
            shared.metrics = metrics
        return metrics

    def want_finished(self, trainer: TrimTrainer) -> None:
        """SensibertError if the model is larger than the budget."""
        if self.inputs.accept_unfinished or (excess := self.callback.excess(self.model)) is None:
            return
        state = trainer.state
        raise SensibertError(
            f"finetune: the run ended at step {state.global_step} of {state.max_steps} with {excess}; "
            "--resume continues from the last complete checkpoint; export(..., accept_unfinished=True) writes its model"
        )

    def measured(self, trainer: TrimTrainer) -> Trained:
        """Bring the model into the form of its file, score and time it."""
        options, callback, state, shown = self.options, self.callback, trainer.state, self.inputs.shown
        memory, metric, evaluations, logits = callback.memory, self.data.main_metric, evaluations_of(state), None
        last = state.best_global_step if options.best else state.global_step
        metrics, full = evaluations.get(last or 0), None
        taken = Taken.of(options, self.inputs.vocabulary, memory)
        if taken.changes:
            full = self._scored(self.model)[0] if metrics is None else metrics
            self.data, facts = taken.bring(self.loaded, options, self.data, self.inputs.vocabulary)
            self.facts, metrics = self.facts | facts, None
        if metrics is None or self.inputs.shared is not None:  # which may compare rows
            metrics, logits = self._scored(self.model)
        memory.spend("evaluate")
        callback.warnings += score_warnings(self.data, metrics, memory.metrics_at_cut)
        callback.warnings += taken.warnings(metric, full, metrics)
        result = result_of(options, self.data, self.model, callback, state.global_step, metrics) | self.facts
        result |= {"weights": taken.weights, "metrics_in_full": full, "size": memory.size}
        result["best_step"] = last if options.best else None
        listed = evaluations.items() if options.eval_steps else ()
        result["evaluations"] = [{"step": step, **scores} for step, scores in listed]
        result["throughput"] = throughput_of(memory, trainer)
        moments = history(state.log_history, list(callback.cuts), result, metric)
        shown("measure")
        result |= against_untrimmed(self.loaded, *self.original)
        if options.trim.trims and callback.budget.measured:
            result["measured"] = measured_facts(self.loaded, callback.budget)
            callback.warnings += missed(result["measured"])
        memory.spend("measure")
        add_times(result, memory)
        return Trained(self.loaded, callback, result, logits, moments, self._score, taken.tokenizer)

    def _score(self, model: nn.Module) -> dict[str, float]:
        metrics = self._scored(model)[0]
        assert metrics is not None  # asked for only where there are validation rows
        return metrics


def _save_snapshot(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    export(model, folder, tokenizer, accept_unfinished=True)  # atomic: a resumed run needs the same teacher
    write_manifest(folder)
