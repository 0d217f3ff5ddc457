"""The class and config of a trimmed model, with which `save_pretrained` writes a folder that can be reloaded."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
from functools import partial
from typing import Any

import transformers  # names are looked up later: loading them here would be slow
from torch import Tensor, nn

from ..core.errors import SensibertError
from ..core.version import version
from . import modeling_sensibert as code
from .families.family import Axis, Family
from .modules import attribute, base_of, family_of, is_linear, layers
from .unfinished import UNFINISHED

FORMAT = 1
CODE = code.__name__.rpartition(".")[2]
OWN = "Sensibert"  # SensibertX is the reloadable subclass of transformers' X


def _stock(kind: type) -> type[Any] | None:
    """transformers' class X if kind is X or SensibertX, from this package or a folder's code; else None."""
    stock = getattr(transformers, kind.__name__.removeprefix(OWN), None)
    if stock is None or kind is stock:
        return stock
    return stock if kind.__name__ == OWN + stock.__name__ and issubclass(kind, stock) else None


def stock_class(model: nn.Module) -> type[transformers.PreTrainedModel]:
    """The class of transformers that this model extends or is; SensibertError if there is none."""
    if not isinstance(model, transformers.PreTrainedModel):
        raise SensibertError(f"model: {type(model).__name__} is not a transformers model; unwrap it first")
    for kind in (type(model), type(model.config)):
        if _stock(kind) is None:
            raise SensibertError(_no_class_of_transformers(kind.__name__))
    stock = _stock(type(model))
    assert stock is not None  # checked above
    return stock


def stock_config(config: transformers.PreTrainedConfig) -> transformers.PreTrainedConfig:
    """A copy of the config with the class of the base model and without our entries."""
    stock, stock_type = copy.deepcopy(config), _stock(type(config))
    assert stock_type is not None  # `stock_class` checks it
    stock.__class__ = stock_type
    for name in ("sensibert", "auto_map"):
        vars(stock).pop(name, None)
    return stock


def _holders(base: nn.Module) -> list[transformers.PreTrainedModel]:
    """Every model of this process with `base` inside: an encoder does not know the models that it belongs to."""
    objects = gc.get_objects()
    kinds = {kind for kind in {*map(type, objects)} if issubclass(kind, transformers.PreTrainedModel)}
    known = [each for each in objects if type(each) in kinds]
    return [each for each in known if "_modules" in vars(each) and any(part is base for part in each.modules())]


def reloadable(
    model: nn.Module, structure: Mapping[str, Tensor], origin: Mapping[str, object]
) -> list[tuple[nn.Module, str, object]]:
    """The assignments (module, attribute, value) that make a model with this structure reloadable, in place.

    The base model and every model with it as base model, `model` or another one, get the classes SensibertX. Each
    module with their config gets a new config with the entry `sensibert`; the old one, which other models may share, is
    not changed. A model whose class is not one of transformers', or that holds the encoder in another way, gets a
    `save_pretrained` that raises SensibertError, since its folder could not be loaded. origin: more entries of
    config.sensibert (budget, method)."""
    base, configs = base_of(model), {}
    made: list[tuple[nn.Module, str, object]] = []
    holders = _holders(base)
    modules = {id(module): module for root in (model, *holders) for module in root.modules()}.values()
    inside = [module for module in modules if isinstance(module, transformers.PreTrainedModel)]
    others: set[int] = set()
    for part in (part for part in inside if base_of(part) is not base):
        others |= {id(module) for module in ([part] if part in holders else part.modules())}
        if part in holders and type(part).save_pretrained is transformers.PreTrainedModel.save_pretrained:
            made.append((part, "save_pretrained", partial(_refuse_to_save, _not_its_base(type(part).__name__))))
    for part in (part for part in inside if base_of(part) is base):
        known, config = _stock(type(part)), part.config
        if _stock(type(config)) is not None and id(config) not in configs:
            configs[id(config)] = _own_config(part, structure, origin)
        if known is None or _stock(type(config)) is None:
            reason = _no_class_of_transformers(type(part if known is None else config).__name__)
            made.append((part, "save_pretrained", partial(_refuse_to_save, reason)))
        else:
            made.append((part, "__class__", getattr(code, OWN + known.__name__)))
    for module in (module for module in modules if id(module) not in others):
        if (own := configs.get(id(vars(module).get("config")))) is not None:
            made.append((module, "config", own))
    return [*made, (base, "sensibert_structure", dict(structure))]


def _no_class_of_transformers(name: str) -> str:
    return (
        f"model: {name} is not a class of transformers, so a folder with this model would not load; save its "
        "base_model and the state_dict of its head, or the whole model with torch.save"
    )


def _not_its_base(name: str) -> str:
    return (
        f"model: {name} holds a trimmed encoder that is not its base_model, so a folder with it would not load; "
        "save the encoder and the state_dict of the rest, or the whole model with torch.save"
    )


def _refuse_to_save(reason: str, *args: object, **kwargs: object) -> None:
    raise SensibertError(reason)


def _own_config(
    model: transformers.PreTrainedModel, structure: Mapping[str, Tensor], origin: Mapping[str, object]
) -> transformers.PreTrainedConfig:
    """A copy of the model's config, of class SensibertXConfig, with the entries that describe the structure."""
    family, stock = family_of(model), _stock(type(model.config))
    assert stock is not None  # checked by `reloadable`
    stack = [layer for _, layer in layers(model)]
    kept = {kind: [structure[f"layer.{n}.{kind}"] for n in range(len(stack))] for kind in ("head", "ffn")}
    own = copy.deepcopy(model.config)
    own.__class__ = getattr(code, OWN + stock.__name__)
    own.auto_map = _auto_map(stock)
    known = dict(getattr(own, "sensibert", {}))
    for name in ("digest", "encoder_params", UNFINISHED):  # of the model before this cut
        known.pop(name, None)
    own.sensibert = known | {
        **origin,
        "sensibert_version": version(),
        "format": FORMAT,
        "base_model_type": stock.model_type,
        "head_dim": int(attribute(stack[0], family.head_dim)),
        "heads": [len(heads) for heads in kept["head"]],
        "ffn": [len(neurons) for neurons in kept["ffn"]],
        "kept_heads": [heads.tolist() for heads in kept["head"]],
        "table": _table(family, stack[0]),
    }
    _register(own)
    return own


