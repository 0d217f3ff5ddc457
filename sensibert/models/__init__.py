"""Reads a transformers model (family, layout, structure), and makes a trimmed one reloadable."""

from .eval_mode import Losses, eval_mode, quick_attention
from .families import Axis, Family, base_type, families
from .layout_of import layout_of, sites
from .modules import base_of, embeddings_of, family_of, layers

__all__ = [
    "Axis",
    "Family",
    "Losses",
    "base_of",
    "base_type",
    "layout_of",
    "embeddings_of",
    "eval_mode",
    "families",
    "family_of",
    "layers",
    "quick_attention",
    "sites",
]
