"""Runs padded batches without their padding: packed, and with the outputs of padded rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import SensibertError
from ..nn.packed_attention import Packing
from .packed import ENDS, PackedModel, pooling_of

# A batch with any other field runs padded.
FIELDS = {"input_ids", "attention_mask", "token_type_ids", "labels", "start_positions", "end_positions"}


class PaddedRows:
    """A model on padded batches on a CPU, which it runs as packed ones where it can.

    bf16: whether the model computes in bf16, so that its logits are compared less strictly when packing is tried.
    lengths: of the rows of the last batch in the order they ran in, the longest first; None if it ran padded."""

    def __init__(self, model: nn.Module, bf16: bool = False) -> None:
        self.model = model
        self.lengths: list[int] | None = None
        self._packed: PackedModel | None = None
        config: Any = getattr(model, "config", None)
        if config is None or config.output_hidden_states or config.output_attentions:
            return  # their rows would not be those of the batch
        try:
            self._packed = PackedModel(model, pooling_of(model, bf16))
        except SensibertError:
            return

    def __call__(self, **batch: Tensor) -> Any:
        """The outputs of the padded batch. Those of its padding are 0, or of answers the lowest number."""
        ids = batch.get("input_ids")
        real = None if self._packed is None or ids is None or not FIELDS.issuperset(batch) else _real(ids, batch)
        if self._packed is None or ids is None or real is None:
            self.lengths = None
            return self.model(**batch)
        lengths = real.sum(1)
        order = lengths.argsort(descending=True, stable=True)
        real, back = real[order], order.argsort()
        fields = {"position_ids": torch.arange(ids.shape[1]).expand(ids.shape), **batch}
        fields.pop("attention_mask", None)
        packed = {name: value[order] for name, value in fields.items()}
        packed = {name: value[real][None] if _of_tokens(value, ids) else value for name, value in packed.items()}
        self.lengths = sizes = lengths[order].tolist()
        outputs = self._packed(packed, Packing.of(sizes, sum(sizes)))
        for name in (name for name in (*ENDS, "logits") if name in outputs):
            values = outputs[name]
            if name in ENDS:  # [rows, longest row]
                lowest = torch.finfo(values.dtype).min
                values = nn.functional.pad(values, (0, ids.shape[1] - values.shape[1]), value=lowest)
            elif values.dim() == 3:  # [1, tokens, classes]
                padded = values.new_zeros(*ids.shape, values.shape[2])
                padded[real] = values[0]
                values = padded
            outputs[name] = values[back]
        return outputs


def _real(ids: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
    """bool [rows, tokens]: not padding; None for rows that are empty, or padded elsewhere than at their end."""
    mask = batch.get("attention_mask", torch.ones_like(ids))
    if ids.dim() != 2 or mask.shape != ids.shape or not ids.numel():
        return None
    lengths = mask.sum(1)
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    return real if bool(lengths.all()) and torch.equal(mask, real.to(mask.dtype)) else None


def _of_tokens(value: Tensor, ids: Tensor) -> bool:
    return value.shape == ids.shape and not value.is_floating_point()
