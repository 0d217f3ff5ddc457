"""What a run depends on: names, defaults, and what can be told before anything is read. Nothing heavy is imported
until it is needed, so that `sensibert --help` is quick."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING

from .core.errors import SensibertError
from .core.schedule import Schedule

if TYPE_CHECKING:
    import torch

    from .core.budget import Budget
    from .core.grid import Grid

PRECISIONS = ("fp32", "bf16")
METHODS = ("obs", "layer-obs", "fisher", "taylor", "saliency", "magnitude", "random", "paper", "dense")
POLICIES = ("global", "uniform", "exact")
LAYOUTS = ("trimmed", "dense", "both")
GRIDS = ("unit", "element", "block64")
KFAC_METHODS = ("obs", "layer-obs")  # what goes is chosen in view of what the others can take over
UNITS_ONLY = (*KFAC_METHODS, "paper")
SNAPSHOT, AVERAGE = "snapshot", "average"
_CHOICES = {"method": METHODS, "precision": PRECISIONS, "policy": POLICIES, "layout": LAYOUTS}
_POSITIVE = (
    *("epochs", "learning_rate", "batch_size", "gradient_accumulation", "samples", "micro_batch", "temperature"),
    *("step", "save_steps", "flops_length", "max_length"),
)
_INVOCATION = ("resume", "overwrite", "quiet")  # how a run was started, not what it is


def parse_grid(text: str) -> Grid | None:
    """`unit` (heads and neurons: no grid), `element`, `block64` or any other block<size>."""
    from .core.grid import Grid

    block = re.fullmatch(r"block([1-9]\d*)", text)
    if text not in GRIDS and not block:
        raise SensibertError(f"grid is {text!r}, want one of {', '.join(GRIDS)} (or another block<size>)")
    return None if text == "unit" else Grid.block(int(block[1]), int(block[1])) if block else Grid.element()


def default_method(grid: object) -> str:
    """For a grid as an option, or parsed."""
    return "obs" if grid in (None, "unit") else "fisher"


def grid_name(grid: Grid | None) -> str:
    """Inverse of parse_grid, for any grid."""
    if grid is None:
        return "unit"
    square = grid.block_rows == grid.block_cols > 1
    return f"block{grid.block_rows}" if square else str(grid)


def check_blocks(
    grid: Grid, method: str | None, policy: str, step: int | None, compensate: bool | None, search: int
) -> None:
    """SensibertError for a setting that means whole units, where blocks of a grid are masked."""
    given = {"policy": policy, "search": search, "method": method, "step": step, "compensate": compensate}
    wrong = {"policy": policy == "exact", "method": method in UNITS_ONLY, "step": step is not None}
    for name in filter({**given, **wrong}.get, given):
        said = f"{name} is {given[name]!r}, which means whole units"
        raise SensibertError(f"{said}, and grid is {grid_name(grid)!r}: want grid unit, or another {name}")


@dataclass(frozen=True)
class Options:
    """Everything a run depends on. Fields left None take the preset's, the task's or the method's value."""

    model: str
    output: str
    train_file: str | None = None
    validation_file: str | None = None
    task: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    budget: str = "50%params"
    grid: str = "unit"
    scope: str = "encoder"
    flops_length: int = 128
    method: str | None = None  # obs; of the blocks of a grid, fisher
    policy: str = "global"
    step: int | None = None
    samples: int = 1024
    micro_batch: int = 4
    compensate: bool | None = None  # solve the consuming weights anew at each cut; None: with obs and layer-obs
    search: int = 0  # trials of a search for shares of the layers by the true loss
    schedule: Schedule = field(default_factory=Schedule)
    # a model folder or hub name; "snapshot": the run's own dense model at the cut; "average": of its weights since then
    teacher: str | None = None
    distil: float = 0.5
    distil_hidden: float = 0.0
    temperature: float = 2.0
    average_decay: float = 0.99
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
        from .core.budget import Budget

        return Budget.parse(self.budget, self.scope, self.flops_length)

    def autocast(self) -> torch.dtype | None:
        """The dtype of a mixed-precision forward pass."""
        import torch

        return torch.bfloat16 if self.precision == "bf16" else None

    def check(self, needs_data: bool = True) -> None:
        """SensibertError for what can be told without reading data or model."""
        from .data import PRESETS, get_task

        for name, known in _CHOICES.items():
            if getattr(self, name) not in (*known, getattr(Options, name)):
                raise SensibertError(f"{name} is {getattr(self, name)!r}, want one of {', '.join(known)}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SensibertError(f"{name} is {value}, want more than 0")
        if self.search < 0:
            raise SensibertError(f"search is {self.search}, want a number of trials of at least 0")
        if not 0 <= self.distil <= 1:
            raise SensibertError(f"distil is {self.distil}, want a weight in [0, 1]")
        if not 0 <= self.distil_hidden < math.inf:
            raise SensibertError(f"distil_hidden is {self.distil_hidden}, want a weight of at least 0")
        if self.distil_hidden and self.teacher is None:
            raise SensibertError(f"distil_hidden is {self.distil_hidden}, and there is no teacher: want one, or 0")
        if not 0 <= self.average_decay < 1:
            raise SensibertError(f"average_decay is {self.average_decay}, want a share in [0, 1)")
        if not 0 <= self.weight_decay < math.inf:
            raise SensibertError(f"weight_decay is {self.weight_decay}, want at least 0")
        if self.max_steps < 1 and self.max_steps != -1:
            raise SensibertError(f"max_steps is {self.max_steps}, want at least 1, or -1 to count epochs")
        if not 0 <= self.seed < 2**32:
            raise SensibertError(f"seed is {self.seed}, want 0 to {2**32 - 1}")
        if self.teacher in (SNAPSHOT, AVERAGE) and self.method == "dense":
            raise SensibertError(f"teacher is {self.teacher!r}, which begins at the cut, and method dense never cuts")
        self.parsed_budget()
        self._check_grid()
        if self.task is not None:
            get_task(self.task)
        if needs_data and self.task not in PRESETS and self.train_file is None:
            raise SensibertError(f"train_file is missing, want a file or a preset task ({', '.join(PRESETS)})")

    def _check_grid(self) -> None:
        from .core.cost import check_budget

        grid = parse_grid(self.grid)
        if grid is None or self.method == "dense":
            return
        check_budget(self.parsed_budget(), grid)
        check_blocks(grid, self.method, self.policy, self.step, self.compensate, self.search)

    def resolved(self) -> Options:
        """With the preset's and the method's settings where nothing else was asked for."""
        from .data import PRESETS

        preset, usual = PRESETS.get(self.task or ""), {"epochs": 3, "learning_rate": 1e-4, "batch_size": 32}
        if preset:
            usual = {name: getattr(preset, name) for name in (*usual, "max_length")}
        usual["method"] = default_method(self.grid)
        usual["compensate"] = (self.method or usual["method"]) in KFAC_METHODS
        return replace(self, **{name: value for name, value in usual.items() if getattr(self, name) is None})

    def settings(self) -> dict:
        """The run in the words of the command line, as --config reads them."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _INVOCATION}
        shape = asdict(self.schedule)
        return {**found, "schedule": shape.pop("shape"), **shape}
