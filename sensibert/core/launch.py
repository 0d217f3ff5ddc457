"""The processes that torchrun or `accelerate launch` has started, as the environment tells. Needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import SensibertError


@dataclass(frozen=True)
class Launch:
    count: int = 1
    number: int = 0  # of this process, among all
    local: int = 0  # and among those on its machine


def launched() -> Launch:
    """How many processes were started, and which this one is; Launch() for one that was started by itself."""
    count, number, local = (os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if not count.isdecimal() or int(count) <= 1:
        return Launch()
    return Launch(int(count), *(int(value) if value.isdecimal() else 0 for value in (number, local)))


def want_one_process(what: str) -> None:
    """SensibertError if several processes were started: `what` would be done by each of them."""
    if (count := launched().count) > 1:
        raise SensibertError(f"{what}: {count} processes were started, want one")
