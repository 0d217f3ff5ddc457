"""Models of sentence-transformers: the transformers model inside, and its inputs in the batches of their trainers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import SensibertError

INSIDE = "transformers_model"  # property of SentenceTransformer, SparseEncoder and CrossEncoder
CLASSES = "ForSequenceClassification"  # the head of a CrossEncoder; that of a SparseEncoder gives term weights
NOT_TEXTS = ("label", "prompt", "task", "dataset_name")  # in a batch of CrossEncoderTrainer, beside columns of texts


def is_wrapped(model: nn.Module) -> bool:
    """Whether it is a SentenceTransformer, SparseEncoder or CrossEncoder."""
    return hasattr(type(model), INSIDE)


def has_classes(model: nn.Module) -> bool:
    """Whether labels can be drawn from the outputs, as far as the class tells: not from embeddings or term weights."""
    return not is_wrapped(model) or type(inner_model(model)).__name__.endswith(CLASSES)


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a SentenceTransformer, SparseEncoder or CrossEncoder; any other model itself.

    SensibertError if there is none inside, or more than one."""
    if not is_wrapped(model):
        return model
    name, inner = type(model).__name__, getattr(model, INSIDE)
    if not isinstance(inner, PreTrainedModel):
        modules = ", ".join(type(module).__name__ for module in model.children())
        raise SensibertError(
            f"model: {name} holds no transformers model (its modules are {modules}), want one that does"
        )
    own = {id(module) for module in inner.modules()}
    if any(isinstance(module, PreTrainedModel) and id(module) not in own for module in model.modules()):
        raise SensibertError(f"model: {name} holds several transformers models, want one with a single encoder")
    return inner


def inner_batches(model: nn.Module, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Batches of the collator of a model's Trainer -> inputs of `inner_model(model)`; of any other model unchanged.

    A SentenceTransformer reads every column of texts by itself. A CrossEncoder reads pairs of a text of the first
    column and one of another, as many at a time as the batch has rows. SensibertError for a batch without texts, and
    for texts that are packed into one row."""
    if not is_wrapped(model):
        yield from batches
        return
    accepted = inspect.signature(inner_model(model).forward).parameters
    for batch in batches:
        features = list(_columns(batch)) or list(_pairs(model, batch))
        if not features:
            raise SensibertError(f"batches: {type(model).__name__} gets {', '.join(batch)}, want columns of texts")
        for each in features:
            if "cu_seq_lens_q" in each:
                raise SensibertError(
                    "batches: texts are packed for FlashAttention, want unpad_inputs=False in the model"
                )
            yield {name: value for name, value in each.items() if name in accepted and isinstance(value, Tensor)}


def _columns(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The columns of texts that the collator has encoded: anchor_input_ids, anchor_attention_mask, positive_..."""
    for prefix in (name.removesuffix("input_ids") for name in batch if name.endswith("_input_ids")):
        yield {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}


def _pairs(model: Any, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The pairs of texts, encoded: the losses of a CrossEncoder do this themselves. A cell may be a list of texts."""
    columns = [cells for name, cells in batch.items() if name not in NOT_TEXTS and isinstance(cells, list)]
    if len(columns) < 2:
        return
    first, others = columns[0], columns[1:]
    found = [(text, cell) for cells in others for text, cell in zip(first, cells, strict=True)]
    pairs = [(text, other) for text, cell in found for other in ([cell] if isinstance(cell, str) else cell)]
    for begin in range(0, len(pairs), len(first)):
        yield model.preprocess(pairs[begin : begin + len(first)], prompt=batch.get("prompt"), task=batch.get("task"))
