"""TrimCallback: when a running Trainer decides, trims and recovers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from .core import cost
from .core.arguments import checked
from .core.artifacts import Plan, Sensitivity
from .core.budget import Budget
from .core.config import TrimConfig
from .core.errors import SensibertError
from .core.logs import announce
from .core.progress import Progress, counted, phase_of, unseen
from .core.rows import Rows
from .core.size_forms import form_lines
from .data.batching import micro_batches
from .decide import Allocated, Analysis, Choose, Tried, decide, with_costs
from .models import layout_of
from .models.masks import Masks, cost_of, masks_of
from .models.modules import consumer_weights
from .models.sizes import Sizes
from .models.structure import STRUCTURE, is_trimmed, read_structure
from .models.unfinished import note_budget
from .models.untrimmed import Untrimmed
from .models.wrapped import has_classes, inner_batches, inner_model
from .optim import MaskedAdamW, unwrapped
from .run_budget import BudgetOfRun
from .sensitivity import sampled_loss
from .sensitivity.gradients import Loss
from .sensitivity.ranking import StepRanking
from .size_choice import SizeChoice
from .start_checks import check_analysis, check_parallel, check_trainer
from .training.checkpoints import MEMORY, checkpoint_of, learns_by, refuse_trimmed_weights, seal, want_same_run
from .training.processes import Processes
from .training.recovery import Recovery
from .training.reducer import Reducer
from .training.run_memory import PACKED, RunMemory, compared
from .trimming import restructure, trim

SHARE_OF_SAMPLES = 1 / 64  # the analysis reads at most this fraction of the samples that a run trains on
SCORES = "sensitivity.safetensors"  # of a checkpoint
MARK = "sensibert_trims"  # attribute of the state of a training that has a TrimCallback


@dataclass
class Shared:
    """What runs that branch from one warm-up share at the first cut."""

    analysis: Analysis | None = None
    metrics: dict[str, float] | None = None  # at the cut


class TrimCallback(BudgetOfRun, TrainerCallback):
    """Trims the model of a running transformers.Trainer, or the one inside a SentenceTransformer, SparseEncoder or
    CrossEncoder in the trainers of these. Add it to `callbacks=`; nothing else has to change.

    config: a `TrimConfig`, or a budget as text, "50%params". The analysis draws rows from the Trainer's training set
    and uses its seed and, with bf16=True, its precision. The trimmed model saves itself: `trainer.save_model(folder)`
    writes a folder that `AutoModel...from_pretrained` reloads. With `load_best_model_at_end`, only checkpoints of the
    trimmed model count. To resume an interrupted run use `TrimTrainer` instead of Trainer.

    loss: (outputs, batch, generator) -> loss with labels drawn from the prediction, for obs and fisher. before_cut:
    called with the model just before the first cut; its return value is saved as the scores at the cut.
    save_before_cut: also save a checkpoint one step before the first cut. choose: (model, micro-batches, budget) ->
    Plan, in place of analyze and allocate. shared: the analysis at the first cut is put there, and taken from there if
    there is one: for callbacks whose models are the same at that cut. progress: called with (phase, done, of all) after
    every step, and for every micro-batch that the analysis reads. size_choice: chooses the form of the weights file for
    a budget of size at the first cut; the caller brings the model into it at the end.

    What a cut did is logged in one line, by the logger `sensibert` at level INFO. Where nothing configures logging, the
    line is written to standard error, as Python does with warnings. `getLogger("sensibert").setLevel("WARNING")` turns
    it off.

    In several processes (DistributedDataParallel) the first one analyzes and decides, and the others receive its plan
    and weights. `choose` runs in the first process, and `sensitivity` is there; `before_cut` runs in all.

    The constructor raises SensibertError for invalid settings. Training raises it at the start if trimming cannot work
    in this Trainer: FSDP or DeepSpeed, a data set without a length, a frozen encoder, a second TrimCallback, outputs
    without what the analysis needs. A callback in several Trainers measures each of their models. If training ends
    before the last cut, a warning is logged and noted in `warnings`, and `export` refuses a model that is larger than
    the budget."""

    @checked
    def __init__(
        self,
        config: TrimConfig | str = "50%params",
        *,
        loss: Loss = sampled_loss,
        before_cut: Callable[[nn.Module], dict[str, float] | None] | None = None,
        save_before_cut: bool = False,
        choose: Choose | None = None,
        shared: Shared | None = None,
        progress: Progress = unseen,
        size_choice: SizeChoice | None = None,
    ) -> None:
        if not isinstance(config, TrimConfig):
            config = TrimConfig(config)
        self._requested, self.config = config, config.resolved()
        self.loss, self.before_cut, self.save_before_cut, self.choose = loss, before_cut, save_before_cut, choose
        self.shared, self.size_choice = shared, size_choice
        self.progress, self.phase = progress, "train"  # phase: of the last step
        self.memory, self.recovery = RunMemory(), Recovery()
        self.cuts: dict[int, float] = {}  # step -> progress of the trimming
        self.sensitivity: Sensitivity | None = None  # of the untrimmed model
        self.warnings: list[str] = []  # of the last training
        self._model: nn.Module | None = None  # that memory belongs to
        self._seen: WeakKeyDictionary[nn.Module, Untrimmed] = WeakKeyDictionary()
        self._step_ranking: StepRanking | None = None  # of the step before the first cut
        self._processes = Processes()
        self._reducer: Reducer | None = None  # of the present training, if it was started with torchrun
        self._checkpoint: Path | None = None  # the run resumes from it
        self._made_with: dict[str, object] | None = None  # settings saved in that checkpoint

    def __getstate__(self) -> dict[str, object]:
        # Weak references cannot be pickled, as some backends of a hyperparameter search do.
        return vars(self) | {"_seen": {}, "_model": None, "_reducer": None}

    @checked
    def prepare(self, model: nn.Module, checkpoint: str | Path | None = None) -> None:
        """Record the costs of the untrimmed model, or recall them if the callback trimmed it before; with a checkpoint,
        restore the run's memory from it. SensibertError for a budget that this model cannot meet."""
        self.config = self._requested.resolved(labels=has_classes(model) or self.loss is not sampled_loss)
        model = inner_model(model)
        seen = self._seen.get(model) or Untrimmed.of(model)
        budget = self.config.parsed_budget()
        if self.config.trims:
            grid, before = self.config.parsed_grid(), RunMemory()
            if checkpoint is not None and budget.measured:
                before.restore(Path(checkpoint))
                if before.table is not None and before.table.kind == budget.kind:
                    budget = budget.with_table(before.table)
            budget = with_costs(budget, model, self.config)
            open_still = self.size_choice is not None and before.size is None
            cost.want_reach(seen.layout, self._smallest(budget, model) if open_still else budget, grid)
            if grid is not None and is_trimmed(model):
                raise SensibertError(f"model: units were removed already, want an untrimmed model for grid {grid}")
        self._seen[model], self._model = seen, model
        self.sensitivity = self._made_with = None
        self.memory = RunMemory.of(seen.layout, budget)
        if checkpoint is not None:
            self._remember(Path(checkpoint))

    @checked
    def resume_from(self, checkpoint: str | Path) -> None:
        """Set the checkpoint that the Trainer loads. `TrimTrainer` calls this; a plain Trainer uses its output_dir."""
        self._checkpoint = Path(checkpoint)

    def restructure(self, model: nn.Module, structure: Mapping[str, Tensor] | Masks) -> nn.Module:
        """Trim a model to the structure of a checkpoint. `TrimTrainer` calls this before it loads the weights."""
        whole, model = model, inner_model(model)
        if model is not self._model:
            self.prepare(whole)
        restructure(model, structure)
        if (entry := getattr(model.config, "sensibert", None)) is not None:
            entry["method"] = self.config.method
        return model

    def _remember(self, checkpoint: Path) -> None:
        self._made_with = self.memory.restore(checkpoint)
        scores = checkpoint / SCORES
        self.sensitivity = Sensitivity.load(scores) if scores.exists() else None
        self._checkpoint = checkpoint

    def _keep_former_default(self, made_with: Mapping[str, object]) -> None:
        """In runs of earlier versions the embeddings learned at half. Resumed without a setting of its own, such a run
        ends as it began."""
        schedule, learned = self.config.schedule, made_with.get("freeze_embeddings") is False
        if schedule.freeze_embeddings is None and learned and self.left() == 0.5:
            self.config = replace(self.config, schedule=replace(schedule, freeze_embeddings=False))

    def _settings(self, args: TrainingArguments, state: TrainerState) -> dict[str, object]:
        """Settings that the weights at this step depend on, saved in every checkpoint. Model, data and teacher are not
        compared."""
        done = [f"after step {step} ({100 * t:.0f} %)" for step, t in self.cuts.items() if step <= state.global_step]
        settings: dict[str, object] = {"processes": self._processes.count}
        settings |= {"cuts": ", ".join(done) or "none", "steps": state.max_steps}
        settings["warmup_ratio"] = self.schedule.warmup_ratio
        if done:
            settings |= compared(self.config, self.choose is not None, self.left())
        return settings | learns_by(args)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if kwargs.get("model") is None:  # a Trainer with model_init has none yet
            return
        model = inner_model(kwargs["model"])
        self.recovery.end()  # of a training that was interrupted
        if model is not self._model:  # before a checkpoint is loaded: the model is untrimmed still
            self.prepare(kwargs["model"])
        if (seen := self._seen[model]).guard is None:
            seen.guard = model.register_load_state_dict_pre_hook(refuse_trimmed_weights)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = inner_model(kwargs["model"])
        optimizer: torch.optim.Optimizer = kwargs["optimizer"]
        loader: DataLoader = kwargs["train_dataloader"]
        if hasattr(state, MARK):
            raise SensibertError("TrimCallback: the Trainer has two, want one: each would trim the model")
        setattr(state, MARK, True)
        self.recovery.end()  # of a training that was interrupted
        self.warnings, self._step_ranking, self._processes = [], None, Processes.of(args)
        self._end_reducer()
        if self.config.trims:
            check_parallel(args, kwargs["model"], self.config, unwrapped(optimizer))
            for text in check_trainer(args, model, getattr(loader, "dataset", None), unwrapped(optimizer)):
                self._warn(text)
        if model is not self._model:  # from model_init, or another
            self.prepare(kwargs["model"])
        seen = self._seen[model]
        seen.remove_guard()
        self.cuts = self.schedule.cuts(state.max_steps) if self.config.trims else {}
        for text in self.schedule.shortcomings(state.max_steps) if self.cuts else ():
            self._warn(text)
        done = any(step <= state.global_step for step in self.cuts)
        if done and seen.trimmed_before and layout_of(model).sites == seen.layout.sites:
            raise SensibertError(
                "TrimCallback: the model was trimmed before the callback saw it, so its size before the cut is not "
                "known; to resume, want TrimTrainer and the model that the run began with"
            )
        if state.global_step:
            checkpoint = self._checkpoint or checkpoint_of(args, state)
            if self._made_with is None and (checkpoint / MEMORY).exists():
                self._remember(checkpoint)
            if self._made_with:
                self._keep_former_default(self._made_with)
                want_same_run(checkpoint, {"processes": 1} | self._made_with, self._settings(args, state))
            if masks_of(model) is None and not is_trimmed(model) and (checkpoint / STRUCTURE).exists():
                restructure(model, read_structure(checkpoint / STRUCTURE))  # a plain Trainer loads zeros, not masks
        self._checkpoint = self._made_with = None  # a later train() is another run
        if done:
            note_budget(model, self.budget, self._allowed())
            _follow(optimizer, model, args)
        if any(step > state.global_step for step in self.cuts):
            rows, autocast = cast(Rows, loader.dataset), torch.bfloat16 if args.bf16 else None
            chosen = self.choose is not None
            check_analysis(
                *(kwargs["model"], self.config, rows, loader.collate_fn, self.loss, args.seed, autocast, chosen)
            )
        if self.cuts and state.global_step >= max(self.cuts):
            self.recovery.begin(model, optimizer, self.schedule, self.left())
        # The loop on packed batches adds up gradients itself.
        if self.config.trims and args.parallel_mode == ParallelMode.DISTRIBUTED and not hasattr(state, PACKED):
            self._reducer = Reducer(kwargs["model"])
        self.memory.restart_clock(tokens=state.num_input_tokens_seen)
        self._enter(state, state.global_step + 1)

    def _end_reducer(self) -> None:
        if self._reducer is not None:
            self._reducer.end()
            self._reducer = None

    def _enter(self, state: TrainerState, step: int) -> None:
        self.phase, last = phase_of(step, self.cuts, state.max_steps)
        self.progress(self.phase, state.global_step, last)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.cuts and state.global_step == min(self.cuts) - 1 and self.choose is None:
            self._step_ranking = StepRanking(inner_model(kwargs["model"]), unwrapped(kwargs["optimizer"]))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._reducer is not None and self._processes.count > 1 and not self._reducer.found:
            raise SensibertError(
                f"TrimCallback: {self._processes.count} processes train, and the model does not run in "
                "DistributedDataParallel: want a Trainer that puts it there, and of sentence-transformers a loss that "
                "runs the model as its attribute `model`"
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._step_ranking is not None:
            self._step_ranking.read_gradients()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.save_before_cut and self.cuts and state.global_step == min(self.cuts) - 1:
            control.should_save = True
        self._enter(state, state.global_step)
        model = inner_model(kwargs["model"])
        if state.global_step - 1 in self.cuts:  # were the gradients of the new parameters reduced?
            self._processes.want_same(model, f"one step after the cut at step {state.global_step - 1}")
        if state.global_step not in self.cuts:
            return
        optimizer: torch.optim.Optimizer = kwargs["optimizer"]
        first = state.global_step == min(self.cuts)
        self.memory.spend(self.phase, state.num_input_tokens_seen)
        if first and self.before_cut is not None:
            self.memory.metrics_at_cut = self.before_cut(kwargs["model"])
            self.memory.spend("evaluate")
        self.progress("analyze", 0, None)
        plan = self._decide(kwargs["model"], state, args, kwargs["train_dataloader"])
        self.memory.spend("analyze")
        self.progress("cut", 0, None)
        before = Sizes.of(model)
        trim(model, plan, optimizer)
        note_budget(model, self.budget, self._allowed())  # plan.budget is the absolute target of this cut
        _follow(optimizer, model, args)
        # Earlier checkpoints have other shapes and cannot be loaded as the best model.
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        if state.global_step == max(self.cuts):
            self.recovery.begin(model, optimizer, self.schedule, self.left())
        if self._reducer is not None:
            self._reducer.renew()
        done, logged = Sizes.of(model).since(before), [log for log in state.log_history if "loss" in log]
        loss = f"; loss {logged[-1]['loss']:.4f} at step {logged[-1]['step']}" if logged else ""
        if self._processes.first:
            announce(f"cut at step {state.global_step} of {state.max_steps}: {done}{loss}")
        self.memory.spend("cut")
        self._enter(state, state.global_step + 1)

    def _decide(self, model: nn.Module, state: TrainerState, args: TrainingArguments, loader: DataLoader) -> Plan:
        """The plan of this step's cut. With `compensate`, also adjusts the kept weights of the model.

        The first process analyzes and decides; the others get its plan and its adjusted weights."""
        processes, inner = self._processes, inner_model(model)
        per_step = args.train_batch_size * args.gradient_accumulation_steps * processes.count
        least = 16 * self.config.micro_batch
        allowed = max(least, int(state.max_steps * per_step * SHARE_OF_SAMPLES))
        samples = max(1, min(self.config.samples, allowed) // len(self.cuts))
        seed = args.seed + state.global_step
        rows = cast(Rows, loader.dataset)  # `check_trainer` refuses one without a length

        def batches(number: int, size: int) -> Iterator[dict]:
            read = micro_batches(rows, loader.collate_fn, number, size, seed)
            of_all = math.ceil(min(number, len(rows)) / size)
            return inner_batches(model, counted(read, self.progress, "analyze", of_all))

        first, autocast = state.global_step == min(self.cuts), torch.bfloat16 if args.bf16 else None
        tensors = {} if self._step_ranking is None else self._step_ranking.end()
        self._step_ranking = None

        def analyzed() -> Plan:
            known = self.shared.analysis if first and self.shared is not None else None
            fitted = None if self.size_choice is None or not first else self._fitted(inner, state)
            plan, (sensitivity, factors) = decide(
                inner, self.config, self._target(self.cuts[state.global_step]), batches, samples,
                args.train_batch_size, seed, self.loss, autocast, self.choose, known, fitted,
            )  # fmt: skip
            if first and self.shared is not None:
                self.shared.analysis = Analysis(sensitivity, factors)
            if first:
                self.sensitivity = None if sensitivity is None else replace(sensitivity, tensors=tensors)
            return plan if processes.count == 1 else plan.on_cpu()

        plan = processes.by_first(analyzed)
        if self.config.compensate:
            processes.copy_from_first(consumer_weights(inner, plan.layout))
        processes.want_same(inner, f"at the cut at step {state.global_step}", plan)
        if plan.budget.table is not None:
            self.memory.table = plan.budget.table
        if first:
            allowed = min(allowed, len(rows))
            if allowed < self.config.samples != TrimConfig.samples:  # more than the default were requested
                share = f"1/{round(1 / SHARE_OF_SAMPLES)} of the rows that the run trains on, or {least}"
                self._warn(f"samples is {self.config.samples}, and the analysis reads {allowed}: at most {share}")
        return plan

    def _fitted(self, model: nn.Module, state: TrainerState) -> Callable[[Allocated, Tried], Budget]:
        """The budget of this step's cut, in the form of the file that `size_choice` chooses for the whole budget."""

        def fitted(allocated: Allocated, tried: Tried) -> Budget:
            assert self.size_choice is not None
            self.memory.table, self.memory.size = self.size_choice.choose(model, self.budget, allocated, tried)
            for line in form_lines(self.memory.size):
                announce(f"size: {line}")
            return self._target(self.cuts[state.global_step])

        return fitted

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        if self._processes.first:
            logging.getLogger("sensibert").warning("TrimCallback: %s", text)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs, model = kwargs.get("logs"), kwargs.get("model")
        if logs is not None and model is not None and "loss" in logs:
            size = {"sensibert/encoder_params": cost_of(inner_model(model))[0]}
            logs |= size
            if state.log_history and "loss" in state.log_history[-1]:  # the Trainer has copied the logs there before
                state.log_history[-1] |= size

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.memory.spend(self.phase, state.num_input_tokens_seen)
        memory = self.memory.saved(self._settings(args, state), hasattr(state, PACKED))
        model = inner_model(kwargs["model"])

        def completed() -> None:
            folder = checkpoint_of(args, state)
            if self.sensitivity is not None:
                self.sensitivity.save(folder / SCORES)
            seal(folder, model, memory)

        self._processes.wait()  # every process writes its random state
        self._processes.by_first(completed)
        self.memory.spend("save")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.memory.spend(self.phase, state.num_input_tokens_seen)
        self.recovery.end()
        if self._reducer is not None:
            self._reducer.renew()  # the embeddings may be trained again
        self._end_reducer()
        if self.cuts and self._model is not None and (excess := self.excess(self._model)) is not None:
            early = f", before the last cut at step {last}" if state.global_step < (last := max(self.cuts)) else ""
            result = "is not trimmed" if state.global_step < min(self.cuts) else f"is larger than {self.config.budget}"
            self._warn(f"training ended at step {state.global_step}{early}: the model {result}: it has {excess}")


def _follow(optimizer: torch.optim.Optimizer, model: nn.Module, args: TrainingArguments) -> None:
    """In bf16, let the optimizer write the compact weights of masked layers, if there are any."""
    optimizer = unwrapped(optimizer)
    if args.bf16 and isinstance(optimizer, MaskedAdamW):
        optimizer.follow(model)
