"""The units of the original model that a trimmed one keeps, as an attribute of its base model and as a file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import SensibertError
from ..core.files import write_atomically
from . import modeling_sensibert
from .layout_of import sites
from .masks import FORMAT as MASKS
from .masks import Masks, masks_of
from .modeling_sensibert import STRUCTURE_FILE as STRUCTURE
from .modules import base_of

__all__ = ["STRUCTURE", "PickHeads", "is_trimmed", "read_structure", "save_structure", "structure_of"]


def _known(model: nn.Module) -> dict[str, Tensor] | None:
    # The code in folders written by version 0.1 sets it on the model with its head.
    return getattr(base_of(model), "sensibert_structure", None) or getattr(model, "sensibert_structure", None)


def structure_of(model: nn.Module) -> dict[str, Tensor]:
    """Site name -> indices of the kept units in the original model, int64 ascending; all of them if never trimmed."""
    known = _known(model)
    if known is not None:
        return dict(known)
    return {site.name: torch.arange(site.units) for site in sites(model)}


class PickHeads(modeling_sensibert.PickHeads):
    __doc__ = modeling_sensibert.PickHeads.__doc__

    @classmethod
    def attach(cls, attention: nn.Module, kept: Tensor) -> Callable[[], None]:
        """Install the hook, or narrow the one that is installed. Returns a function that undoes this."""
        for hook in attention._forward_pre_hooks.values():
            if type(hook).__name__ == cls.__name__:  # by name: it may be of modeling_sensibert or a folder's copy of it
                narrowed: Any = hook
                old, narrowed.kept = narrowed.kept, narrowed.kept[kept]
                return partial(setattr, narrowed, "kept", old)
        return attention.register_forward_pre_hook(cls(kept), with_kwargs=True).remove


def is_trimmed(model: nn.Module) -> bool:
    """Whether units were removed; masks of a grid do not count."""
    return _known(model) is not None


def save_structure(model: nn.Module, path: str | Path) -> None:
    """Write the kept units, int32, one tensor per site. For a model masked by a grid: its masks, one bit per block."""
    masks = masks_of(model)
    if masks is None:
        tensors = {name: kept.to(torch.int32) for name, kept in structure_of(model).items()}
        facts = {"format": "sensibert.structure"}
    else:
        tensors, facts = masks.packed()
    write_atomically(path, lambda temporary: save_file(tensors, temporary, facts))


def read_structure(path: str | Path) -> dict[str, Tensor] | Masks:
    """Read a file of save_structure: site name -> kept units, int64, or the masks. SensibertError for any other
    file."""
    try:
        with safe_open(path, "pt") as file:
            facts, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts.get("format") == MASKS:
            return Masks.unpacked(tensors, facts)
        return {name: kept.long() for name, kept in tensors.items()}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise SensibertError(f"{path}: not a readable structure file ({error})") from None
