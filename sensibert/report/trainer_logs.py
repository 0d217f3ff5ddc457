"""What a Trainer logs, in the display of a run."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .progress import Display


class ShowLogs(TrainerCallback):
    """Shows the loss and the learning rate."""

    def __init__(self, display: Display) -> None:
        self.display = display

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            self.display.note(loss=f"{logs['loss']:.4f}", lr=f"{logs['learning_rate']:.1e}")
