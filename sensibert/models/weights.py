"""Weights of a file -> model, if they are this model's: transformers initializes what a file lacks at random."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ..core.errors import SensibertError, naming
from .modules import base_of, family_of
from .structure import want_structure

# Prefixes that wrappers add to the names of all weights: DataParallel, torch.compile, FSDP, Lightning,
# sentence-transformers.
WRAPPED = re.compile(r"((module|_orig_mod|_fsdp_wrapped_module|model|auto_model|0)\.)+")
# Names that tools leave in a file -> what to do before saving.
LEFT_BY = {
    "_orig": "call torch.nn.utils.prune.remove on the pruned modules",
    "parametrizations.": "call torch.nn.utils.parametrize.remove_parametrizations",
    "lora_": "call merge_and_unload()",
    "base_layer.": "call merge_and_unload()",
    "modules_to_save.": "call merge_and_unload()",
}
NOT_WEIGHTS = ("inv_freq", "position_ids")  # buffers that older versions of transformers saved


def from_pretrained(
    model_class: Any, source: str | os.PathLike, new_head: bool = False, **options: Any
) -> PreTrainedModel:
    """model_class.from_pretrained(source, **options), refused unless the weights are those of this model.

    new_head: the task head may be new; a warning tells if the file has one with another number of outputs. A prefix
    that a wrapper added to all names is taken off, with a warning. SensibertError, naming the first weight, if the file
    lacks a weight, has it in another shape, or has weights in the layers that the model has no place for."""
    if os.path.exists(os.path.join(source, "adapter_config.json")):
        raise SensibertError(f"{source}: has an adapter beside its weights; call merge_and_unload() before saving")
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = model_class.from_pretrained(source, **options)
        prefix = _common_prefix(info["unexpected_keys"]) if _lost(model, info["missing_keys"]) else ""
    except ValueError:  # of a trimmed model, which refuses missing weights itself
        prefix = _common_prefix({name for file in _files(source) for name in _names(file)})
        if not prefix:
            raise
    if prefix:
        options["key_mapping"] = {f"^{re.escape(prefix)}": ""}
        model, info = model_class.from_pretrained(source, **options)
        _warn("%s: the prefix %r of its weights was taken off", source, prefix)
    _check(model, source, info, new_head)
    _want_floats(model, source)
    with naming(str(source)):
        want_structure(model)
    return model


def _want_floats(model: PreTrainedModel, source: str | os.PathLike) -> None:
    """SensibertError if a local file has integers as weights: without a quantization they are read as numbers."""
    names = {_ending(name) for name, _ in model.named_parameters()}
    for file in _files(source):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                kind = weights.get_slice(name).get_dtype()
                if not kind.startswith(("F", "BF")) and _ending(name) in names:
                    raise SensibertError(f"{source}: its weights have {name} as {kind}, want floating-point numbers")


def _files(source: str | os.PathLike) -> list[Path]:
    """The safetensors files of a local folder."""
    return sorted(Path(source).glob("model*.safetensors"))


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as weights:
        return list(weights.keys())


def _ending(name: str) -> str:
    """The last two parts of a name: prefixes of wrappers do not count."""
    return ".".join(name.split(".")[-2:])


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
        if (name.startswith(layers) and not name.endswith(NOT_WEIGHTS)) or any(left in name for left in LEFT_BY):
            raise SensibertError(f"{source}: its weights have {name}, which a {type(model).__name__} has not{hint}")
    named = [model.config.architectures] if isinstance(model.config.architectures, str) else model.config.architectures
    if new_head and missing and type(model).__name__ in (named or ()):
        _warn("%s: its weights lack %s: a new head is trained", source, min(missing))
    if base_of(model) is model and missing:
        _warn("%s: its weights lack %s, which is random now", source, min(missing))
    if shapes:
        name, (was, wanted) = next(iter(shapes.items()))
        _warn("%s: its head has %d outputs and the task %d: a new head is trained", source, was[0], wanted[0])
