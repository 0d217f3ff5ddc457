"""The attention of ONNX Runtime: one operator in the graph where tracing would leave about twelve.

The reshapes around it stay: without them ONNX Runtime 1.32 fuses sums and layer norms in graphs with int8 weights, and
its fused kernel is slower on a CPU (half of MiniLM, one text, one thread: 9.4 ms in place of 5.9).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from ..models.modules import of_all_heads

ONNX_ATTENTION = "sensibert_onnx"
# ONNX Runtime 1.20 misreads the mask of that operator, and refuses graphs of this opset.
OPSET = 22


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query, key, value [B, H, S, D] -> [B, S, H, D]; only in a graph. attention_mask [B, 1, S, S] is added to the
    scores."""
    rows, heads, tokens, span = query.shape
    if not heads:
        return query.transpose(1, 2), None
    key, value = of_all_heads(query, key, value)
    scaling = span**-0.5 if scaling is None else scaling
    found = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        # None: biases, and a mask of padding, which WebGPU does not take.
        [*(x.transpose(1, 2).flatten(2) for x in (query, key, value)), None, None, attention_mask],
        {"num_heads": heads, "scale": float(scaling)},
        dtype=query.dtype,
        shape=(rows, tokens, heads * span),
        version=1,
    )
    return found.unflatten(2, (heads, span)), None


AttentionInterface.register(ONNX_ATTENTION, _attend)
AttentionMaskInterface.register(ONNX_ATTENTION, eager_mask)
