"""TrimCallback: when a running Trainer decides, trims and recovers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from .allocation.allocate import allocate
from .allocation.search import search_shares
from .core import cost
from .core.artifacts import Plan, Sensitivity
from .core.budget import Budget
from .core.errors import SensibertError
from .core.grid import Grid
from .core.layout import Layout
from .core.schedule import Schedule
from .data import micro_batches
from .models import bare_copy, base_of, embeddings_of, eval_mode, layout_of, sites
from .models.masks import kept_of
from .models.reloadable import stock_class
from .models.structure import is_trimmed, structure_of
from .run_options import KFAC_METHODS, Options, check_blocks, default_method, grid_name, parse_grid
from .sensitivity import sampled_loss
from .sensitivity.analyze import analyze
from .sensitivity.kfac_obs import FisherFactors, collect_factors
from .sensitivity.ranking import rank_tensors
from .training.checkpoints import MEMORY, learns_by, seal, want_same
from .training.trainer import want_one_process
from .trimming.compensate import compensate
from .trimming.self_check import silenced
from .trimming.trim import restructure, trim

SHARE_OF_SAMPLES = 1 / 64  # of all samples a run trains on: what the analysis may look at
RANKED_SAMPLES = 64  # for the ranking of whole tensors, a table for people
Choose = Callable[[nn.Module, Iterator[dict], Budget], Plan]


@dataclass
class Memory:
    """What a run must not forget when it is resumed; kept in every checkpoint."""

    layout_dense: int = 0  # the budget's cost of the dense model
    params_before: tuple[int, int] = (0, 0)  # encoder, total
    flops_before: int = 0
    metrics_dense: dict[str, float] | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class TrimCallback(TrainerCallback):
    """Trims the model of a running Trainer at the steps of a schedule. For your own Trainer: add it, nothing else.

    budget, method, schedule: see `Options`. loss: draws labels (`sampled_loss`), for obs and fisher.
    before_cut: called with the dense model, once. save_before_cut: a checkpoint at the last dense step. choose: (model,
    micro-batches, budget) -> Plan, in place of analyze and allocate. compensate: the kept units take over before a cut,
    whoever chose them; None: with obs and layer-obs. grid: mask blocks of the weights, cut no units. search: trials of
    `sensibert.search`, each worth a cut and a forward pass of what was analyzed.
    Data and collator are those of the Trainer's train loader. A run that may have to be resumed wants `TrimTrainer`,
    with the callback among its `callbacks=`: the stock Trainer cannot load a checkpoint of a trimmed model.
    SensibertError at once for settings that cannot be, and when the training begins for a Trainer in which trimming
    cannot work: several processes, data without a length, a frozen encoder, `load_best_model_at_end`."""

    restructure = staticmethod(restructure)  # what `TrimTrainer` asks for when it loads a checkpoint

    def __init__(
        self,
        budget: Budget | str = "50%params",
        method: str | None = None,
        schedule: Schedule | None = None,
        samples: int = 1024,
        micro_batch: int = 4,
        step: int | None = None,
        policy: str = "global",
        seed: int = 0,
        autocast: torch.dtype | None = None,
        loss: Callable = sampled_loss,
        before_cut: Callable[[nn.Module], dict[str, float] | None] | None = None,
        save_before_cut: bool = False,
        choose: Choose | None = None,
        compensate: bool | None = None,
        grid: Grid | str | None = None,
        search: int = 0,
    ):
        grid = parse_grid(grid) if isinstance(grid, str) else grid
        self.budget = Budget.parse(budget) if isinstance(budget, str) else budget
        self.method, self.schedule = method or default_method(grid), schedule or Schedule()
        self.step, self.policy = step, policy
        self.samples, self.micro_batch, self.seed = samples, micro_batch, seed
        self.compensate = self.method in KFAC_METHODS if compensate is None else compensate
        asked = {"method": self.method, "step": step, "policy": policy, "compensate": self.compensate, "search": search}
        Options("", "", **asked, samples=samples, micro_batch=micro_batch, seed=seed).check(needs_data=False)
        if grid is not None:
            check_blocks(grid, **asked)
        self.autocast, self.loss = autocast, loss
        self.before_cut, self.save_before_cut, self.memory = before_cut, save_before_cut, Memory()
        self.choose, self.grid, self.search = choose, grid, search
        self.sensitivity: Sensitivity | None = None  # of the dense model
        self.layout: Layout | None = None  # of the dense model
        self._units: dict[str, Tensor] = {}  # of the dense model, in the numbers of its base model
        self._checkpoint: Path | None = None  # what the run goes on from
        self._made_with: dict[str, object] | None = None  # the settings of that, once its memory has been taken up
        self._aside: list[tuple[object, str, object]] = []  # what recovery has changed: (of whom, what, what it was)
        self._clock = time.perf_counter()

    def prepare(self, model: nn.Module, checkpoint: str | Path | None = None) -> None:
        """Note the costs of the dense model; with a checkpoint, take up its memory."""
        self.layout = layout = layout_of(model)
        self._units = structure_of(model)
        counts = cost.counts_of(layout)
        if self.method != "dense":
            cost.want_reach(layout, self.budget, self.grid)
            if self.grid is not None and is_trimmed(model):
                raise SensibertError(f"model: it has lost whole units already, want a whole one for grid {self.grid}")
        self.memory = Memory(
            cost.spent(layout, counts, self.budget) if self.budget.kind != "ms" else 0,
            (layout.encoder_params, layout.total_params),
            cost.flops(layout, counts, self.budget.scope, 1, self.budget.length),
        )
        if checkpoint is not None:
            self._remember(Path(checkpoint))

    def resume_from(self, checkpoint: str | Path) -> None:
        """What the Trainer loads; `TrimTrainer` says so, a stock one has its checkpoints in its output_dir."""
        self._checkpoint = Path(checkpoint)

    def _remember(self, checkpoint: Path) -> None:
        """Take up the memory of a checkpoint."""
        kept = json.loads((checkpoint / MEMORY).read_text())
        self.memory.metrics_dense, self.memory.seconds = kept["metrics_dense"], kept["seconds"]
        self.sensitivity = _load_if(Sensitivity, checkpoint / "sensitivity.safetensors")
        self._checkpoint, self._made_with = checkpoint, kept.get("settings", {})

    def _settings(self, args: TrainingArguments, state: TrainerState) -> dict[str, object]:
        """What the weights of this step depend on, beside model, data and teacher; kept in every checkpoint."""
        behind = [f"after step {step} ({100 * t:.0f} %)" for step, t in self.cuts.items() if step <= state.global_step]
        found = {"cuts": ", ".join(behind) or "none", "steps": state.max_steps, "warmup": self.schedule.warmup}
        if behind:
            at = f" at {self.budget.length} tokens" if self.budget.kind == "flops" else ""
            found |= {"budget": f"{self.budget} of the {self.budget.scope}{at}", "method": self.method}
            found |= {"grid": grid_name(self.grid), "choose": self.choose is not None}
            for name in ("policy", "step", "samples", "micro_batch", "compensate", "search"):
                found[name] = getattr(self, name)
            for name in ("recovery", "rewarm", "recover_peak", "recover_dropout"):
                found[name] = getattr(self.schedule, name)
            found["freeze_embeddings"] = self.schedule.freezes(self.left())
        return found | learns_by(args)

    def started(self, clock: float) -> None:
        """Book what came before the training, since that reading of time.perf_counter()."""
        self._clock = clock
        self.spend("load")

    def spend(self, phase: str) -> None:
        """Book the seconds since the last booking on a phase."""
        now = time.perf_counter()
        self.memory.seconds[phase] = self.memory.seconds.get(phase, 0.0) + now - self._clock
        self._clock = now

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if self.layout is None and model is not None:  # before a checkpoint is loaded: the model is still dense
            self.prepare(model)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        if self.method != "dense":
            _refuse_trainer(args, model, getattr(train_dataloader, "dataset", None))
        if self.layout is None:
            if state.global_step and is_trimmed(model):
                raise SensibertError(
                    "TrimCallback: it came after the model was cut, want it among the Trainer's callbacks="
                )
            self.prepare(model)
        self.cuts = {} if self.method == "dense" else self.schedule.cuts(state.max_steps)
        if state.global_step:
            checkpoint = self._checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if self._made_with is None and (checkpoint / MEMORY).exists():
                self._remember(checkpoint)
            if self._made_with:
                want_same(checkpoint, self._made_with, self._settings(args, state))
        self._checkpoint = self._made_with = None  # the next training of this callback is another one
        if self.cuts and state.global_step >= max(self.cuts):
            self._recover(model, optimizer)
        self._clock = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        if self.save_before_cut and self.cuts and state.global_step == min(self.cuts) - 1:
            control.should_save = True
        if state.global_step not in self.cuts:
            return
        first = state.global_step == min(self.cuts)
        self.spend("warm" if first else "trim")
        if first and self.before_cut is not None:
            self.memory.metrics_dense = self.before_cut(model)
            self.spend("evaluate")
        plan = self._decide(model, state, args, train_dataloader)
        self.spend("analyze")
        trim(model, plan, optimizer)
        state.best_metric = state.best_model_checkpoint = None  # a checkpoint from before the cut fits no longer
        if state.global_step == max(self.cuts):
            self._recover(model, optimizer)
        self.spend("cut")

    def _decide(self, model: nn.Module, state, args, loader) -> Plan:
        """Analyze and allocate for this step's share of the way; the kept units of the model may take over."""
        per_step = args.train_batch_size * args.gradient_accumulation_steps
        allowed = max(16 * self.micro_batch, int(state.max_steps * per_step * SHARE_OF_SAMPLES))
        samples = max(1, min(self.samples, allowed) // len(self.cuts))
        seed = self.seed + state.global_step

        def batches(number: int, size: int) -> Iterator[dict]:
            return micro_batches(loader.dataset, loader.collate_fn, number, size, seed)

        target, factors, sensing = self._target(self.cuts[state.global_step]), None, self.choose is None
        if self.compensate or (sensing and self.method in KFAC_METHODS):
            rows = batches(samples, args.train_batch_size)  # sums over tokens: the size of a batch does not matter
            loss = None if self.method == "layer-obs" else self.loss
            factors = collect_factors(model, layout_of(model), rows, loss, seed, self.autocast)
        few = batches(samples, self.micro_batch)
        if sensing:
            found = analyze(model, few, self.method, self.loss, seed, self.autocast, self.grid, factors)
            if state.global_step == min(self.cuts):
                few = batches(min(samples, RANKED_SAMPLES), self.micro_batch)
                self.sensitivity = replace(found, tensors=rank_tensors(model, few, self.loss, seed, self.autocast))

            def allocated(scores: Sensitivity) -> Plan:
                return allocate(scores, target, self.step, self.policy)

            def loss_of(plan: Plan) -> float:
                return self._loss_after(model, plan, factors, batches(samples, args.train_batch_size))

            plan = search_shares(found, allocated, loss_of, self.search, seed) if self.search else allocated(found)
        else:
            plan = self.choose(model, few, target)
        if self.compensate:
            compensate(model, plan, factors)
        return plan

    @torch.no_grad()
    def _loss_after(
        self, model: nn.Module, plan: Plan, factors: dict[str, FisherFactors] | None, batches: Iterator[dict]
    ) -> float:
        """Mean loss, with the given labels, of a copy that is cut like that."""
        copied, total, rows = bare_copy(model), 0.0, 0
        if self.compensate:
            compensate(copied, plan, factors)
        with eval_mode(copied, self.autocast) as device, silenced(copied, plan), torch.no_grad():
            for batch in batches:
                size = len(next(iter(batch.values())))
                total += size * float(copied(**{name: value.to(device) for name, value in batch.items()}).loss)
                rows += size
        return total / rows

    def _recover(self, model: nn.Module, optimizer) -> None:
        p = self.schedule.dropout()
        for module in model.modules() if p is not None else ():
            name = "p" if isinstance(module, nn.Dropout) else "attention_dropout"  # a number in ModernBERT
            if isinstance(getattr(module, name, None), float):
                self._set_aside(module, name, p)
        if self.schedule.freezes(self.left()):
            for weight in embeddings_of(model).parameters():
                self._set_aside(weight, "requires_grad", False)
                optimizer.state.pop(weight, None)  # half of what MiniLM's AdamW remembers

    def _set_aside(self, owner: object, name: str, value: object) -> None:
        self._aside.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def left(self) -> float:
        """The share of the encoder's cost that the budget leaves; of the dense control all of it."""
        return 1.0 if self.method == "dense" else cost.encoder_left(self.layout, self.budget)

    def _target(self, progress: float) -> Budget:
        """The budget at this point of the schedule, absolute, since the model at hand may be smaller already."""
        dense, value = self.memory.layout_dense, self.budget.value
        if progress < 1 or self.budget.relative:
            value = dense * self.schedule.ratio(progress, value if self.budget.relative else value / dense)
        return replace(self.budget, relative=False, value=float(int(value)))

    def whole_plan(self, model: nn.Module) -> Plan:
        """All cuts so far as one plan of the dense model."""
        kept, layout, budget = structure_of(model), self.layout, self.budget
        keep, grid = kept_of(model)
        if keep is None:
            keep = {name: torch.isin(units, kept[name]) for name, units in self._units.items()}
        sizes = cost.left(layout, keep, grid, budget.scope, budget.length)
        return Plan(layout, keep, budget, self.method, *sizes, grid=grid)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if logs is not None and model is not None and "loss" in logs:
            logs["sensibert/encoder_params"] = cost.left(layout_of(model), *kept_of(model))[0]

    def on_save(self, args, state, control, model=None, **kwargs):
        self.spend("recover" if self.cuts and state.global_step >= max(self.cuts) else "warm")
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.sensitivity is not None:
            self.sensitivity.save(folder / "sensitivity.safetensors")
        memory = {"settings": self._settings(args, state)}
        memory |= {"metrics_dense": self.memory.metrics_dense, "seconds": self.memory.seconds}
        seal(folder, model, memory)
        self.spend("save")

    def on_train_end(self, args, state, control, **kwargs):
        self.spend("recover" if self.cuts else "train")
        for owner, name, value in self._aside:
            setattr(owner, name, value)
        self._aside.clear()


def _refuse_trainer(args: TrainingArguments, model: nn.Module, data: Dataset | None) -> None:
    """SensibertError for a Trainer that would fail at the cut or, worse, behind it."""
    want_one_process(args)
    if args.save_strategy != "no" and isinstance(model, PreTrainedModel):
        stock_class(model)  # of another class, no checkpoint can be written once it is cut
    if isinstance(data, IterableDataset):
        raise SensibertError("finetune: the analysis draws rows of the train set, want one with a length and an index")
    trimmable = {member.parameter for site in sites(model) for member in site.members}
    if not any(weight.requires_grad for name, weight in base_of(model).named_parameters() if name in trimmable):
        raise SensibertError("finetune: all that could be trimmed is frozen, want weights that learn")


def _load_if(kind: type, path: Path):
    return kind.load(path) if path.exists() else None
