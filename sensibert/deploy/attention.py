"""The attention of ONNX Runtime: one operator in the graph where tracing would leave about twelve.

The reshapes around it stay: without them ONNX Runtime 1.32 fuses sums and layer norms in graphs with int8 weights, and
its fused kernel is slower on a CPU (half of MiniLM, one text, one thread: 9.4 ms in place of 5.9).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, eager_mask

from ..models.modules import of_all_heads

ONNX_ATTENTION = "sensibert_onnx"


def _mask(*, mask_function: Callable, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask of padding [B, S] where every token sees all others, else what is added to the scores [B, 1, S, S]."""
    if mask_function is bidirectional_mask_function:
        return attention_mask
    return eager_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query, key, value [B, H, S, D], attention_mask of `_mask` -> [B, S, H, D]; only in a graph."""
    rows, heads, tokens, span = query.shape
    if not heads:
        return query.transpose(1, 2), None
    key, value = of_all_heads(query, key, value)
    scaling = span**-0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.dim() == 4:
        # The operator takes such a mask too, but ONNX Runtime 1.20 then computes something else.
        shares = (query @ key.mT * scaling + attention_mask).softmax(-1)
        return (shares @ value).transpose(1, 2), None
    found = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [
            *(x.transpose(1, 2).flatten(2) for x in (query, key, value)),
            None,  # bias
            None if attention_mask is None else attention_mask.to(torch.int32),
        ],
        {"num_heads": heads, "scale": float(scaling), "mask_filter_value": torch.finfo(query.dtype).min},
        dtype=query.dtype,
        shape=(rows, tokens, heads * span),
        version=1,
    )
    return found.unflatten(2, (heads, span)), None


AttentionInterface.register(ONNX_ATTENTION, _attend)
AttentionMaskInterface.register(ONNX_ATTENTION, _mask)
