"""The public ops. Each file holds schema, public function, reference, fake and gradient, top to bottom."""

from .. import _native as _native  # registers the CUDA kernels, if they were built
from .block_sensitivity import block_sensitivity
from .gather_kept import gather_kept
from .masked_adamw import masked_adamw
from .masked_linear.op import masked_linear
from .select_threshold import Selection, select_threshold

__all__ = [
    "Selection",
    "block_sensitivity",
    "gather_kept",
    "masked_adamw",
    "masked_linear",
    "select_threshold",
]
