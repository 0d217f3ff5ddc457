"""The processes of a whole run, which torchrun or `accelerate launch` has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..core.errors import SensibertError, Terminated, Told
from ..core.launch import launched
from .processes import Processes

FOR_RENDEZVOUS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FAILED = "sensibert/failed"  # key that the first process sets when it fails
PATIENCE = timedelta(seconds=5)  # how long another one that fails waits for that key


@dataclass(frozen=True)
class Started(Processes):
    """Processes that can talk to one another before there is a Trainer."""

    store: dist.Store | None = None  # None for one process, or where the caller's own script has connected them

    @classmethod
    def connect(cls, device: torch.device) -> Started:
        """Connect all processes that were started; each has to call it. device: of this process."""
        count, number = launched().count, launched().number
        if count == 1:
            return cls()
        if dist.is_initialized():
            return cls(count, number)
        if missing := [name for name in FOR_RENDEZVOUS if name not in os.environ]:
            raise SensibertError(
                f"WORLD_SIZE is {count} and {', '.join(missing)} missing in the environment, want torchrun or "
                "accelerate launch, which set them"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        timeout = timedelta(seconds=cls.timeout)
        store, number, count = next(dist.rendezvous("env://", timeout=timeout))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
        return cls(count, number, store=store)

    @contextmanager
    def told_once(self) -> Iterator[None]:
        """A context whose errors are raised as they are in the first process. In others that fail too it is Told."""
        try:
            yield
        except Exception as error:
            if self.store is None:
                raise
            if self.first:
                with suppress(RuntimeError):  # the store may be gone
                    self.store.set(FAILED, "1")
                raise
            try:
                self.store.wait([FAILED], PATIENCE)
            except RuntimeError:  # the first process has not failed, or it is gone
                raise error from None
            raise (Terminated("") if isinstance(error, Terminated) else Told(str(error))) from error
