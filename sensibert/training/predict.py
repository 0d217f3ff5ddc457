"""Logits of a data set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from ..core.progress import Progress, counted, unseen
from ..core.rows import Rows
from ..models.eval_mode import quick_attention
from .trainer import LABELS, padded_further


@torch.no_grad()
def predict(
    model: nn.Module,
    data: Rows,
    collator: Callable,
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
    progress: Progress = unseen,
) -> np.ndarray | tuple[np.ndarray, ...]:
    """Logits in the order of `data`, computed in batches of similar length, so that little is padded.

    Shapes: [n, C]; for tokens [n, S, C]; for answers (start [n, S], end [n, S]). Padding after a row's tokens is
    -100. progress: called for every batch, with the phase `evaluate`."""
    lengths = getattr(data, "lengths", None) or [len(data[i]["input_ids"]) for i in range(len(data))]
    order = np.argsort(lengths, kind="stable")[::-1]
    device, training = next(model.parameters()).device, [module for module in model.modules() if module.training]
    model.eval()
    rows: list[list[np.ndarray]] = [[] for _ in range(len(data))]
    try:
        begins = range(0, len(order), batch_size)
        for begin in counted(begins, progress, "evaluate", len(begins)):
            chosen = [int(i) for i in order[begin : begin + batch_size]]
            batch = collator([data[i] for i in chosen])
            batch = padded_further(batch, collator, device)
            batch = {k: v.to(device) for k, v in batch.items() if k not in LABELS}
            mixed = torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None)
            with mixed, quick_attention(device):
                outputs = model(**batch)
            names = [name for name in ("logits", "start_logits", "end_logits") if name in outputs]
            logits = [outputs[name].float().cpu().numpy() for name in names]
            for place, number in enumerate(chosen):
                rows[number] = [array[place] for array in logits]
    finally:
        for module in training:  # one by one: a frozen part may be in eval mode on purpose
            module.training = True
    columns = [_stack(list(column)) for column in zip(*rows, strict=True)]
    return columns[0] if len(columns) == 1 else tuple(columns)


def _stack(rows: list[np.ndarray]) -> np.ndarray:
    """Stack rows of different length, padded with -100 at the end of their first axis."""
    longest = max(len(row) for row in rows)
    pad = [(0, 0)] * (rows[0].ndim - 1)
    return np.stack([np.pad(row, [(0, longest - len(row)), *pad], constant_values=-100) for row in rows])
