"""What a trimmed model remembers: which units of its base model are left. Carried by the model object itself."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import SensibertError
from ..core.files import write_atomically
from .layout_of import sites
from .masks import FORMAT as MASKS
from .masks import Masks, masks_of
from .modeling_sensibert import STRUCTURE_FILE as STRUCTURE
from .modeling_sensibert import PickHeads

__all__ = ["STRUCTURE", "PickHeads", "is_trimmed", "read_structure", "save_structure", "set_structure", "structure_of"]

_ATTRIBUTE = "sensibert_structure"


def structure_of(model: nn.Module) -> dict[str, Tensor]:
    """site name -> numbers of the base model's units that are left, int64 ascending; all of them if never trimmed."""
    known = getattr(model, _ATTRIBUTE, None)
    if known is not None:
        return dict(known)
    return {site.name: torch.arange(site.units) for site in sites(model)}


def set_structure(model: nn.Module, structure: dict[str, Tensor]) -> None:
    setattr(model, _ATTRIBUTE, dict(structure))


def is_trimmed(model: nn.Module) -> bool:
    return getattr(model, _ATTRIBUTE, None) is not None


def save_structure(model: nn.Module, path: str | Path) -> None:
    """Kept units of the base model, int32, one tensor a site: what it takes to rebuild the shapes. Of a model cut by a
    grid its masks, one bit a block."""
    masks = masks_of(model)
    if masks is None:
        tensors = {name: kept.to(torch.int32) for name, kept in structure_of(model).items()}
        facts = {"format": "sensibert.structure"}
    else:
        tensors, facts = masks.packed()
    write_atomically(path, lambda temporary: save_file(tensors, temporary, facts))


def read_structure(path: str | Path) -> dict[str, Tensor] | Masks:
    """What save_structure wrote: site name -> kept units, int64, or the masks."""
    try:
        with safe_open(path, "pt") as file:
            facts, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts.get("format") == MASKS:
            return Masks.unpacked(tensors, facts)
        return {name: kept.long() for name, kept in tensors.items()}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise SensibertError(f"{path}: not a readable structure file ({error})") from None
