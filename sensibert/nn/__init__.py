"""Drop-in layers, and swapping them in and out of a model."""

from .convert import replace, restore
from .masked_linear import MaskedLinear

__all__ = ["MaskedLinear", "replace", "restore"]
