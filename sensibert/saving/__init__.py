"""Model -> folder, and back."""

from .folder import export, load, load_structure

__all__ = ["export", "load", "load_structure"]
