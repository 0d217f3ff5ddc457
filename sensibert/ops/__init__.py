"""The four ops. Each file holds schema, public function, reference, fake and gradient, top to bottom."""

from .. import _native as _native  # registers the CUDA kernels, where they were built
from .block_sensitivity import block_sensitivity

__all__ = ["block_sensitivity", "masked_adamw", "masked_linear", "select_threshold"]

try:
    from .masked_linear import masked_linear
except ModuleNotFoundError:
    pass
try:
    from .select_threshold import Selection, select_threshold

    __all__ += ["Selection"]
except ModuleNotFoundError:
    pass
try:
    from .masked_adamw import masked_adamw
except (ImportError, ModuleNotFoundError):
    pass
