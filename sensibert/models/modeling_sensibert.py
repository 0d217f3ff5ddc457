"""Transformers models whose layers kept fewer attention heads and feed-forward neurons than their config says.

This file stands alone on torch and transformers (and the safetensors they bring): sensibert uses it as it is, and
copies it into every trimmed folder, where `trust_remote_code=True` runs it. The classes are made on request: the name
`SensibertX` is transformers' class `X`, cut at construction to what the config's entry `sensibert` says:

    table       where a layer keeps its axes: paths of the linear layers that produce and consume the units
    heads, ffn  units left, one number a layer (the config's own sizes stay those of the base model); head_dim: rows
    kept_heads  which of the base model's heads they are; structure.safetensors has that for the neurons too
"""

import os
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import cached_file

STRUCTURE_FILE = "structure.safetensors"


class PickHeads:
    """Forward pre-hook of an attention module: of `position_bias` [B, H, S, S] only the kept heads go in."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, module, args, kwargs):
        def pick(bias):
            return None if bias is None else bias[:, self.kept.to(bias.device)]

        if len(args) > 2:  # (hidden_states, attention_mask, position_bias)
            args = (*args[:2], pick(args[2]), *args[3:])
        if "position_bias" in kwargs:
            kwargs = {**kwargs, "position_bias": pick(kwargs["position_bias"])}
        return args, kwargs

    @classmethod
    def attach(cls, attention, kept):
        """Install, or narrow what is installed; returns the undo."""
        for hook in attention._forward_pre_hooks.values():
            if type(hook).__name__ == cls.__name__:  # by name: it may come from a folder's copy of this file
                old, hook.kept = hook.kept, hook.kept[kept]
                return lambda: setattr(hook, "kept", old)
        return attention.register_forward_pre_hook(cls(kept), with_kwargs=True).remove


def _get(root, path):
    for part in path.split(".") if path else ():
        root = getattr(root, part, None)
    return root


def _layers(base, pattern):
    """Modules at a dotted path whose `*` stands for every index of a module list, in order."""
    found = [base]
    for part in pattern.split("."):
        found = [new for old in found for new in (old.children() if part == "*" else [getattr(old, part)])]
    return found


def _narrow(linear, name, dim, size, parts=1):
    """Keep the first size / parts positions of each of the equal sections along an axis of a parameter."""
    old = getattr(linear, name)
    sections = old.detach().unflatten(dim, (parts, -1)).narrow(dim + 1, 0, size // parts)
    setattr(linear, name, nn.Parameter(sections.flatten(dim, dim + 1).clone(), old.requires_grad))


def _cut(layer, axis, count, span):
    """Cut one axis of a layer to `count` units of `span` rows; does nothing where it has that size already."""
    reader, size = _get(layer, axis["consumes"]), count * span
    if reader.in_features != size:
        for linear in filter(None, (_get(layer, path) for path in axis["produces"])):
            for name in ("weight", "bias") if linear.bias is not None else ("weight",):
                _narrow(linear, name, 0, axis["parts"] * size, axis["parts"])
            linear.out_features = axis["parts"] * size
        _narrow(reader, "weight", 1, size)
        reader.in_features = size
    for paths, value in ((axis["counts"], count), (axis["widths"], size)):
        for owner, _, name in (path.rpartition(".") for path in paths):
            setattr(_get(layer, owner), name, value)


class _Trimmed:
    """Mixed into a transformers class: sizes from config.sensibert; `sensibert_structure` names the kept units."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        entry = getattr(config, "sensibert", None)
        if entry is None:
            return
        if entry["format"] != 1:
            raise ValueError(f"sensibert: the folder has format {entry['format']}, this code reads 1; update sensibert")
        table, self.sensibert_structure = entry["table"], {}
        for number, layer in enumerate(_layers(self.base_model, table["layers"])):
            # On the CPU by name: from_pretrained builds under the meta device, and these are no parameters.
            heads = torch.tensor(entry["kept_heads"][number], dtype=torch.int64, device="cpu")
            neurons = torch.arange(entry["ffn"][number], device="cpu")
            _cut(layer, table["head"], len(heads), entry["head_dim"])
            _cut(layer, table["ffn"], len(neurons), 1)
            if table["position_bias"]:
                PickHeads.attach(_get(layer, table["position_bias"]), heads)
            self.sensibert_structure |= {f"layer.{number}.head": heads, f"layer.{number}.ffn": neurons}

    @classmethod
    def from_pretrained(cls, path, *args, **kwargs):
        loaded = super().from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a pair with output_loading_info
        if path is not None:
            where = kwargs.keys() & {"subfolder", "revision", "token", "cache_dir", "local_files_only"}
            file = cached_file(path, STRUCTURE_FILE, **{name: kwargs[name] for name in where})
            model.sensibert_structure = {name: kept.long() for name, kept in load_file(file).items()}
        return loaded

    def save_pretrained(self, save_directory, is_main_process=True, **kwargs):
        """As transformers does it, and what makes the folder load again: the kept units and this file."""
        structure = self.sensibert_structure
        kept = {kind: [structure[f"layer.{n}.{kind}"] for n in range(len(structure) // 2)] for kind in ("head", "ffn")}
        sizes = {"heads": [len(k) for k in kept["head"]], "ffn": [len(k) for k in kept["ffn"]]}
        self.config.sensibert = self.config.sensibert | sizes | {"kept_heads": [k.tolist() for k in kept["head"]]}
        self.config.auto_map = {auto: name.split("--")[-1] for auto, name in self.config.auto_map.items()}
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            save_file({name: kept.int() for name, kept in structure.items()}, Path(save_directory, STRUCTURE_FILE))
            shutil.copyfile(__file__, Path(save_directory, Path(__file__).name))
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)


def _config_class(name, stock):
    """Whoever holds such a config can load the model: the Auto classes learn its heads with the first instance."""

    def post_init(self, **kwargs):
        stock.__post_init__(self, **kwargs)
        for auto, path in getattr(self, "auto_map", {}).items():
            if auto != "AutoConfig":
                model_class = __getattr__(path.rpartition(".")[2])
                getattr(transformers, auto).register(type(self), model_class, exist_ok=True)

    members = {"model_type": f"sensibert_{stock.model_type}", "__post_init__": post_init}
    return type(name, (stock,), {"__module__": __name__, **members})


def __getattr__(name):
    """`SensibertX` -> a subclass of transformers' config or model class X, made once; AttributeError for the rest."""
    if name in globals():
        return globals()[name]
    stock = getattr(transformers, name.removeprefix("Sensibert"), None) if name.startswith("Sensibert") else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(stock, transformers.PreTrainedConfig):
        made = _config_class(name, stock)
    else:
        config_class = __getattr__(f"Sensibert{stock.config_class.__name__}")
        made = type(name, (_Trimmed, stock), {"__module__": __name__, "config_class": config_class})
    return globals().setdefault(name, made)
