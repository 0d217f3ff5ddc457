"""The optimizer of every run, and changes of optimizer state when a parameter is trimmed or masked."""

from .masked_adamw import MaskedAdamW, optimizer_cls_and_kwargs
from .state import mask_state, slice_state, unwrapped

__all__ = ["MaskedAdamW", "mask_state", "optimizer_cls_and_kwargs", "slice_state", "unwrapped"]
