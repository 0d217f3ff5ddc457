"""Transformers models with fewer attention heads and feed-forward neurons than the sizes in their config.

This file needs only torch and transformers. sensibert uses it and copies it into every trimmed folder, for
`trust_remote_code=True`. `SensibertX` is transformers' class `X`, built with the shapes in config.sensibert:

    table       where a layer keeps its axes: paths of the linear layers that produce and consume the units
    heads, ffn  units left, one number a layer (the config's own sizes stay those of the base model); head_dim: rows
    kept_heads  indices of those heads in the base model; structure.safetensors has the indices of all units
"""

from copy import copy
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

STRUCTURE_FILE, CODE_FILE = "structure.safetensors", Path(__file__).name


class EmptyLinear(torch.nn.Module):
    """In place of an nn.Linear without inputs or outputs, which int8 kernels fail to compute: its bias, or zeros."""

    def forward(self, x):  # [..., in] -> [..., out]
        # DDP waits for gradients of the weight and of what computes x; without gradients, a graph needs no x.
        zero = x[..., :0].sum(-1, keepdim=True) if torch.is_grad_enabled() else x.new_zeros((*x.shape[:-1], 1))
        return zero + self.weight.sum(1) + (0 if self.bias is None else self.bias)


class PickHeads:
    """Forward pre-hook of an attention module: selects the kept heads of `position_bias` [B, H, S, S]."""

    def __init__(self, kept: torch.Tensor) -> None:
        self.kept = kept

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        bias = args[2] if len(args) > 2 else kwargs.get("position_bias")  # after hidden_states and attention_mask
        bias = None if bias is None else bias[:, self.kept.to(bias.device)]
        return ((*args[:2], bias, *args[3:]), kwargs) if len(args) > 2 else (args, kwargs | {"position_bias": bias})


def _layers(base: torch.nn.Module, pattern: str) -> list[torch.nn.Module]:
    """Modules at a dotted path, in order; `*` matches every index of a module list."""
    level = [base]
    for part in pattern.split("."):
        level = [new for old in level for new in (old.children() if part == "*" else [getattr(old, part)])]
    return level


