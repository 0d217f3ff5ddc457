"""The table a model family fills in, and what is read off a model with it.

A family says where its trimmable axes live: which linear layers produce a unit's activation (rows) and which one
consumes it (columns). Everything else (sites, costs, surgery, export) follows from the table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

import torch
from torch import nn

from ..artifacts import Flops, Layout, Member, Site, Weight
from ..errors import SensibertError

PREFIX = "sensibert_"  # model_type of a trimmed folder: this prefix and the family's own model type
# Task heads that read one vector a sequence; all others read every token.
SEQUENCE_HEADS = ("SequenceClassification", "MultipleChoice", "NextSentencePrediction")


@dataclass(frozen=True)
class Axis:
    """One trimmable axis of a layer, as module paths inside the layer."""

    produces: tuple[str, ...]  # linear layers whose output rows are the units; absent ones are skipped
    consumes: str  # the linear layer whose input columns read them
    tables: tuple[str, ...] = ()  # further producers, of a table of relative positions: they run once a pass
    parts: int = 1  # equal sections of the produced rows (fused q|k|v: 3, gated input: 2)
    counts: tuple[str, ...] = ()  # attributes that hold the number of units
    widths: tuple[str, ...] = ()  # attributes that hold units * span
    minimum: int = 0


@dataclass(frozen=True)
class Family:
    """Where one model family keeps its trimmable axes. Paths are inside the base model; `*` matches a list index."""

    model_type: str
    layers: str
    head: Axis
    ffn: Axis
    head_dim: str  # attribute of a layer
    encoder: str = "encoder"
    repeats: tuple[str, str] | None = None  # config names whose quotient says how often a shared layer runs
    relative_flops: Callable[[object, int], Flops] | None = None  # extra FLOPs of a head, from (config, head_dim)
    position_bias: str = ""  # attention module whose `position_bias` [B, H, S, S] must follow the kept heads
    aliases: tuple[str, ...] = ()  # other model types with the very same modules


@cache
def families() -> dict[str, Family]:
    """model_type -> Family, from every module of this package that defines FAMILY."""
    package = __name__.rpartition(".")[0]
    table: dict[str, Family] = {}
    for module in iter_modules(import_module(package).__path__):
        family = getattr(import_module(f"{package}.{module.name}"), "FAMILY", None)
        if family is not None:
            table.update(dict.fromkeys((family.model_type, *family.aliases), family))
    return table


def base_type(model_type: str) -> str:
    """`sensibert_bert` and `bert` are both `bert`."""
    return model_type.removeprefix(PREFIX)


def family_of(model: nn.Module) -> Family:
    """The table of a transformers model, or a SensibertError that says what is supported."""
    config = getattr(model, "config", None)
    model_type = base_type(getattr(config, "model_type", type(model).__name__))
    if model_type not in families():
        raise SensibertError(
            f"model: family {model_type!r} is not supported, want one of {', '.join(sorted(families()))}; "
            "a new family is one table in sensibert/models/ (see CONTRIBUTING)"
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise SensibertError(f"model: {model_type} is configured as a decoder, want an encoder (is_decoder=False)")
    return families()[model_type]


def base_of(model: nn.Module) -> nn.Module:
    """The model without its task head; member names are relative to it."""
    return getattr(model, "base_model", model)


def embeddings_of(model: nn.Module) -> nn.Module:
    """What turns tokens into vectors: the tables of words, positions and types with their norm, or the table alone."""
    return getattr(base_of(model), "embeddings", None) or model.get_input_embeddings()


def walk(root: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules at a dotted path whose `*` stands for every index of a module list."""
    found = [("", root)]
    for part in pattern.split("."):
        nested = []
        for name, module in found:
            children = module.named_children() if part == "*" else [(part, getattr(module, part))]
            nested += [(f"{name}.{child}" if name else child, value) for child, value in children]
        found = nested
    yield from found


