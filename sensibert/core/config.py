"""TrimConfig: the one place for the settings of a trim, their defaults, choices and checks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .arguments import checked, one_of, show
from .budget import SCOPES, Budget
from .cost_table import RUNTIMES, WEIGHTS, CostTable
from .errors import SensibertError
from .json_text import parse_json
from .schedule import Schedule
from .settings import POSITIVE, check, former_names, setting, settings_of
from .statistics import FORMER_METHODS, STATISTICS

if TYPE_CHECKING:
    from .grid import Grid

BASELINE = "baseline"  # the same run without trimming
METHODS = (*STATISTICS, BASELINE)
ALLOCATIONS = ("global", "uniform", "exact")
GRIDS = ("unit", "element", "block64")
LAYOUTS = ("trimmed", "dense", "both")  # of an exported folder
PACKING = ("auto", "on", "off")
TRIMMING, MEASUREMENT = "Trimming", "Budgets of latency and size"  # panels of the help
# Removed settings -> the value that agrees with today's behaviour. Files with that value are still read.
RETIRED = {"search": 0, "distil_hidden": 0.0, "distil_until": None, "average_decay": 0.99}


def parse_grid(text: str) -> Grid | None:
    """`unit` (heads and neurons: no grid) -> None; `element`, `block64` or any other block<size> -> Grid."""
    size = block_size_of(text)
    if size is None:
        return None
    from .grid import Grid

    return Grid.block(size, size)


def block_size_of(text: str) -> int | None:
    """Rows and columns of the blocks of a grid, without importing torch; None for `unit`."""
    block = re.fullmatch(r"block([1-9]\d*)", text) if isinstance(text, str) else None
    if text not in GRIDS and not block:
        raise SensibertError(f"grid is {show(text)}, {one_of(text, GRIDS)} (or another block<size>)")
    return int(block[1]) if block else {"unit": None, "element": 1}[text]


def grid_name(grid: Grid | None) -> str:
    """Inverse of `parse_grid`, for any grid."""
    if grid is None:
        return "unit"
    square = grid.block_rows == grid.block_cols > 1
    return f"block{grid.block_rows}" if square else str(grid)


def parse_shape(text: str) -> tuple[int, int]:
    """`1x128` -> (1 row, 128 tokens); SensibertError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text) if isinstance(text, str) else None
    if not match:
        raise SensibertError(f"latency_shape is {show(text)}, want rows x tokens, for example 1x128")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class TrimConfig:
    """What to trim, to which budget, when and how. Frozen; the constructor checks the settings.

    budget: an upper bound, `50%params`, `30%flops`, `5.3Mparams` or `1.2Gflops`, of the encoder, or of the
    model with scope="model"; FLOPs are those of one sequence of flops_length tokens. Or `8ms` (or `50%latency`) of a
    forward pass of latency_shape rows x tokens in a runtime on latency_threads threads, or `12MB` (`50%size`) of the
    weights file for that runtime: costs are measured first, or read from latency_table. weights: the precision that the
    file will have, fp32 by default; `export` and `with_weights` write it. method: the statistic
    that scores units; None: `obs`, for blocks of a grid `fisher`; `baseline` runs without trimming. grid: `unit`
    removes attention heads and FFN neurons; `element` and `block<size>` set single weights or blocks to 0. allocation:
    one threshold for the whole model (`global`), the same fraction of every layer (`uniform`), or dynamic programming
    (`exact`). width_multiple: FFN widths become multiples of it; None: 64, or 32 below a hidden size of 768. samples:
    maximum number of training samples that the analysis reads, micro_batch at a time. compensate: adjust the kept
    weights by least squares at each cut; None: with `obs` and `layer-obs`. schedule: `Schedule`. SensibertError names
    the first invalid setting."""

    budget: str = setting(
        "50%params",
        "Upper bound on the encoder's size, or the model's latency or file: 50%params, 30%flops, 8ms, 12MB.",
    )
    method: str | None = setting(
        None,
        f"Statistic that scores units: {', '.join(STATISTICS)}; {BASELINE} does not trim.",
        TRIMMING,
        METHODS,
        renamed=FORMER_METHODS,
        show_default="obs; for a grid of blocks fisher",
    )
    grid: str = setting(
        "unit", "unit: remove heads and FFN neurons. element, block64: set weights or blocks to 0.", TRIMMING
    )
    scope: str = setting("encoder", "What the budget counts: encoder, or model (with embeddings and head).", TRIMMING,
                         SCOPES)  # fmt: skip
    allocation: str = setting(
        "global",
        "How the budget is divided among the layers. global: one threshold. uniform: the same fraction of every layer. "
        "exact: dynamic programming.",
        TRIMMING,
        ALLOCATIONS,
        was="policy",
    )
    width_multiple: int | None = setting(
        None, "FFN widths become multiples of this number.", TRIMMING, bound=POSITIVE, was="step",
        show_default="64, small models 32",
    )  # fmt: skip
    flops_length: int = setting(128, "Tokens per sequence when FLOPs are counted.", TRIMMING, bound=POSITIVE)
    samples: int = setting(
        1024, "Maximum number of training samples that the analysis reads.", TRIMMING, bound=POSITIVE
    )
    micro_batch: int = setting(
        4, "Samples per micro-batch of the analysis; gradients are squared per micro-batch.", TRIMMING, bound=POSITIVE
    )
    compensate: bool | None = setting(
        None,
        "At each cut, adjust the kept weights by least squares to make up for the removed ones.",
        TRIMMING,
        show_default="with obs and layer-obs",
    )
    runtime: str = setting("torch", "Runtime whose latency or file a budget of ms or MB counts.", MEASUREMENT, RUNTIMES)
    latency_shape: str = setting("1x128", "Rows x tokens of the forward pass that a budget of ms counts.", MEASUREMENT)
    latency_threads: int = setting(1, "Threads of that pass on a CPU.", MEASUREMENT, bound=POSITIVE)
    latency_table: str | None = setting(
        None, "File of `sensibert latency`, for example of another device.", MEASUREMENT, show_default="measured here"
    )
    weights: str | None = setting(
        None,
        "Precision of the weights in model.safetensors; fp16 is also that of the embeddings in a graph for --runtime.",
        MEASUREMENT,
        tuple(WEIGHTS),
        show_default="fp32; finetune chooses for a budget of MB",
    )
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        check(self)
        parse_shape(self.latency_shape)
        if not isinstance(self.schedule, Schedule):
            raise SensibertError(f"schedule is {show(self.schedule)}, want a Schedule")
        budget, block_size = self.parsed_budget(), block_size_of(self.grid)
        if block_size is None or self.method == BASELINE:
            return
        budget.check_grid(block_size == 1)
        units_only = self.method is not None and STATISTICS[self.method].units_only
        for name, wrong in {
            "allocation": self.allocation == "exact",
            "method": units_only,
            "width_multiple": self.width_multiple is not None,
            "compensate": bool(self.compensate),
        }.items():
            if wrong:
                value = f"{name} is {getattr(self, name)!r}, which needs whole units"
                raise SensibertError(f"{value}, and grid is {self.grid!r}: want grid unit, or another {name}")

    def parsed_budget(self) -> Budget:
        """With the table of latency_table, if the budget is one of latency."""
        budget = Budget.parse(self.budget, self.scope, self.flops_length)
        if self.latency_table is None or not budget.measured:
            return budget
        if budget.kind != "latency":
            raise SensibertError(f"latency_table is given, and budget is {budget}: want a budget of ms, or no table")
        return budget.with_table(CostTable.load(self.latency_table))

    def parsed_grid(self) -> Grid | None:
        return parse_grid(self.grid)

    def resolved(self, labels: bool = True) -> TrimConfig:
        """Replace method and compensate by their defaults if they are None. labels: whether they can be drawn from the
        outputs of the model."""
        method = self.method or (("obs" if labels else "layer-obs") if self.grid == "unit" else "fisher")
        usual = method != BASELINE and STATISTICS[method].compensates
        return replace(self, method=method, compensate=usual if self.compensate is None else self.compensate)

    @property
    def trims(self) -> bool:
        return self.method != BASELINE

    def settings(self) -> dict[str, Any]:
        """All settings as a flat dict under the names of the command line; a Schedule's shape is `schedule`."""
        own = {name: getattr(self, name) for name in settings_of(TrimConfig)}
        return {**own, **{_flat(name): getattr(self.schedule, name) for name in settings_of(Schedule)}}

    @classmethod
    @checked
    def from_settings(cls, settings: Mapping[str, Any]) -> TrimConfig:
        """Inverse of `settings`. Missing settings have their defaults; former names are accepted.

        SensibertError names an unknown setting."""
        settings = current_names(settings)
        want_known(settings, trim_names(), "a trim")
        shape = {name: settings[_flat(name)] for name in settings_of(Schedule) if _flat(name) in settings}
        own = {name: settings[name] for name in settings_of(cls) if name in settings}
        return cls(**own, schedule=Schedule(**shape))

    def to_json(self) -> str:
        return json.dumps(self.settings(), indent=2)

    @classmethod
    @checked
    def from_json(cls, text: str) -> TrimConfig:
        """Inverse of `to_json`; also reads what earlier versions wrote. SensibertError for anything else."""
        try:
            settings = parse_json(text, any_size=True)
        except ValueError as error:
            raise SensibertError(f"TrimConfig: the text is not JSON ({error})") from None
        if not isinstance(settings, dict):
            raise SensibertError(f"TrimConfig: the JSON holds a {type(settings).__name__}, want an object of settings")
        return cls.from_settings(settings)


def _flat(name: str) -> str:
    return settings_of(Schedule)[name].metadata["flag"] or name


def trim_names() -> set[str]:
    """The flat names of all settings of a TrimConfig."""
    return settings_of(TrimConfig).keys() | {_flat(name) for name in settings_of(Schedule)}


def want_known(settings: Mapping[str, Any], known: set[str], of: str) -> None:
    """SensibertError for the first setting that is not among the known ones of a trim or a run."""
    unknown = sorted(settings.keys() - known, key=str)
    if unknown:
        raise SensibertError(f"{unknown[0]} is no setting of {of}, {one_of(unknown[0], sorted(known))}")


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under today's names, without removed ones whose value agrees with today's behaviour.

    SensibertError for a removed setting with another value, or a setting that is given under both names."""
    former, current = former_names(TrimConfig, Schedule), {}
    for given, value in settings.items():
        if given in RETIRED:
            if value != RETIRED[given]:
                raise SensibertError(f"{given} is {value!r}, but this setting was removed: want it left out")
            continue
        name = former.get(given, given)
        if name in current:
            other = next(old for old, new in former.items() if new == name)
            raise SensibertError(f"{name} is given twice, as {other} (its former name) too: want it once")
        current[name] = value
    return current
