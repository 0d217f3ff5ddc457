"""Model -> Layout: its sites and their costs, read with the table of its family.

A table names the linear layers that produce a unit's activation (rows) and the one that consumes it (columns).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

import torch
from torch import nn

from ..core.arguments import checked
from ..core.errors import SensibertError
from ..core.layout import Flops, Layout, Member, Site, Weight
from .families.family import Axis, Family
from .modules import attribute, base_of, family_of, is_linear, layers

# Task heads that read one vector of each sequence; all others read every token.
SEQUENCE_HEADS = ("SequenceClassification", "MultipleChoice", "NextSentencePrediction")


def _linear(family: Family, where: str, layer: nn.Module, path: str) -> nn.Linear | None:
    """The linear layer at a path; None if nothing is there. SensibertError for a module of another kind."""
    try:
        module = attribute(layer, path)
    except AttributeError:
        return None
    if isinstance(module, nn.Module) and not is_linear(module):
        raise SensibertError(
            f"model: {where} has no linear layer {path}, want a plain {family.model_type}, with adapters merged into "
            f"its weights (there is a {type(module).__name__} of {type(module).__module__.partition('.')[0]})"
        )
    if module is not None and (extra := [n for n, _ in module.named_parameters() if n not in ("weight", "bias")]):
        raise SensibertError(
            f"model: {where}.{path} has the parameter {extra[0]}, want a plain linear layer: merge_and_unload() "
            "adapters, or call prune.remove or parametrize.remove_parametrizations of torch.nn.utils first"
        )
    return module


def _repeats(family: Family, config: object, number: int, count: int) -> int:
    """How many times layer `number` of `count` runs in one pass. Layers are assigned to groups as in ALBERT."""
    if not family.repeats:
        return 1
    depth, groups = (getattr(config, name) for name in family.repeats)
    return sum(i * groups // depth == number * groups // count for i in range(depth))


def _site(family: Family, axis: Axis, kind: str, number: int, path: str, layer: nn.Module, config: object) -> Site:
    span = int(attribute(layer, family.head_dim)) if kind == "head" else 1
    consumer = _linear(family, path, layer, axis.consumes)
    if consumer is None:
        raise SensibertError(f"model: {path} has no linear layer {axis.consumes}, want a plain {family.model_type}")
    units = consumer.in_features // span
    members, params, token = [], 0, 0
    for name in (*axis.produces, *axis.tables):
        linear = _linear(family, path, layer, name)
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
    """Every trimmable axis of a model: for each layer its heads, then its FFN neurons. The same for every task head.

    SensibertError for a family without a table, or a layer that does not agree with its table."""
    family, config, stack = family_of(model), model.config, layers(model)
    result = []
    for number, (path, layer) in enumerate(stack):
        repeats = _repeats(family, config, number, len(stack))
        for kind, axis in (("head", family.head), ("ffn", family.ffn)):
            site = _site(family, axis, kind, number, path, layer, config)
            result.append(replace(site, flops=site.flops * repeats))
    return tuple(result)


def _weights(model: nn.Module, all_sites: tuple[Site, ...]) -> tuple[Weight, ...]:
    """The matrices of the sites, in their order."""
    family, stack, state = family_of(model), layers(model), dict(base_of(model).named_parameters())
    tables = {f"{path}.{name}.weight" for path, _ in stack for name in (*family.head.tables, *family.ffn.tables)}
    weights = []
    for site in all_sites:
        flops = 2 * _repeats(family, model.config, site.layer, len(stack))
        for name in (m.parameter for m in site.members if m.parameter.endswith(".weight")):
            rows, cols = state[name].shape
            weights.append(Weight(name, site.layer, rows, cols, 0 if name in tables else flops))
    return tuple(weights)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _multiply_adds(module: nn.Module) -> int:
    """Multiply-adds per position; 0 for a module without a matrix product."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    if isinstance(module, nn.Conv1d):
        return module.weight.numel()
    return 0


def _rest(model: nn.Module, owned: set[str]) -> tuple[Flops, Flops]:
    """FLOPs of the linear layers that belong to no site: (inside the encoder, in the whole model)."""
    family, base = family_of(model), base_of(model)
    encoder_prefix, encoder, rest = family.encoder + ".", Flops(), Flops()
    sequence_head = type(model).__name__.endswith(SEQUENCE_HEADS)
    if getattr(model.config, "classifier_pooling", "") == "late":  # EuroBERT averages over classified tokens
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


@checked
def layout_of(model: nn.Module) -> Layout:
    """Sites and costs of a model with its current sizes, trimmed or not. SensibertError as in `sites`."""
    family, base = family_of(model), base_of(model)
    all_sites = sites(model)
    encoder_rest, model_rest = _rest(model, {m.parameter for site in all_sites for m in site.members})
    state = dict(base.named_parameters())
    digest = hashlib.sha256(json.dumps([asdict(site) for site in all_sites]).encode())
    for site in all_sites:
        weight = state[site.consumer.parameter].detach().flatten()
        digest.update(weight[:: max(1, weight.numel() // 64)].to("cpu", torch.float32).numpy().tobytes())
    return Layout(
        family=family.model_type,
        digest=digest.hexdigest()[:16],
        sites=all_sites,
        hidden=int(attribute(model, "config.hidden_size")),
        encoder_params=_numel(attribute(base, family.encoder)),
        total_params=_numel(model),
        encoder_rest=encoder_rest,
        model_rest=model_rest,
        weights=_weights(model, all_sites),
    )
