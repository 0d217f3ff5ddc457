"""The device of a run, and what it can do."""

from __future__ import annotations

import torch

from .errors import SensibertError
from .launch import launched


def device_of(name: str) -> torch.device:
    """The device of this name; auto is the GPU if there is one, in several processes one for each. SensibertError for
    one that this machine lacks."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cuda" and launched().count > 1:
        name = f"cuda:{launched().local}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        there = ", ".join(["auto", "cpu", *(f"cuda:{number}" for number in range(count))])
        raise SensibertError(f"device is {name!r}, which is not there, want one of {there}")
    return device


def computes_in_bf16(device: str = "auto") -> bool:
    """Whether a device multiplies matrices in bf16 by instructions of its own."""
    if device_of(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
