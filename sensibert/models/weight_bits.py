"""Weights in 16 bits: a copy of a model that is saved in them, or the same model with what they can hold."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..core.errors import SensibertError
from .modules import Module

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@torch.no_grad()
def round_weights(model: nn.Module, weights: str) -> None:
    """Round all parameters to what `fp16` or `bf16` holds, in place; their dtype stays. SensibertError for a value
    that is too large for fp16; the model is then unchanged."""
    want_room(model, weights)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(DTYPES[weights]))


def with_weights(model: Module, weights: str) -> Module:
    """The model, or a copy if its dtype is another. SensibertError for a value that is too large for fp16."""
    if all(parameter.dtype == DTYPES[weights] for parameter in model.parameters()):
        return model
    want_room(model, weights)
    return copy.deepcopy(model).to(DTYPES[weights])


def want_room(model: nn.Module, weights: str) -> None:
    """SensibertError naming the first parameter with a value that is beyond the largest number of these weights."""
    most = torch.finfo(DTYPES[weights]).max
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.detach().abs().max() > most:
            raise SensibertError(f"weights: {name} has values beyond {most:,.0f}, the largest of {weights}; want fp32")
