"""Finds parts of a model with its family's table."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from ..core.errors import SensibertError
from ..core.layout import Layout
from .families import base_type, families
from .families.family import Family
from .modeling_sensibert import EmptyLinear
from .wrapped import INSIDE, is_wrapped

Module = TypeVar("Module", bound=nn.Module)


def unsupported(model_type: str, argument: str = "model") -> str:
    """The error message for a model family without a table."""
    return (
        f"{argument}: family {model_type!r} is not supported, want one of {', '.join(sorted(families()))}; "
        "a new family is one table in sensibert/models/families/ (see CONTRIBUTING)"
    )


def family_of(model: nn.Module) -> Family:
    """The table of a transformers model. SensibertError for a family without one, a decoder, or a wrapped model."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inside = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        raise SensibertError(f"model: is wrapped in {type(model).__name__}, want the model inside it (model.{inside})")
    if is_wrapped(model):
        raise SensibertError(
            f"model: is a {type(model).__name__}, want the model inside it (model.{INSIDE}), which is trimmed in place"
        )
    of_peft = any(kind.__module__.startswith("peft.") for kind in type(model).__mro__)
    if of_peft or getattr(model, "_hf_peft_config_loaded", False):  # of `add_adapter`, which saves the adapter only
        raise SensibertError(
            f"model: {type(model).__name__} has adapters, want one without: model.merge_and_unload(), or the model "
            "that they were added to"
        )
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        name, kinds = type(model).__name__, ", ".join(sorted(families()))
        raise SensibertError(
            f"model: {name} is not a transformers model, want one of a supported family: {kinds}; a module around one "
            "needs its config and its base_model"
        )
    model_type = base_type(config.model_type)
    if model_type not in families():
        raise SensibertError(unsupported(model_type))
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise SensibertError(f"model: {model_type} is configured as a decoder, want an encoder (is_decoder=False)")
    return families()[model_type]


def want_finite(weights: Iterable[tuple[str, Tensor]], what: str) -> None:
    """SensibertError naming the first tensor with a NaN or an infinity. what: begins the message."""
    for name, weight in weights:
        if not weight.isfinite().all():
            raise SensibertError(f"{what}: {name} has NaN or infinite values, want finite weights")


def copy_of(model: Module) -> Module:
    """A copy that computes in its own precision: a Trainer leaves its mixed precision in the model."""
    made = copy.deepcopy(model)
    for name in ("forward", "_original_forward"):
        vars(made).pop(name, None)
    return made


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and values of all parameters, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether it is an nn.Linear, or the EmptyLinear that takes its place (of this package or of a folder's code)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == EmptyLinear.__name__


def base_of(model: nn.Module) -> nn.Module:
    """The model without its task head; member names are relative to it."""
    return getattr(model, "base_model", model)


def consumer_weights(model: nn.Module, layout: Layout) -> Iterator[Tensor]:
    """Weight and bias of every layer that reads units: what compensation adjusts."""
    for site in layout.sites:
        yield from base_of(model).get_submodule(site.consumer.parameter.rpartition(".")[0]).parameters()


def embeddings_of(model: nn.Module) -> nn.Module:
    """The embedding module (tables of words, positions and types, and their norm), or the word table alone."""
    return getattr(base_of(model), "embeddings", None) or attribute(model, "get_input_embeddings")()


def walk(root: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) at a dotted path, in order; `*` matches every index of a module list."""
    level = [("", root)]
    for part in pattern.split("."):
        nested = []
        for name, module in level:
            children = module.named_children() if part == "*" else [(part, getattr(module, part))]
            nested += [(f"{name}.{child}" if name else child, value) for child, value in children]
        level = nested
    yield from level


def positions(model: nn.Module) -> int | None:
    """The maximum sequence length of the table of absolute positions; None without such a table."""
    table = getattr(embeddings_of(model), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return None
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def configs_of(model: nn.Module) -> list[Any]:
    """The configs of the model's modules, each once: a layer without heads has its own."""
    return list({id(c): c for m in model.modules() if (c := getattr(m, "config", None))}.values())


@contextlib.contextmanager
def attending(configs: list[Any], implementation: str) -> Iterator[None]:
    """Within, modules with these configs compute attention with this implementation of transformers."""
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = implementation
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def of_all_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value of every query head, where several query heads share one of each; heads are dimension 1 of all."""
    groups = query.shape[1] // key.shape[1] if key.shape[1] else 1
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


def attribute(root: Any, path: str) -> Any:
    """The object at a dotted path of attributes; AttributeError if there is none."""
    for part in path.split("."):
        root = getattr(root, part)
    return root


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path in the base model, layer module) of every transformer layer, in order. SensibertError if there are none."""
    family = family_of(model)
    try:
        return list(walk(base_of(model), family.layers))
    except AttributeError:
        raise SensibertError(
            f"model: {type(base_of(model)).__name__} has no {family.layers.partition('.*')[0]}, where a "
            f"{family.model_type} has its layers; a module around one needs its config and its base_model"
        ) from None
