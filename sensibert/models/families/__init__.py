"""One table for each model family: the names of the modules and attributes of its trimmable axes."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from .family import Axis, Family

__all__ = ["PREFIX", "Axis", "Family", "base_type", "families"]

PREFIX = "sensibert_"  # model_type of a trimmed folder: this prefix and the family's own model type


@cache
def families() -> dict[str, Family]:
    """model_type -> Family, of every module in this package that defines FAMILY."""
    package = __name__
    table: dict[str, Family] = {}
    for module in iter_modules(import_module(package).__path__):
        family = getattr(import_module(f"{package}.{module.name}"), "FAMILY", None)
        if family is not None:
            table.update(dict.fromkeys((family.model_type, *family.aliases), family))
    return table


def base_type(model_type: str) -> str:
    """The model type of the original model: `bert` for `bert` and for `sensibert_bert`."""
    return model_type.removeprefix(PREFIX)
