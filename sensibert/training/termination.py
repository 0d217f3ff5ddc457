"""SIGTERM during a training: the step is finished, a checkpoint saved, and the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.errors import Terminated


class SaveOnTermination(TrainerCallback):
    """Saves a checkpoint after the step in which SIGTERM came, to any process, and ends the training."""

    def __init__(self) -> None:
        self.requested = False
        self._group: Any = None  # of several processes; gloo, which does not wait for a GPU

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1 and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._group is not None:
            requested = torch.tensor(int(self.requested))
            dist.all_reduce(requested, dist.ReduceOp.MAX, self._group)
            self.requested = bool(requested)
        if self.requested:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context that raises Terminated at its end if SIGTERM came. Outside the main thread nothing is caught."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(*_: object) -> None:
            self.requested = True

        before = signal.signal(signal.SIGTERM, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
        if self.requested:
            raise Terminated("stopped by SIGTERM; a checkpoint is saved, and --resume continues from it")
