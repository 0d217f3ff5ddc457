"""Everything a run depends on: the model, the data, the training and the trim. Slow modules are imported on first use,
so that `sensibert --help` is quick."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from .core.arguments import checked, fraction, show
from .core.budget import Budget
from .core.budgets import parse_budgets
from .core.config import LAYOUTS, PACKING, TRIMMING, TrimConfig, block_size_of, current_names, trim_names, want_known
from .core.errors import SensibertError
from .core.settings import NOT_NEGATIVE, POSITIVE, WEIGHT, Bound, check, setting, settings_of
from .data.tasks import EMBEDDING, LABELLED, PRESETS, TASKS, get_task

if TYPE_CHECKING:
    import torch

DEVICE: Bound = (lambda name: re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None, "auto, cpu, cuda or cuda:0")
PRECISIONS = ("fp32", "bf16", "auto")
OF_TRAINING, ALL_PIECES = "train", "all"  # values of `vocabulary`: the texts of the training file; all pieces
RESULT, RECIPE = "result.json", "recipe.json"  # files in the output of a run
SNAPSHOT = "snapshot"  # value of `teacher`: the run's own model at the cut
WITHOUT_GRADIENT = ("taylor", "saliency")  # statistics of a loss that is 0 for the original embeddings
NO_TRACKER = "none"
INVOCATION = ("resume", "overwrite", "quiet", "device", "report_to")  # how a run is started: not part of its recipe
PATHS = ("model", "output", "train_file", "validation_file", "teacher", "vocabulary")  # in which ~ is the home folder
USUAL = {"epochs": 3, "learning_rate": 1e-4, "batch_size": 32}  # defaults without a preset
# Defaults of embedding models, chosen by the results in docs/method.md. Steps: unless epochs are given.
USUAL_OF_EMBEDDING = {"learning_rate": 2.5e-4, "batch_size": 32, "save_steps": 500}
STEPS_OF_EMBEDDING = 3000
# Panels of the help. The most used options have none and come first.
DATA, TRAINING, DISTILLATION, OUTPUT = "Data", "Training", "Distillation", "Output and checkpoints"


@dataclass(frozen=True)
class Options:
    """Settings of a run. `resolved` replaces None by the value of the preset, or by the default.

    The constructor checks them: SensibertError names the first invalid value."""

    model: str = setting("", "Folder or hub name of a BERT-family model.")
    output: str = setting("", "Folder to write; it appears when the run is complete.")
    train_file: str | None = setting(
        None,
        "Training data: a csv, tsv, jsonl, json or parquet file, also .gz, or a hub name; for embeddings also txt, one "
        "text a line.",
    )
    validation_file: str | None = setting(None, "Validation data, in the same formats.")
    task: str | None = setting(
        None,
        f"{', '.join(TASKS)}, or a preset: {', '.join(PRESETS)}.",
        show_default="guessed from the columns or the model",
    )
    trim: TrimConfig = field(default_factory=TrimConfig)
    budgets: str | None = setting(
        None, "Several budgets in place of one, 75,50,30%params: a model for each, from one warm-up.", TRIMMING
    )
    keep: str | None = setting(
        None,
        "In place of a budget, the fraction of the untrimmed model's validation score to keep, 99%: finds the smallest "
        "model.",
        TRIMMING,
    )
    baseline: bool = setting(
        False,
        "Also train the model without trimming, from the cut to the same number of steps, and score it.",
        TRIMMING,
    )
    epochs: float | None = setting(
        None, "Passes over the training data.", bound=POSITIVE, show_default="3, or the preset's"
    )
    learning_rate: float | None = setting(
        None, "Peak learning rate.", bound=POSITIVE, show_default="1e-4, or the preset's"
    )
    text_column: str | None = setting(None, "Column with the input, or two columns: a,b.", DATA)
    label_column: str | None = setting(
        None, "Column with the labels, or for several labels a row columns of 0 and 1: a,b,c.", DATA
    )
    label_names: str | None = setting(
        None, "Names of labels that are integers, in the order of their values: a,b,c.", DATA
    )
    max_length: int | None = setting(
        None, "Maximum number of tokens per row.", DATA, bound=POSITIVE, show_default="128, for questions 384"
    )
    vocabulary: str | None = setting(
        None,
        f"File of texts, or {OF_TRAINING}, the training file: keep only the pieces of the vocabulary that they need. "
        f"{ALL_PIECES}: keep all.",
        DATA,
        show_default="all; a budget of MB chooses",
    )
    doc_stride: int | None = setting(
        None, "Tokens that two neighbouring windows of a long context share.", DATA, bound=NOT_NEGATIVE,
        show_default="128, at most max_length / 3",
    )  # fmt: skip
    batch_size: int | None = setting(
        None, "Rows per batch, of all processes together.", TRAINING, bound=POSITIVE, show_default="32, or the preset's"
    )
    gradient_accumulation: int = setting(1, "Batches per optimizer step.", TRAINING, bound=POSITIVE)
    max_steps: int = setting(
        -1,
        "Number of optimizer steps; replaces --epochs.",
        TRAINING,
        bound=(lambda n: n >= 1 or n == -1, "at least 1, or -1"),
    )
    weight_decay: float = setting(0.01, "Weight decay of AdamW.", TRAINING, bound=NOT_NEGATIVE)
    precision: str = setting(
        "fp32",
        "Precision of the forward and backward passes. auto: bf16 where the processor or GPU computes in it.",
        TRAINING,
        PRECISIONS,
    )
    packing: str = setting(
        "auto",
        "Batches without padding: auto packs where the model can, on fails where it cannot, off pads.",
        TRAINING,
        PACKING,
    )
    seed: int = setting(0, "Random seed.", TRAINING, bound=(lambda n: 0 <= n < 2**32, f"0 to {2**32 - 1}"))
    teacher: str | None = setting(
        None, f"Fine-tuned model to distil from, or {SNAPSHOT}: the run's own model at the cut.", DISTILLATION
    )
    distil: float = setting(0.5, "Weight of the distillation loss, from 0 to 1.", DISTILLATION, bound=WEIGHT)
    temperature: float = setting(2.0, "Temperature of the distillation.", DISTILLATION, bound=POSITIVE)
    device: str = setting(
        "auto",
        "Device to train on: cpu, cuda, cuda:1, or auto: the GPU if there is one.",
        TRAINING,
        bound=DEVICE,
    )
    eval_steps: int | None = setting(
        None,
        "Steps between evaluations on the validation file.",
        TRAINING,
        bound=POSITIVE,
        show_default="at the cut and at the end",
    )
    best: bool = setting(False, "End with the best evaluated checkpoint after the cut, by the main metric.", TRAINING)
    report_to: str = setting(
        NO_TRACKER, "Trackers that receive losses and scores: tensorboard, wandb, mlflow, ... or several: a,b.", OUTPUT
    )
    layout: str = setting(
        "trimmed",
        "trimmed: the small model. dense: the original sizes with zeros, loads everywhere. both: dense in a subfolder.",
        OUTPUT,
        LAYOUTS,
    )
    save_steps: int | None = setting(
        None, "Steps between checkpoints.", OUTPUT, bound=POSITIVE, show_default="one an epoch"
    )
    save_before_cut: bool = setting(False, "Save a checkpoint at the last step before trimming.", OUTPUT)
    keep_checkpoints: bool = setting(False, "Keep the checkpoints, in OUTPUT.partial.", OUTPUT)
    resume: bool = setting(False, "Continue from the last complete checkpoint.", OUTPUT)
    overwrite: bool = setting(False, "Replace an existing output.", OUTPUT)
    quiet: bool = setting(False, "Show only the last table.", OUTPUT)

    def __post_init__(self) -> None:
        check(self)
        for name in PATHS:
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, os.path.expanduser(path))
        if not isinstance(self.trim, TrimConfig):
            raise SensibertError(f"trim is {show(self.trim)}, want a TrimConfig")
        if self.teacher == SNAPSHOT and not self.trim.trims:
            raise SensibertError(
                f"teacher is {SNAPSHOT!r}, the model at the cut, but method baseline does not trim; want a model"
            )
        if self.vocabulary not in (None, ALL_PIECES) and self.teacher not in (None, SNAPSHOT):
            raise SensibertError("vocabulary and teacher are both given, and the teacher has a vocabulary of its own")
        if self.teacher == "average":
            raise SensibertError("teacher is 'average', which was removed; want a model or snapshot")
        if self.best and self.eval_steps is None:
            raise SensibertError("best is True, but eval_steps is missing; want the steps between two evaluations")
        if self.best and self.save_steps not in (None, self.eval_steps):
            raise SensibertError(
                f"save_steps is {self.save_steps}, but best saves at every evaluation; want it left out"
            )
        if self.task is not None:
            get_task(self.task)
        if self.label_names is not None:
            self._check_label_names()
        if self.task == EMBEDDING:
            self._check_embedding()
        for name in ("baseline", "budgets", "keep"):
            if getattr(self, name) and not self.trim.trims:
                raise SensibertError(f"{name} is {show(getattr(self, name))}, but method baseline does not trim")
        self.parsed_budgets()
        self.floor()

    def _check_label_names(self) -> None:
        names = self.names_of_labels()
        if len(names) < 2 or len(set(names)) < len(names) or "" in names:
            raise SensibertError(
                f"label_names is {show(self.label_names)}, want two or more different names, separated by commas"
            )
        if self.task is not None and (task := get_task(self.task).name) not in LABELLED:
            raise SensibertError(
                f"label_names is {show(self.label_names)}, but task {task} has no classes; want it left out"
            )

    def _check_embedding(self) -> None:
        usual = settings_of(Options)
        for name in ("teacher", "distil", "temperature"):
            if (value := getattr(self, name)) != usual[name].default:
                raise SensibertError(
                    f"{name} is {show(value)}, but task {EMBEDDING} learns the embeddings of the original model alone; "
                    "want it left out"
                )
        if self.keep:
            raise SensibertError(
                f"keep is {show(self.keep)}, but the scores of task {EMBEDDING} are no shares; want --budget"
            )
        if self.baseline:
            raise SensibertError(
                f"baseline is True, but task {EMBEDDING} learns the embeddings of the original model, which is its own "
                "baseline: want it left out"
            )
        if self.trim.method in WITHOUT_GRADIENT:
            raise SensibertError(
                f"method is {self.trim.method!r}, and for task {EMBEDDING} the loss has no gradient before the cut; "
                "want obs, layer-obs, fisher, magnitude or random"
            )

    @classmethod
    @checked
    def from_settings(cls, settings: Mapping[str, Any] | None = None, /, **more: Any) -> Options:
        """Build from flat settings under the names of the command line, as a mapping or keyword arguments. Former names
        are accepted. SensibertError names an unknown setting."""
        settings, own = current_names({**(settings or {}), **more}), settings_of(cls)
        want_known(settings, all_names(), "a run")
        trim = TrimConfig.from_settings({name: settings[name] for name in trim_names() & settings.keys()})
        return cls(**{name: settings[name] for name in own if name in settings}, trim=trim)

    def settings(self) -> dict[str, Any]:
        """All settings as a flat dict under the names of the command line, as `--config` reads them."""
        flat: dict[str, Any] = {}
        for f in fields(self):
            if f.name == "trim":
                flat |= self.trim.settings()
            elif f.name not in INVOCATION:
                flat[f.name] = getattr(self, f.name)
        return flat

    def autocast(self) -> torch.dtype | None:
        """The dtype of a mixed-precision forward pass."""
        import torch

        return torch.bfloat16 if self._precision() == "bf16" else None

    def _precision(self) -> str:
        if self.precision != "auto":
            return self.precision
        from .core.device import computes_in_bf16

        return "bf16" if computes_in_bf16(self.device) else "fp32"

    def parsed_budgets(self) -> list[Budget]:
        """Those of `budgets`, in its order. SensibertError for a text that does not list budgets."""
        if self.budgets is None:
            return []
        budgets = parse_budgets(self.budgets, self.trim.scope, self.trim.flops_length)
        if (block_size := block_size_of(self.trim.grid)) is not None:
            for budget in budgets:
                budget.check_grid(block_size == 1)
        return budgets

    def size_budgets(self) -> bool:
        """Whether a model of the run has a budget of size."""
        budgets = self.parsed_budgets() or ([] if self.keep else [self.trim.parsed_budget()])
        return self.trim.trims and any(budget.kind == "size" for budget in budgets)

    def chooses_vocabulary(self) -> bool:
        """Whether a budget of size may take fewer pieces: validation rows tell what that loses."""
        there = self.validation_file is not None or (self.task in PRESETS and self.train_file is None)
        return self.vocabulary is None and self.task != EMBEDDING and there and self.size_budgets()

    def floor(self) -> float:
        """`keep` as a fraction; 0 without it. SensibertError for what is no percentage below 100 %."""
        if self.keep is None:
            return 0.0
        if self.budgets is not None:
            raise SensibertError("keep and budgets are both given, want one of them")
        floor = fraction("keep", self.keep, "99%")
        if floor == 0:
            raise SensibertError(f"keep is {show(self.keep)}, want more than 0%")
        return floor

    def want_data(self) -> None:
        """SensibertError if there is neither a training file nor a preset that names one, or `keep` has no validation
        data."""
        if self.task not in PRESETS and self.train_file is None:
            raise SensibertError(f"train_file is missing, want a file or a preset task ({', '.join(PRESETS)})")
        from_preset = self.task in PRESETS and self.train_file is None
        if self.keep and self.validation_file is None and not from_preset:
            raise SensibertError(
                f"keep is {show(self.keep)}, but validation_file is missing, want one: the score is measured on it"
            )

    def want_validation_data(self) -> None:
        """SensibertError if there is nothing to evaluate on and evaluations are requested."""
        there = self.task == EMBEDDING or (self.task in PRESETS and self.train_file is None)
        if self.eval_steps is not None and self.validation_file is None and not there:
            raise SensibertError(
                f"eval_steps is {self.eval_steps}, but validation_file is missing; want a file to evaluate on"
            )

    def trackers(self) -> list[str]:
        """The names in report_to."""
        names = [name.strip() for name in self.report_to.split(",")]
        return [] if names == [NO_TRACKER] else names

    def resolved(self) -> Options:
        """Replace settings that are None by those of the preset, the defaults, or what the method implies."""
        preset, usual = PRESETS.get(self.task or ""), dict[str, Any](USUAL)
        if preset:
            usual = {name: getattr(preset, name) for name in (*usual, "max_length")}
        chosen: dict[str, Any] = {}
        if self.task == EMBEDDING:
            usual |= USUAL_OF_EMBEDDING
            if self.epochs is None and self.max_steps == -1:
                chosen["max_steps"] = STEPS_OF_EMBEDDING
        if self.best:
            usual["save_steps"] = self.eval_steps  # a best model is among the checkpoints
        chosen |= {name: value for name, value in usual.items() if getattr(self, name) is None}
        return replace(self, trim=self.trim.resolved(), precision=self._precision(), **chosen)

    def names_of_labels(self) -> list[str]:
        """`label_names`, one by one."""
        return [name.strip() for name in (self.label_names or "").split(",")]

    def rows(self) -> int | None:
        """How many rows max_steps reads; None if epochs tell how long the run is."""
        if self.max_steps == -1 or self.batch_size is None:
            return None
        return self.max_steps * self.batch_size * self.gradient_accumulation


def all_names() -> set[str]:
    """The flat names of all settings of a run."""
    return settings_of(Options).keys() | trim_names()