def _narrow(linear: torch.nn.Module, name: str, dim: int, size: int, parts: int = 1) -> None:
    """Keep the first size / parts positions of each of the equal sections along an axis of a layer's parameter."""
    old = getattr(linear, name)
    sections = old.detach().unflatten(dim, (parts, -1)).narrow(dim + 1, 0, size // parts)
    setattr(linear, name, torch.nn.Parameter(sections.flatten(dim, dim + 1).clone(), old.requires_grad))
    setattr(linear, ("out_features", "in_features")[dim], size)
    linear.__class__ = linear.__class__ if size else EmptyLinear


def _cut(layer, axis: dict, count: int, span: int) -> None:
    """Cut one axis of a layer to `count` units of `span` rows, unless it already has that size (a shared layer)."""
    reader, size = layer.get_submodule(axis["consumes"]), count * span
    if reader.in_features != size:
        for linear in map(layer.get_submodule, axis["produces"]):
            for name in ("weight", "bias") if linear.bias is not None else ("weight",):
                _narrow(linear, name, 0, axis["parts"] * size, axis["parts"])
        _narrow(reader, "weight", 1, size)
    for paths, value in ((axis["counts"], count), (axis["widths"], size)):
        for owner, _, name in (path.rpartition(".") for path in paths):
            setattr(layer.get_submodule(owner), name, value)


class _Trimmed:
    """Mixed into a transformers class. The base model's `sensibert_structure`: site name -> kept units, int64."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if (entry := getattr(config, "sensibert", None)) is None:
            return
        if entry["format"] != 1:
            raise ValueError(f"sensibert: the folder has format {entry['format']}, this code reads 1; update sensibert")
        table, structure = entry["table"], {}
        rows = zip(_layers(self.base_model, table["layers"]), entry["kept_heads"], entry["ffn"])
        for number, (layer, kept, width) in enumerate(rows):
            heads, neurons = (torch.tensor([*n], device="cpu").long() for n in (kept, range(width)))  # never meta
            _cut(layer, table["head"], len(heads), entry["head_dim"])
            _cut(layer, table["ffn"], width, 1)
            for part in [m for m in layer.modules() if hasattr(m, "config") and not len(heads)]:
                part.config = copy(part.config)  # fused attention may refuse 0 heads, eager accepts them
                part.config._attn_implementation = "eager"
            if path := table["position_bias"]:
                layer.get_submodule(path).register_forward_pre_hook(PickHeads(heads), with_kwargs=True)
            structure |= {f"layer.{number}.head": heads, f"layer.{number}.ffn": neurons}
        if not isinstance(base := self.base_model, _Trimmed):  # the encoder alone can be saved, too
            base.__class__ = __getattr__(f"Sensibert{type(base).__name__}")
        base.sensibert_structure = structure

    @classmethod
    def from_pretrained(cls, path, *args, output_loading_info=False, **kwargs):
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        lost = {k for k in info["missing_keys"] if "pooler" not in k} | {k for k, *_ in info["mismatched_keys"]}
        if lost := sorted(k for k in lost if k.startswith(cls.base_model_prefix * (model.base_model is not model))):
            raise ValueError(f"sensibert: {path} lacks {len(lost)} weights of its encoder ({lost[0]}, ...)")
        if path is not None:
            where = kwargs.keys() & {"subfolder", "revision", "token", "cache_dir", "local_files_only"}
            file = transformers.utils.cached_file(path, STRUCTURE_FILE, **{name: kwargs[name] for name in where})
            model.base_model.sensibert_structure = {name: kept.long() for name, kept in load_file(file).items()}
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, is_main_process=True, **kwargs):
        """Like transformers, plus the files needed to reload the folder: the kept units and this file."""
        self.config.auto_map = {auto: name.split("--")[-1] for auto, name in self.config.auto_map.items()}
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            structure = {name: kept.int() for name, kept in self.base_model.sensibert_structure.items()}
            save_file(structure, Path(save_directory, STRUCTURE_FILE))
            Path(save_directory, CODE_FILE).write_bytes(Path(__file__).read_bytes())
        # Current weight names: converting them to an older layout of the family does not fit the trimmed shapes.
        super().save_pretrained(save_directory, is_main_process, **{"save_original_format": False} | kwargs)

    def _get_files_timestamps(self, folder):  # so that push_to_hub=True uploads the two files above
        return {f: t for f, t in super()._get_files_timestamps(folder).items() if f not in (STRUCTURE_FILE, CODE_FILE)}


def _made(name, stock):
    if not issubclass(stock, transformers.PretrainedConfig):
        config_class = __getattr__(f"Sensibert{stock.config_class.__name__}")
        made = type(name, (_Trimmed, stock), {"__module__": __name__, "config_class": config_class})
        # transformers registers which hidden states to record when it builds a model; ours change class afterwards.
        records = getattr(transformers.modeling_utils, "_CAN_RECORD_REGISTRY", {})
        dict.__setitem__(records, str(made), getattr(stock, "_can_record_outputs", None))
        return made

    def post_init(self, **kwargs):  # the first config of a type registers its models with the Auto classes
        stock.__post_init__(self, **kwargs)
        for auto, path in getattr(self, "auto_map", {}).items():
            head = path.rpartition(".")[2]  # a folder may name more heads than this version of transformers has
            if auto.startswith("AutoModel") and hasattr(transformers, auto) and hasattr(transformers, head[9:]):
                getattr(transformers, auto).register(type(self), __getattr__(head), exist_ok=True)

    members = {"model_type": f"sensibert_{stock.model_type}", "__post_init__": post_init}
    return type(name, (stock,), {"__module__": __name__, **members})


def __getattr__(name):
    """`SensibertX` -> a subclass of transformers' config or model class X, made once; AttributeError otherwise."""
    stock = getattr(transformers, name.removeprefix("Sensibert"), None) if name.startswith("Sensibert") else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().get(name) or globals().setdefault(name, _made(name, stock))
