"""Room in the caches of libraries for all matrix shapes of a run.

A library prepares every matrix product of a new shape, which takes about a millisecond, and keeps the result. Layers of
a trimmed model have different widths, so a run has thousands of shapes, and oneDNN keeps 1,024 by default: products of
known shapes are then prepared again and again."""

from __future__ import annotations

import os

# Environment variable -> number of entries. Libraries read them at their first product. A full cache needs more memory,
# an empty one does not.
CAPACITIES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 16_384, "CUBLASLT_HEURISTICS_CACHE_CAPACITY": 65_536}


def enlarge_caches() -> None:
    """Set the variables that are not set yet."""
    for name, entries in CAPACITIES.items():
        os.environ.setdefault(name, str(entries))
