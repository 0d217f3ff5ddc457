"""Files of artifacts: safetensors with one JSON entry of metadata, written atomically."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .arguments import show
from .budget import Budget
from .cost_table import CostTable
from .errors import SensibertError
from .files import write_atomically
from .grid import Grid
from .json_text import parse_json
from .layout import Layout, layout_from
from .statistics import FORMER_METHODS

FORMAT_VERSION = 1
Artifact = TypeVar("Artifact")

_DECODE: dict[str, Callable[[Any], Any]] = {
    "layout": layout_from,
    "budget": lambda data: _budget(**data),
    "grid": lambda data: None if data is None else Grid(**data),
    "method": lambda name: FORMER_METHODS.get(name, name),
    "statistic": lambda name: FORMER_METHODS.get(name, name),
    "curves": lambda data: {name: [(gone, rise) for gone, rise in curve] for name, curve in data.items()},
}


def _budget(table: dict | None = None, **fields: Any) -> Budget:
    return Budget(**fields, table=None if table is None else CostTable.from_dict(table))


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names, dtypes, shapes and values; their devices may differ."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k].to(a[k].device)) for k in a
    )


def save_artifact(path: str | Path, kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    """Write tensors, from any device, and JSON-serializable facts. SensibertError if the file cannot be written."""
    text = json.dumps({name: _encode(value) for name, value in facts.items()})
    metadata = {"format": f"sensibert.{kind}", "version": str(FORMAT_VERSION), "facts": text}
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(on_cpu, temporary, metadata))


def load_artifact(
    path: str | Path, kind: str, make: Callable[[dict[str, Tensor], dict[str, Any]], Artifact]
) -> Artifact:
    """make(tensors, facts) of a file that `save_artifact` wrote; tensors are on the CPU, in the order of the layout.

    SensibertError if the file cannot be read, is of another kind or of a later version."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        reason = "it is a folder" if os.path.isdir(path or ".") else error if os.path.exists(path) else "no such file"
        raise SensibertError(f"{str(path) or repr(path)}: not a readable sensibert {kind} file ({reason})") from None
    if metadata.get("format") != f"sensibert.{kind}":
        raise SensibertError(f"{path}: holds {metadata.get('format', 'something else')}, want a sensibert {kind} file")
    try:
        if not re.fullmatch("[0-9]{1,9}", metadata["version"]):
            raise SensibertError(f"its version is {show(metadata['version'])}, want a number")
        if (version := int(metadata["version"])) <= FORMAT_VERSION:
            facts = parse_json(metadata["facts"])
            facts = {name: _DECODE[name](value) if name in _DECODE else value for name, value in facts.items()}
            layout: Layout = facts["layout"]
            names = [w.parameter for w in layout.weights] if facts.get("grid") else [site.name for site in layout.sites]
            if tensors.keys() != set(names):
                name = min(tensors.keys() ^ set(names))
                wrong = f"lacks {name!r}" if name in names else f"has {name!r}, which is not in its layout"
                raise SensibertError(f"it {wrong}")
            return make({name: tensors[name] for name in names}, facts)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        what = error if isinstance(error, SensibertError) else repr(error)
        raise SensibertError(f"{path}: not a readable sensibert {kind} file ({what})") from None
    raise SensibertError(f"{path}: format version {version}, this sensibert reads up to {FORMAT_VERSION}")


def _encode(value: object) -> object:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = dataclasses.asdict(value)
    if isinstance(value, Budget) and value.table is None:
        del fields["table"]  # as before there were budgets of measured costs
    return fields
