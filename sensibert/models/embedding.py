"""An encoder and its pooling as one module, with the loss against the embeddings of another model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .pooling import Pooling


class EmbeddingModel(nn.Module):
    """The outputs have the embeddings [B, H] as `logits`, under which analysis, packing and prediction look for them.

    base_model: the encoder, which is trimmed and saved by itself; or its graph in another runtime."""

    def __init__(self, base_model: PreTrainedModel | Any, pooling: Pooling) -> None:
        super().__init__()
        self.base_model, self.pooling = base_model, pooling

    @property
    def config(self) -> PreTrainedConfig:
        """The encoder's own: a trim replaces it."""
        return self.base_model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.get_input_embeddings()

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        """labels: the target embeddings [B, H]; with them the outputs have the loss."""
        embeddings = self.pooling(self.base_model(**inputs)[0], inputs.get("attention_mask"))
        if labels is None:
            return {"logits": embeddings}
        return {"loss": matching_loss(embeddings, labels), "logits": embeddings}


def matching_loss(embeddings: Tensor, target: Tensor) -> Tensor:
    """|e - t|^2 / (2 |t|^2), mean over rows: 1 - cosine where both have length 1."""
    target = target.float()
    distance = (embeddings.float() - target).square().sum(-1)
    return (0.5 * distance / target.square().sum(-1)).mean()
