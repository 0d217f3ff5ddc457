"""Model and plan -> smaller model."""

from .compensate import compensate
from .self_check import silenced
from .trim import restructure, trim

__all__ = ["compensate", "restructure", "silenced", "trim"]
