"""Sensitivity and budget -> Plan. Pure: no model, no GPU."""

from .allocate import allocate

__all__ = ["allocate"]
