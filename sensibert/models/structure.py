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

__all__ = ["STRUCTURE", "PickHeads", "is_trimmed", "read_structure", "save_structure", "structure_of", "want_structure"]


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


def want_structure(model: nn.Module) -> None:
    """SensibertError if the kept units of a trimmed model are not those of its layers and of its original model."""
    structure, config = _known(model), getattr(model, "config", None)
    if structure is None:
        return
    entry, present = getattr(config, "sensibert", {}), {site.name: site for site in sites(model)}
    if structure.keys() != present.keys():
        name = min(structure.keys() ^ present.keys())
        raise SensibertError(
            f"{STRUCTURE}: {'has' if name in structure else 'lacks'} {name}, want the model's own file"
        )
    heads = [structure[f"layer.{n}.head"].tolist() for n in range(len(present) // 2)]
    if "kept_heads" in entry and heads != entry["kept_heads"]:
        raise SensibertError(f"{STRUCTURE}: its heads are not the kept_heads of config.json, want the model's own file")
    for name, kept in structure.items():
        of = _original_units(config, present[name].kind)
        if len(kept) != present[name].units or (len(kept) and of is not None and int(kept[-1]) >= of):
            last, below = (f", the last {int(kept[-1])}" if len(kept) else ""), "" if of is None else f" below {of}"
            raise SensibertError(f"{STRUCTURE}: {name} has {len(kept)} units{last}; want {present[name].units}{below}")


def _original_units(config: Any, kind: str) -> int | None:
    """Heads or FFN neurons of a layer in the original model, whose sizes the config keeps; None if it has other
    names."""
    names = ("num_attention_heads",) if kind == "head" else ("intermediate_size", "hidden_dim", "n_inner")
    return next((size for name in names if isinstance(size := getattr(config, name, None), int)), None)


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
        return {name: _units(name, kept) for name, kept in tensors.items()}
    except SensibertError as error:
        raise SensibertError(f"{path}: not a readable structure file ({error})") from None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise SensibertError(f"{path}: not a readable structure file ({error})") from None


def _units(name: str, kept: Tensor) -> Tensor:
    """The kept units of a site, int64; SensibertError unless every one is named once, in ascending order."""
    if kept.dtype not in (torch.int32, torch.int64) or kept.dim() != 1:
        raise SensibertError(f"{name} is {kept.dtype} {tuple(kept.shape)}, want one row of whole numbers")
    kept = kept.long()
    if len(kept) and (int(kept[0]) < 0 or not bool((kept[1:] > kept[:-1]).all())):
        raise SensibertError(f"{name} is not ascending, want every kept unit once")
    return kept
