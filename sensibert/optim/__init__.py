"""The optimizer that keeps dropped weights at zero, and state that follows a parameter."""

from .masked_adamw import MaskedAdamW
from .state import mask_state, slice_state, unwrapped

__all__ = ["MaskedAdamW", "mask_state", "slice_state", "unwrapped"]
