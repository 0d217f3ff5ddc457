"""Where each model family keeps its trimmable axes: one table a file."""

from .base import Axis, Family, base_of, base_type, describe, embeddings_of, families, family_of, layers, sites
from .evaluating import bare_copy, evaluating, require_finite

__all__ = [
    "Axis",
    "Family",
    "bare_copy",
    "base_of",
    "base_type",
    "describe",
    "embeddings_of",
    "evaluating",
    "families",
    "family_of",
    "layers",
    "require_finite",
    "sites",
]
