"""Weights of a file -> model, if they are this model's: transformers initializes what a file lacks at random."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..core.errors import SensibertError
from .modules import base_of, family_of

# Prefixes that wrappers add to the names of all weights: DataParallel, torch.compile, FSDP, Lightning,
# sentence-transformers.
WRAPPED = re.compile(r"((module|_orig_mod|_fsdp_wrapped_module|model|auto_model|0)\.)+")
# Names that tools leave in a file -> what to do before saving.
LEFT_BY = {
    "_orig": "call torch.nn.utils.prune.remove on the pruned modules",
    "parametrizations.": "call torch.nn.utils.parametrize.remove_parametrizations",
    "lora_": "call merge_and_unload()",
    "base_layer.": "call merge_and_unload()",
}
NOT_WEIGHTS = ("inv_freq", "position_ids")  # buffers that older versions of transformers saved


def from_pretrained(
    model_class: Any, source: str | os.PathLike, new_head: bool = False, **options: Any
) -> PreTrainedModel:
    """model_class.from_pretrained(source, **options), refused unless the weights are those of this model.

    new_head: the task head may be new; a warning tells if the file has one with another number of outputs. A prefix
    that a wrapper added to all names is taken off, with a warning. SensibertError, naming the first weight, if the file
    lacks a weight, has it in another shape, or has weights in the layers that the model has no place for."""
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = model_class.from_pretrained(source, **options)
    prefix = _common_prefix(info["unexpected_keys"])
    if prefix and _lost(model, info["missing_keys"]):
        options["key_mapping"] = {f"^{re.escape(prefix)}": ""}
        model, info = model_class.from_pretrained(source, **options)
        _warn("%s: the prefix %r of its weights was taken off", source, prefix)
    _check(model, source, info, new_head)
    return model


def _warn(message: str, *values: object) -> None:
    logging.getLogger("sensibert").warning(message, *values)


def _common_prefix(names: set[str]) -> str:
    """The longest prefix of wrappers that all names have."""
    prefixes = [match[0] if (match := WRAPPED.match(name)) else "" for name in names]
    common = os.path.commonprefix(prefixes)
    return common[: common.rfind(".") + 1]


def _inside(model: nn.Module) -> str:
    """The prefix of the weights of the base model."""
    return "" if base_of(model) is model else f"{model.base_model_prefix}."


def _lost(model: nn.Module, names: set[str]) -> list[str]:
    """Those of the names that belong to the embeddings or layers."""
    return sorted(name for name in names if name.startswith(_inside(model)) and "pooler" not in name)


def _check(model: PreTrainedModel, source: str | os.PathLike, info: dict[str, Any], new_head: bool) -> None:
    missing, unexpected = set(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = {name: (tuple(was), tuple(wanted)) for name, was, wanted in info["mismatched_keys"]}
    layers = _inside(model) + family_of(model).layers.partition("*")[0]
    hint = next((f"; {do} before saving" for left, do in LEFT_BY.items() if any(left in n for n in unexpected)), "")
    lost = _lost(model, missing | shapes.keys())
    if not new_head and base_of(model) is not model:  # a base model may have no pooler
        lost += sorted((missing | shapes.keys()) - set(lost))
    if lost:
        name = lost[0]
        if name not in shapes:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise SensibertError(f"{source}: its weights lack {name}{more}{hint}")
        was, wanted = shapes[name]
        raise SensibertError(f"{source}: {name} is {was} in its weights, and {wanted} by its config.json")
    for name in unexpected:
        if name.startswith(layers) and not name.endswith(NOT_WEIGHTS):
            raise SensibertError(f"{source}: its weights have {name}, which a {type(model).__name__} has not{hint}")
    if base_of(model) is model and missing:
        _warn("%s: its weights lack %s, which is random now", source, min(missing))
    if shapes:
        name, (was, wanted) = next(iter(shapes.items()))
        _warn("%s: its head has %d outputs and the task %d: a new head is trained", source, was[0], wanted[0])