def positions(model: nn.Module) -> int | None:
    """The longest sequence that a table of absolute positions allows; None: there is no such table."""
    table = getattr(embeddings_of(model), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return None
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def attribute(root: object, path: str) -> object:
    for part in path.split("."):
        root = getattr(root, part)
    return root


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path in the base model, layer module) of every transformer layer, in order."""
    return list(walk(base_of(model), family_of(model).layers))


def _linear(layer: nn.Module, path: str) -> nn.Linear | None:
    try:
        found = attribute(layer, path)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Linear) else None


def _repeats(family: Family, config: object, number: int, count: int) -> int:
    """How often layer `number` of `count` runs in one pass; the depths are dealt out to the groups as ALBERT does."""
    if not family.repeats:
        return 1
    depth, groups = (getattr(config, name) for name in family.repeats)
    return sum(i * groups // depth == number * groups // count for i in range(depth))


def _site(family: Family, axis: Axis, kind: str, number: int, path: str, layer: nn.Module, config: object) -> Site:
    span = int(attribute(layer, family.head_dim)) if kind == "head" else 1
    consumer = _linear(layer, axis.consumes)
    if consumer is None:
        raise SensibertError(f"model: {path} has no linear layer {axis.consumes}, want a plain {family.model_type}")
    units = consumer.in_features // span
    members, params, token = [], 0, 0
    for name in (*axis.produces, *axis.tables):
        linear = _linear(layer, name)
        if linear is None:
            continue
        if linear.out_features != axis.parts * units * span:
            raise SensibertError(
                f"model: {path}.{name} has {linear.out_features} outputs, want {axis.parts} x {units} units of {span}; "
                "key and value heads shared by several query heads are not supported"
            )
        members.append(Member(f"{path}.{name}.weight", 0, span, axis.parts))
        params += axis.parts * span * linear.in_features
        token += 2 * axis.parts * span * linear.in_features if name in axis.produces else 0
        if linear.bias is not None:
            members.append(Member(f"{path}.{name}.bias", 0, span, axis.parts))
            params += axis.parts * span
    reads = Member(f"{path}.{axis.consumes}.weight", 1, span)
    members.append(reads)
    params += span * consumer.out_features
    token += 2 * span * consumer.out_features
    flops = Flops(token=token, pair=4 * span if kind == "head" else 0)
    if kind == "head" and family.relative_flops:
        flops = flops + family.relative_flops(config, span)
    name = f"layer.{number}.{kind}"
    return Site(name, kind, number, units, tuple(members), reads, params, flops, axis.minimum)


def sites(model: nn.Module) -> tuple[Site, ...]:
    """Every trimmable axis: per layer its heads, then its FFN neurons. Names do not depend on the task head."""
    family, config, stack = family_of(model), model.config, layers(model)
    found = []
    for number, (path, layer) in enumerate(stack):
        repeats = _repeats(family, config, number, len(stack))
        for kind, axis in (("head", family.head), ("ffn", family.ffn)):
            site = _site(family, axis, kind, number, path, layer, config)
            found.append(replace(site, flops=site.flops * repeats))
    return tuple(found)


def _weights(model: nn.Module, found: tuple[Site, ...]) -> tuple[Weight, ...]:
    """The matrices of the sites, in their order."""
    family, stack, state = family_of(model), layers(model), dict(base_of(model).named_parameters())
    tables = {f"{path}.{name}.weight" for path, _ in stack for name in (*family.head.tables, *family.ffn.tables)}
    weights = []
    for site in found:
        flops = 2 * _repeats(family, model.config, site.layer, len(stack))
        for name in (m.parameter for m in site.members if m.parameter.endswith(".weight")):
            weights.append(Weight(name, site.layer, *state[name].shape, 0 if name in tables else flops))
    return tuple(weights)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _multiply_adds(module: nn.Module) -> int:
    """Per position; 0 for what is no matrix product."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    if isinstance(module, nn.Conv1d):
        return module.weight.numel()
    return 0


def _rest(model: nn.Module, owned: set[str]) -> tuple[Flops, Flops]:
    """FLOPs of the linear layers no site owns: (inside the encoder, in the whole model)."""
    family, base = family_of(model), base_of(model)
    encoder_prefix, encoder, rest = family.encoder + ".", Flops(), Flops()
    sequence_head = type(model).__name__.endswith(SEQUENCE_HEADS)
    if getattr(model.config, "classifier_pooling", "") == "late":  # EuroBERT: every token is classified, then the mean
        sequence_head = False
    prefix = next((name + "." for name, module in model.named_modules() if module is base and name), "")
    for name, module in model.named_modules():
        inside = name.startswith(prefix)
        local = name.removeprefix(prefix) if inside else name
        cost = 2 * _multiply_adds(module)
        if not cost or (inside and f"{local}.weight" in owned):
            continue
        once = "pooler" in local or (sequence_head and not inside)
        flops = Flops(sequence=cost) if once else Flops(token=cost)
        rest = rest + flops
        encoder = encoder + flops if inside and local.startswith(encoder_prefix) else encoder
    return encoder, rest


def describe(model: nn.Module) -> Layout:
    """Sites and costs of a model as it is now (a trimmed model is described with its current sizes)."""
    family, base = family_of(model), base_of(model)
    found = sites(model)
    encoder_rest, model_rest = _rest(model, {m.parameter for site in found for m in site.members})
    state = dict(base.named_parameters())
    digest = hashlib.sha256(json.dumps([asdict(site) for site in found]).encode())
    for site in found:
        weight = state[site.consumer.parameter].detach().flatten()
        digest.update(weight[:: max(1, weight.numel() // 64)].to("cpu", torch.float32).numpy().tobytes())
    return Layout(
        family=family.model_type,
        digest=digest.hexdigest()[:16],
        sites=found,
        hidden=int(model.config.hidden_size),
        encoder_params=_numel(attribute(base, family.encoder)),
        total_params=_numel(model),
        encoder_rest=encoder_rest,
        model_rest=model_rest,
        weights=_weights(model, found),
    )
