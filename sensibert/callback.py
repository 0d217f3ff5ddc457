"""TrimCallback: when a running Trainer decides, trims and recovers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .core import cost
from .core.arguments import checked
from .core.artifacts import BlockPlan, Plan, Sensitivity, UnitPlan
from .core.budget import Budget
from .core.config import TrimConfig
from .core.errors import SensibertError
from .core.layout import Layout
from .core.rows import Rows
from .core.schedule import Schedule
from .data.batching import micro_batches
from .decide import Choose, decide
from .models import base_of, layout_of, sites
from .models.masks import cost_of, masks_of
from .models.reloadable import stock_class
from .models.structure import STRUCTURE, is_trimmed, read_structure, structure_of
from .optim import MaskedAdamW, unwrapped
from .sensitivity import sampled_loss
from .sensitivity.gradients import Loss
from .training.checkpoints import MEMORY, learns_by, refuse_trimmed_weights, seal, want_same
from .training.recovery import Recovery
from .training.run_memory import RunMemory
from .training.trainer import want_one_process
from .trimming import restructure, trim

SHARE_OF_SAMPLES = 1 / 64  # the analysis reads at most this fraction of the samples that a run trains on
# Settings that the weights after a cut depend on. `_settings` adds budget, scope, grid and method as text.
COMPARED = ("allocation", "width_multiple", "samples", "micro_batch", "compensate")
COMPARED_OF_SCHEDULE = ("recovery", "rewarm_ratio", "recover_peak", "recover_dropout")
SCORES = "sensitivity.safetensors"  # of a checkpoint


class TrimCallback(TrainerCallback):
    """Trims the model of a running transformers.Trainer. Add it to `callbacks=`; nothing else has to change.

    config: a `TrimConfig`, or a budget as text, "50%params". The analysis draws rows from the Trainer's training set
    and uses its seed and, with bf16=True, its precision. The trimmed model saves itself: `trainer.save_model(folder)`
    writes a folder that `AutoModel...from_pretrained` reloads. With `load_best_model_at_end`, only checkpoints of the
    trimmed model count. To resume an interrupted run use `TrimTrainer` instead of Trainer.

    loss: (outputs, batch, generator) -> loss with labels drawn from the prediction, for obs and fisher. before_cut:
    called with the model just before the first cut; its return value is saved as the scores at the cut.
    save_before_cut: also save a checkpoint one step before the first cut. choose: (model, micro-batches, budget) ->
    Plan, in place of analyze and allocate.

    The constructor raises SensibertError for invalid settings. Training raises it at the start if trimming cannot work
    in this Trainer: several processes, a data set without a length, a frozen encoder. A warning is logged if training
    ends before the last cut."""

    restructure = staticmethod(restructure)  # called by `TrimTrainer` before it loads a checkpoint

    @checked
    def __init__(
        self,
        config: TrimConfig | str = "50%params",
        *,
        loss: Loss = sampled_loss,
        before_cut: Callable[[nn.Module], dict[str, float] | None] | None = None,
        save_before_cut: bool = False,
        choose: Choose | None = None,
    ) -> None:
        if not isinstance(config, TrimConfig):
            config = TrimConfig(config)
        self.config = config.resolved()
        self.loss, self.before_cut, self.save_before_cut, self.choose = loss, before_cut, save_before_cut, choose
        self.memory, self.recovery = RunMemory(), Recovery()
        self.cuts: dict[int, float] = {}  # step -> progress of the trimming
        self.sensitivity: Sensitivity | None = None  # of the untrimmed model
        self.layout: Layout | None = None  # of the untrimmed model
        self._model: nn.Module | None = None  # that layout and memory belong to
        self._units: dict[str, Tensor] = {}  # of the untrimmed model, numbered as in its base model
        self._guard: RemovableHandle | None = None  # until training begins: explains why a checkpoint does not fit
        self._checkpoint: Path | None = None  # the run resumes from it
        self._made_with: dict[str, object] | None = None  # settings saved in that checkpoint

    @property
    def schedule(self) -> Schedule:
        return self.config.schedule

    @property
    def budget(self) -> Budget:
        return self.config.parsed_budget()

    @checked
    def prepare(self, model: nn.Module, checkpoint: str | Path | None = None) -> None:
        """Record the costs of the untrimmed model; with a checkpoint, restore the run's memory from it. SensibertError
        for a budget that this model cannot meet."""
        self._model, self.layout, self._units = model, layout_of(model), structure_of(model)
        self.sensitivity = None
        counts, budget, grid = cost.counts_of(self.layout), self.budget, self.config.parsed_grid()
        if self.config.trims:
            cost.want_reach(self.layout, budget, grid)
            if grid is not None and is_trimmed(model):
                raise SensibertError(f"model: units were removed already, want an untrimmed model for grid {grid}")
        self.memory = RunMemory(
            cost.spent(self.layout, counts, budget),
            (self.layout.encoder_params, self.layout.total_params),
            cost.flops(self.layout, counts, budget.scope, 1, budget.length),
        )
        if checkpoint is not None:
            self._remember(Path(checkpoint))

    @checked
    def resume_from(self, checkpoint: str | Path) -> None:
        """Set the checkpoint that the Trainer loads. `TrimTrainer` calls this; a plain Trainer uses its output_dir."""
        self._checkpoint = Path(checkpoint)

    def _remember(self, checkpoint: Path) -> None:
        self._made_with = self.memory.restore(checkpoint)
        scores = checkpoint / SCORES
        self.sensitivity = Sensitivity.load(scores) if scores.exists() else None
        self._checkpoint = checkpoint

    def _settings(self, args: TrainingArguments, state: TrainerState) -> dict[str, object]:
        """Settings that the weights at this step depend on, saved in every checkpoint. Model, data and teacher are not
        compared."""
        done = [f"after step {step} ({100 * t:.0f} %)" for step, t in self.cuts.items() if step <= state.global_step]
        settings: dict[str, object] = {"cuts": ", ".join(done) or "none", "steps": state.max_steps}
        settings["warmup_ratio"] = self.schedule.warmup_ratio
        if done:
            config, budget = self.config, self.budget
            at = f" at {budget.length} tokens" if budget.kind == "flops" else ""
            settings |= {"budget": f"{budget} of the {budget.scope}{at}", "method": config.method, "grid": config.grid}
            settings |= {"choose": self.choose is not None, **{name: getattr(config, name) for name in COMPARED}}
            settings |= {name: getattr(self.schedule, name) for name in COMPARED_OF_SCHEDULE}
            settings["freeze_embeddings"] = self.schedule.freezes(self.left())
        return settings | learns_by(args)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model: nn.Module | None = kwargs.get("model")
        if model is None:  # a Trainer with model_init has none yet
            return
        if model is not self._model:  # before a checkpoint is loaded: the model is untrimmed still
            self.prepare(model)
        self._guard = model.register_load_state_dict_pre_hook(refuse_trimmed_weights)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        optimizer: torch.optim.Optimizer = kwargs["optimizer"]
        if self.config.trims:
            _refuse_trainer(args, model, getattr(kwargs["train_dataloader"], "dataset", None))
        if self._guard is not None:
            self._guard.remove()
            self._guard = None
        if self.layout is None and state.global_step and is_trimmed(model):
            raise SensibertError(
                "TrimCallback: it was added after the model was trimmed, want it among the Trainer's callbacks="
            )
        if model is not self._model and not (state.global_step and is_trimmed(model)):  # from model_init, or another
            self.prepare(model)
        self.cuts = self.schedule.cuts(state.max_steps) if self.config.trims else {}
        if state.global_step:
            checkpoint = self._checkpoint or _checkpoint_of(args, state)
            if self._made_with is None and (checkpoint / MEMORY).exists():
                self._remember(checkpoint)
            if self._made_with:
                want_same(checkpoint, self._made_with, self._settings(args, state))
            if masks_of(model) is None and not is_trimmed(model) and (checkpoint / STRUCTURE).exists():
                restructure(model, read_structure(checkpoint / STRUCTURE))  # a plain Trainer loads zeros, not masks
        self._checkpoint = self._made_with = None  # a later train() is another run
        if any(step <= state.global_step for step in self.cuts):
            _follow(optimizer, model, args)
        if self.cuts and state.global_step >= max(self.cuts):
            self.recovery.begin(model, optimizer, self.schedule, self.left())
        self.memory.restart_clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.save_before_cut and self.cuts and state.global_step == min(self.cuts) - 1:
            control.should_save = True
        if state.global_step not in self.cuts:
            return
        model: nn.Module = kwargs["model"]
        optimizer: torch.optim.Optimizer = kwargs["optimizer"]
        first = state.global_step == min(self.cuts)
        self.memory.spend("warm" if first else "trim")
        if first and self.before_cut is not None:
            self.memory.metrics_at_cut = self.before_cut(model)
            self.memory.spend("evaluate")
        plan = self._decide(model, state, args, kwargs["train_dataloader"])
        self.memory.spend("analyze")
        trim(model, plan, optimizer)
        if (entry := getattr(model.config, "sensibert", None)) is not None:
            entry["budget"] = str(self.budget)  # as requested; plan.budget is the absolute target of this cut
        _follow(optimizer, model, args)
        # Earlier checkpoints have other shapes and cannot be loaded as the best model.
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        if state.global_step == max(self.cuts):
            self.recovery.begin(model, optimizer, self.schedule, self.left())
        self.memory.spend("cut")

    def _decide(self, model: nn.Module, state: TrainerState, args: TrainingArguments, loader: DataLoader) -> Plan:
        """The plan of this step's cut. With `compensate`, also adjusts the kept weights of the model."""
        per_step = args.train_batch_size * args.gradient_accumulation_steps
        allowed = max(16 * self.config.micro_batch, int(state.max_steps * per_step * SHARE_OF_SAMPLES))
        samples = max(1, min(self.config.samples, allowed) // len(self.cuts))
        seed = args.seed + state.global_step
        rows = cast(Rows, loader.dataset)  # `_refuse_trainer` refuses one without a length

        def batches(number: int, size: int) -> Iterator[dict]:
            return micro_batches(rows, loader.collate_fn, number, size, seed)

        first, autocast = state.global_step == min(self.cuts), torch.bfloat16 if args.bf16 else None
        plan, sensitivity = decide(
            model, self.config, self._target(self.cuts[state.global_step]), batches, samples, args.train_batch_size,
            seed, self.loss, autocast, first, self.choose,
        )  # fmt: skip
        if first:
            self.sensitivity = sensitivity
        return plan

    def left(self) -> float:
        """Fraction of the encoder's cost that remains under the budget; 1 without trimming."""
        return cost.encoder_left(self._untrimmed(), self.budget) if self.config.trims else 1.0

    def _target(self, progress: float) -> Budget:
        """The budget at this point of the schedule, as an absolute number: the model may have been trimmed before."""
        budget, before = self.budget, self.memory.cost_before
        value = budget.value
        if progress < 1 or budget.relative:
            value = before * self.schedule.ratio(progress, value if budget.relative else value / before)
        return replace(budget, relative=False, value=float(int(value)))

    def whole_plan(self, model: nn.Module) -> Plan:
        """All cuts so far as one plan of the untrimmed model."""
        layout, masks, method = self._untrimmed(), masks_of(model), self.config.method
        assert method is not None  # of a resolved config
        if masks is not None:
            return BlockPlan(layout, masks.keep, self.budget, method, grid=masks.grid)
        kept = structure_of(model)
        keep = {name: torch.isin(units, kept[name]) for name, units in self._units.items()}
        return UnitPlan(layout, keep, self.budget, method)

    def _untrimmed(self) -> Layout:
        if self.layout is None:
            raise SensibertError("TrimCallback: it has seen no model yet, want it among the callbacks of a Trainer")
        return self.layout

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs, model = kwargs.get("logs"), kwargs.get("model")
        if logs is not None and model is not None and "loss" in logs:
            logs["sensibert/encoder_params"] = cost_of(model)[0]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model: nn.Module = kwargs["model"]
        self.memory.spend("recover" if self.cuts and state.global_step >= max(self.cuts) else "warm")
        folder = _checkpoint_of(args, state)
        if self.sensitivity is not None:
            self.sensitivity.save(folder / SCORES)
        seal(folder, model, self.memory.saved(self._settings(args, state)))
        self.memory.spend("save")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.memory.spend("recover" if self.cuts else "train")
        self.recovery.end()
        if self.cuts and state.global_step < max(self.cuts):
            result = "is not trimmed" if state.global_step < min(self.cuts) else f"is larger than {self.config.budget}"
            logging.getLogger("sensibert").warning(
                "TrimCallback: training ended at step %d, before the last cut at step %d: the model %s",
                *(state.global_step, max(self.cuts), result),
            )


def _checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None  # TrainingArguments fills it in
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _follow(optimizer: torch.optim.Optimizer, model: nn.Module, args: TrainingArguments) -> None:
    """In bf16, let the optimizer write the compact weights of masked layers, if there are any."""
    optimizer = unwrapped(optimizer)
    if args.bf16 and isinstance(optimizer, MaskedAdamW):
        optimizer.follow(model)


def _refuse_trainer(args: TrainingArguments, model: nn.Module, data: Dataset | None) -> None:
    """SensibertError for a Trainer that would fail at or after the cut."""
    want_one_process(args)
    if args.save_strategy != "no" and isinstance(model, PreTrainedModel):
        stock_class(model)  # raises for a class whose trimmed model could not be saved
    if isinstance(data, IterableDataset):
        raise SensibertError(
            "TrimCallback: train_dataset is an IterableDataset, want one with a length and an index: the analysis "
            "draws rows from it"
        )
    trimmable = {member.parameter for site in sites(model) for member in site.members}
    if not any(weight.requires_grad for name, weight in base_of(model).named_parameters() if name in trimmable):
        raise SensibertError(
            "TrimCallback: every trimmable parameter has requires_grad=False; unfreeze the encoder, or remove "
            "TrimCallback"
        )
