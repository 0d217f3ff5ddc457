"""The optimizer of every run, and optimizer state that follows a parameter when it shrinks or is masked."""

from .masked_adamw import MaskedAdamW, optimizer_cls_and_kwargs
from .state import mask_state, slice_state, unwrapped

__all__ = ["MaskedAdamW", "mask_state", "optimizer_cls_and_kwargs", "slice_state", "unwrapped"]
