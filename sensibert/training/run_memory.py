"""The state of a run, besides the Trainer's, that a resumed run needs; saved in every checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core import cost
from ..core.arguments import want
from ..core.budget import Budget
from ..core.config import RETIRED, TrimConfig
from ..core.cost_table import CostTable
from ..core.errors import SensibertError
from ..core.json_text import parse_json
from ..core.layout import Layout
from ..core.schedule import Schedule
from ..core.settings import former_names, settings_of
from .checkpoints import MEMORY

PACKED = "sensibert_packed"  # attribute of the state of a training in the loop on packed batches
# Settings that the weights after a cut depend on. `compared` adds budget, scope, grid and method as text.
COMPARED = ("allocation", "width_multiple", "samples", "micro_batch", "compensate")
COMPARED_OF_SCHEDULE = ("recovery", "rewarm_ratio", "recover_peak", "recover_dropout")


@dataclass
class RunMemory:
    """Sizes, measured costs and score before trimming, seconds by phase, and what the run was made from."""

    params_before: tuple[int, int] = (0, 0)  # encoder, total
    flops_before: int = 0
    metrics_at_cut: dict[str, float] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)  # trained on by phase, without padding
    inputs: dict[str, object] = field(default_factory=dict)  # settings and digests of model, data and teacher
    table: CostTable | None = None  # of a budget of measured costs, corrected at the cuts
    size: dict[str, Any] | None = None  # what the form of the weights file was chosen by
    _clock: float = field(default_factory=time.perf_counter)
    _tokens: int = 0  # at the last call of `spend`

    @classmethod
    def of(cls, layout: Layout, budget: Budget) -> RunMemory:
        """Of a run that begins. layout: of the untrimmed model."""
        flops = cost.flops(layout, cost.counts_of(layout), budget.scope, 1, budget.length)
        return cls((layout.encoder_params, layout.total_params), flops, table=budget.table)

    def restart_clock(self, clock: float | None = None, tokens: int = 0) -> None:
        """Count from now, or from `clock`, a value of time.perf_counter(). tokens: trained on so far."""
        self._clock = time.perf_counter() if clock is None else clock
        self._tokens = tokens

    def spend(self, phase: str, tokens: int | None = None) -> None:
        """Add the seconds since the last call to a phase. tokens: trained on so far, if the phase trains."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._clock
        self._clock = now
        if tokens is not None:
            self.tokens[phase] = self.tokens.get(phase, 0) + tokens - self._tokens
            self._tokens = tokens

    def tokens_per_s(self, *phases: str) -> float | None:
        """Tokens a second over these phases; None if nothing was trained in them."""
        tokens = sum(self.tokens.get(phase, 0) for phase in phases)
        seconds = sum(self.seconds.get(phase, 0.0) for phase in phases)
        return tokens / seconds if tokens and seconds else None

    def saved(self, settings: Mapping[str, object], packed: bool) -> dict[str, object]:
        """The content of the checkpoint's file. settings: those that its weights depend on. packed: whether the run
        trains on packed batches, for `was_packed`."""
        known: dict[str, object] = {
            "metrics_at_cut": self.metrics_at_cut,
            "seconds": self.seconds,
            "tokens": self.tokens,
        }
        if self.table is not None:
            known["table"] = self.table.to_dict()
        if self.size is not None:
            known["size"] = self.size
        return {"settings": dict(settings), "packed": packed, **known, "inputs": self.inputs}

    def restore(self, checkpoint: Path) -> dict[str, object]:
        """Read a checkpoint's file. Returns its settings under today's names. SensibertError if it cannot be read."""
        try:
            content = parse_json((checkpoint / MEMORY).read_text())
            want("metrics_at_cut", content.get("metrics_at_cut"), dict[str, float] | None)
            want("size", content.get("size"), dict[str, Any] | None)
            for name, kind in {"seconds": float, "tokens": int, "inputs": Any, "settings": Any}.items():
                want(name, content.get(name, {}), dict[str, kind])  # type: ignore[valid-type]
            self.metrics_at_cut = content.get("metrics_at_cut", content.get("metrics_dense"))
            self.seconds, self.inputs = content["seconds"], content.get("inputs", {})
            self.tokens, self.size = content.get("tokens", {}), content.get("size")
            if (entry := content.get("table")) is not None:
                table = CostTable.from_dict(entry)
                if self.table is None or self.table.kind == table.kind:  # a run may branch from one with another budget
                    self.table = table
            return current_settings(content.get("settings", {}))
        except (OSError, ValueError, KeyError, AttributeError):  # a SensibertError is a ValueError
            raise SensibertError(
                f"checkpoint: {checkpoint} is not of a run with a TrimCallback ({MEMORY} is missing or unreadable)"
            ) from None


def was_packed(checkpoint: Path) -> bool | None:
    """Whether the run of a checkpoint trained on packed batches; None if it does not tell."""
    try:
        packed = parse_json((checkpoint / MEMORY).read_text()).get("packed")
    except (OSError, ValueError, AttributeError):  # `check_checkpoint` says what is wrong with it
        return None
    return packed if isinstance(packed, bool) else None


def compared(config: TrimConfig, chosen: bool, left: float) -> dict[str, object]:
    """The settings that the weights after a cut depend on. chosen: the plan comes from `choose`. left: fraction of the
    encoder's cost that is left."""
    budget = config.parsed_budget()
    at = f" at {budget.length} tokens" if budget.kind == "flops" else ""
    if budget.measured:
        at = f" in {config.runtime}, {config.latency_shape}, {config.latency_threads} threads"
        at += f", weights in {config.weights}" if budget.kind == "size" and config.weights else ""
    return {
        "budget": f"{budget} of the {budget.scope}{at}",
        "method": config.method,
        "grid": config.grid,
        "choose": chosen,
        **{name: getattr(config, name) for name in COMPARED},
        **{name: getattr(config.schedule, name) for name in COMPARED_OF_SCHEDULE},
        "freeze_embeddings": config.schedule.freezes(left),
    }


def current_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings of a checkpoint under today's names and spellings, without removed ones that change nothing."""
    former = former_names(TrimConfig, Schedule)
    fields = {**settings_of(TrimConfig), **settings_of(Schedule)}
    current = {}
    for given, value in settings.items():
        if given in RETIRED and value == RETIRED[given]:
            continue
        name = former.get(given, given)
        renamed = fields[name].metadata["renamed"] if name in fields else {}
        current[name] = renamed.get(value, value) if isinstance(value, str) else value
    return current
