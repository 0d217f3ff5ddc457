"""How long the steps of a training take, measured on a few of them."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .finetune import finetune

STEPS, LEAST = 6, 2  # that are timed, after a first one that is not
ENOUGH = 4.0  # seconds after which no further step is timed


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) > LEAST and self.ends[-1] - self.ends[0] > ENOUGH:
            control.should_training_stop = True


def step_seconds(
    model: nn.Module, rows: Dataset, collator: Callable, arguments: TrainingArguments, packing: str = "auto"
) -> tuple[float, int]:
    """(median seconds of an optimizer step, steps that were timed) in the loop that `finetune` uses. It trains the
    model, and writes nothing that stays."""
    clock = _Clock()
    with TemporaryDirectory() as folder:
        changed: dict[str, Any] = {"output_dir": folder, "max_steps": 1 + STEPS, "save_strategy": "no"}
        few = replace(arguments, **changed, logging_strategy="no", disable_tqdm=True)
        with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints what it logs at the end
            finetune(model, rows, collator, few, [clock], packing=packing)
    taken = [end - begin for begin, end in zip(clock.ends, clock.ends[1:])]
    return statistics.median(taken), len(taken)
