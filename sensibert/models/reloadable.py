"""A trimmed model as a model of its own class: same tensors, but it saves and loads like any other."""

from __future__ import annotations

import copy

import transformers  # by attribute below: `families()` reads this file too, and its heavy parts are not needed then
from torch import nn

from ..core.errors import SensibertError
from . import modeling_sensibert as code
from .families import PREFIX, base_type
from .families.family import Axis, Family
from .modules import attribute, family_of, layers
from .structure import set_structure, structure_of

FORMAT = 1
CODE = code.__name__.rpartition(".")[2]


def stock_class(model: nn.Module) -> type[transformers.PreTrainedModel]:
    """The class of transformers that computes what this model computes; SensibertError if it is not one of its own."""
    if not isinstance(model, transformers.PreTrainedModel):
        raise SensibertError(f"model: {type(model).__name__} is not a transformers model; unwrap it first")
    name = type(model).__name__.removeprefix("Sensibert")
    found = getattr(transformers, name, None)
    if found is None or not (type(model) is found or is_reloadable(model)):
        raise SensibertError(f"model: class {type(model).__name__} is not transformers' own, so nobody could load it")
    return found


def stock_config(config: transformers.PreTrainedConfig) -> transformers.PreTrainedConfig:
    """The config of the base model: its own type, nothing of ours."""
    facts = config.to_dict()
    for name in ("sensibert", "auto_map", "model_type", "architectures", "transformers_version"):
        facts.pop(name, None)
    stock = transformers.AutoConfig.for_model(base_type(config.model_type), **facts)
    stock._attn_implementation = config._attn_implementation
    return stock


def is_reloadable(model: nn.Module) -> bool:
    return getattr(model.config, "model_type", "").startswith(PREFIX)


def _axis(axis: Axis, layer: nn.Module) -> dict[str, object]:
    """As the modeling code reads it: only the linear layers that are there."""
    names = dict(layer.named_modules())
    return {
        "produces": [path for path in (*axis.produces, *axis.tables) if isinstance(names.get(path), nn.Linear)],
        "consumes": axis.consumes,
        "parts": axis.parts,
        "counts": list(axis.counts),
        "widths": list(axis.widths),
    }


def _table(family: Family, layer: nn.Module) -> dict[str, object]:
    axes = {"head": _axis(family.head, layer), "ffn": _axis(family.ffn, layer)}
    return {"layers": family.layers, **axes, "position_bias": family.position_bias}


def _auto_map(config_class: type[transformers.PreTrainedConfig]) -> dict[str, str]:
    """Auto class -> our class, for every head transformers has for this config (encoders only)."""
    auto = transformers.models.auto.modeling_auto
    found = {"AutoConfig": f"{CODE}.Sensibert{config_class.__name__}"}
    for name in sorted(vars(auto)):
        mapping = getattr(getattr(auto, name), "_model_mapping", None)
        if name.startswith("AutoModel") and name != "AutoModelForCausalLM" and mapping and config_class in mapping:
            model_class = mapping[config_class]
            if not isinstance(model_class, tuple):
                found[name] = f"{CODE}.Sensibert{model_class.__name__}"
    return found


def reloadable(model: nn.Module, info: dict | None = None) -> transformers.PreTrainedModel:
    """A view of the model, of class `Sensibert<its class>` and with a config that says how it was cut; it shares all
    modules with `model`, which is left as it is.

    info: more facts for config.sensibert (budget, method, digest, ...)."""
    family, stock = family_of(model), stock_class(model)
    config, structure = stock_config(model.config), structure_of(model)
    stack = [layer for _, layer in layers(model)]
    numbers = range(len(stack))
    entry = {
        **getattr(model.config, "sensibert", {}),
        **(info or {}),
        "format": FORMAT,
        "base_model_type": config.model_type,
        "head_dim": int(attribute(stack[0], family.head_dim)),
        "heads": [len(structure[f"layer.{n}.head"]) for n in numbers],
        "ffn": [len(structure[f"layer.{n}.ffn"]) for n in numbers],
        "kept_heads": [structure[f"layer.{n}.head"].tolist() for n in numbers],
        "table": _table(family, stack[0]),
    }
    own_config, own_class = (getattr(code, f"Sensibert{c.__name__}") for c in (type(config), stock))
    facts = {"model_type": own_config.model_type, "sensibert": entry, "auto_map": _auto_map(type(config))}
    own = own_config.from_dict(config.to_dict() | facts)
    own._attn_implementation = config._attn_implementation
    made = copy.copy(model)  # a second face of the same modules: nothing is built or copied
    made.__class__, made.config = own_class, own
    set_structure(made, structure)
    return made
