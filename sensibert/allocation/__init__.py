"""Sensitivity and budget -> Plan. Pure: no model, no GPU."""

from .allocate import allocate
from .explain import explain

__all__ = ["allocate", "explain"]
