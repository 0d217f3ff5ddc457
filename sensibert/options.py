"""What a run depends on, and how the model and the data that it names are read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from .artifacts import Budget
from .errors import SensibertError
from .models import base_type, families
from .schedule import Schedule
from .tasks import PRESETS, TaskData, load_examples

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
METHODS = ("fisher", "taylor", "saliency", "magnitude", "random", "paper", "dense")


@dataclass(frozen=True)
class Options:
    """Everything a run depends on. Fields left None take the preset's or the task's value."""

    model: str
    output: str
    train_file: str | None = None
    validation_file: str | None = None
    task: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    budget: str = "50%params"
    scope: str = "encoder"
    flops_length: int = 128
    method: str = "fisher"
    policy: str = "global"
    step: int | None = None
    samples: int = 1024
    micro_batch: int = 4
    schedule: Schedule = field(default_factory=Schedule)
    teacher: str | None = None  # a model folder or hub name, or "snapshot": the run's own dense model at the cut
    distil: float = 0.5
    temperature: float = 2.0
    epochs: float | None = None
    max_steps: int = -1
    learning_rate: float | None = None
    batch_size: int | None = None
    gradient_accumulation: int = 1
    weight_decay: float = 0.01
    max_length: int | None = None
    doc_stride: int | None = None
    precision: str = "fp32"
    seed: int = 0
    layout: str = "trimmed"
    save_steps: int | None = None  # None: at every epoch's end
    save_before_cut: bool = False  # so that runs with other budgets or methods can start from there
    keep_checkpoints: bool = False
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False

    def parsed_budget(self) -> Budget:
        return Budget.parse(self.budget, self.scope, self.flops_length)

    def check(self, needs_data: bool = True) -> None:
        """SensibertError for what can be told without reading data or model."""
        if self.method not in METHODS:
            raise SensibertError(f"method is {self.method!r}, want one of {', '.join(METHODS)}")
        if self.precision not in PRECISIONS:
            raise SensibertError(f"precision is {self.precision!r}, want one of {', '.join(PRECISIONS)}")
        for name in ("epochs", "learning_rate", "batch_size", "gradient_accumulation", "samples", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SensibertError(f"{name} is {value}, want more than 0")
        if not 0 <= self.distil <= 1 or self.temperature <= 0:
            raise SensibertError(f"distil is {self.distil}, temperature {self.temperature}, want [0, 1] and above 0")
        self.parsed_budget()
        if needs_data and self.task not in PRESETS and self.train_file is None:
            raise SensibertError(f"train_file is missing, want a file or a preset task ({', '.join(PRESETS)})")

    def resolved(self) -> Options:
        """With the preset's settings where nothing else was asked for."""
        preset = PRESETS.get(self.task or "")
        usual = {"epochs": 3, "learning_rate": 1e-4, "batch_size": 32}
        if preset:
            usual = {name: getattr(preset, name) for name in (*usual, "max_length")}
            if self.train_file is None:
                usual |= {"text_column": ",".join(preset.input_columns), "label_column": preset.label_column}
        return replace(self, **{name: value for name, value in usual.items() if getattr(self, name) is None})


def load_data(options: Options, tokenizer, label_names: list[str] | None = None) -> TaskData:
    """The files named by the options, or the preset's hub data, as features."""
    preset = PRESETS.get(options.task or "")
    if options.train_file is None and preset:
        train = load_examples(preset.source, preset.train_split)
        validation = load_examples(preset.source, preset.validation_split)
    else:
        train = load_examples(options.train_file)
        validation = load_examples(options.validation_file) if options.validation_file else None
    return TaskData.build(
        options.task,
        train,
        validation,
        tokenizer,
        options.max_length,
        options.doc_stride,
        options.text_column,
        options.label_column,
        label_names,
    )


def load_tokenizer(source: str):
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise SensibertError(f"model: no tokenizer in {source} ({first_line(error)})") from None


def load_model(source: str, data: TaskData | None = None) -> nn.Module:
    """A pre-trained encoder, with a head for the task if data is given. Unknown families are refused first."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise SensibertError(f"model: cannot read {source} ({first_line(error)})") from None
    if base_type(config.model_type) not in families():
        raise SensibertError(
            f"model: family {config.model_type!r} is not supported, want one of {', '.join(sorted(families()))}; "
            "a new family is one table in sensibert/models/ (see CONTRIBUTING)"
        )
    kwargs = {name: value for name, value in data.config_kwargs().items() if value is not None} if data else {}
    try:
        return (data.auto_class() if data else AutoModel).from_pretrained(source, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise SensibertError(f"model: cannot load {source} ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
