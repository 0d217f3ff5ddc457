"""The attention of ONNX Runtime: one operator in the graph where tracing would leave about twelve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

ONNX_ATTENTION = "sensibert_onnx"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query, key, value [B, H, S, D], attention_mask [B, 1, S, S], which is added -> [B, S, H, D]; only in a graph."""
    rows, heads, tokens, span = query.shape
    if not heads:
        return query.transpose(1, 2), None
    groups = heads // key.shape[1]
    if groups > 1:  # query heads that share keys and values
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    inputs: list[Tensor | None] = [x.transpose(1, 2).flatten(2) for x in (query, key, value)]
    found = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [*inputs, None, None, attention_mask],  # between them bias and key_padding_mask
        {"num_heads": heads, "scale": float(span**-0.5 if scaling is None else scaling)},
        dtype=query.dtype,
        shape=(rows, tokens, heads * span),
        version=1,
    )
    return found.unflatten(2, (heads, span)), None


AttentionInterface.register(ONNX_ATTENTION, _attend)
AttentionMaskInterface.register(ONNX_ATTENTION, eager_mask)