def _register(own: transformers.PreTrainedConfig) -> None:
    """Let `pipeline` and the Auto classes know the model classes of this config, as loading its folder would."""
    for auto, path in own.auto_map.items():
        if auto != "AutoConfig":
            known = getattr(transformers.models.auto.modeling_auto, auto)
            known.register(type(own), getattr(code, path.rpartition(".")[2]), exist_ok=True)


def _axis(axis: Axis, layer: nn.Module) -> dict[str, object]:
    """The axis as modeling_sensibert.py reads it, with the linear layers that exist in this model."""
    names = dict(layer.named_modules())
    return {
        "produces": [path for path in (*axis.produces, *axis.tables) if is_linear(names.get(path))],
        "consumes": axis.consumes,
        "parts": axis.parts,
        "counts": list(axis.counts),
        "widths": list(axis.widths),
    }


def _table(family: Family, layer: nn.Module) -> dict[str, object]:
    axes = {"head": _axis(family.head, layer), "ffn": _axis(family.ffn, layer)}
    return {"layers": family.layers, **axes, "position_bias": family.position_bias}


def _auto_map(config_class: type[transformers.PreTrainedConfig]) -> dict[str, str]:
    """Auto class -> SensibertX, for every head that transformers has for this config (encoders only)."""
    auto = transformers.models.auto.modeling_auto
    classes = {"AutoConfig": f"{CODE}.{OWN}{config_class.__name__}"}
    for name in sorted(vars(auto)):
        mapping = getattr(getattr(auto, name), "_model_mapping", None)
        if mapping is None or not name.startswith("AutoModel") or name == "AutoModelForCausalLM":
            continue  # `not mapping`, in place of `is None`, would import every model of transformers
        if config_class in mapping:
            model_class = mapping[config_class]
            if not isinstance(model_class, tuple):
                classes[name] = f"{CODE}.{OWN}{model_class.__name__}"
    return classes
