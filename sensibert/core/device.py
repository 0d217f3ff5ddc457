"""What the device of this machine can do."""

from __future__ import annotations

import torch


def computes_in_bf16() -> bool:
    """Whether the GPU, or without one the processor, multiplies matrices in bf16 by instructions of its own."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
