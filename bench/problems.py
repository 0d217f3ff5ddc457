"""The parameters of BERT: name, shape, and the grid of the trimmable axis."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sensibert.core.grid import Grid


class Parameter(NamedTuple):
    name: str
    shape: tuple[int, ...]
    grid: Grid  # one block per head or neuron; parameters that are not trimmed are one block


def bert(hidden: int, layers: int, ffn: int, vocab: int = 30522, head_dim: int = 64) -> list[Parameter]:
    """Every parameter of the model with a pooler: 199 for BERT-base, 391 for BERT-large."""
    whole, head = Grid.tensor(), Grid.rows(head_dim)
    parameters = [
        Parameter(f"embeddings.{n}", (rows, hidden), whole) for n, rows in (("word", vocab), ("position", 512))
    ]
    parameters += [Parameter("embeddings.type", (2, hidden), whole), *_norm("embeddings", hidden)]
    for i in range(layers):
        at = f"layer.{i}"
        for name in ("query", "key", "value"):
            parameters += [Parameter(f"{at}.{name}.weight", (hidden, hidden), head)]
            parameters += [Parameter(f"{at}.{name}.bias", (hidden,), head)]
        parameters += [Parameter(f"{at}.output.weight", (hidden, hidden), Grid.columns(head_dim))]
        parameters += [Parameter(f"{at}.output.bias", (hidden,), whole), *_norm(f"{at}.attention", hidden)]
        parameters += [
            Parameter(f"{at}.up.weight", (ffn, hidden), Grid.row()),
            Parameter(f"{at}.up.bias", (ffn,), Grid.row()),
        ]
        parameters += [Parameter(f"{at}.down.weight", (hidden, ffn), Grid.column())]
        parameters += [Parameter(f"{at}.down.bias", (hidden,), whole), *_norm(f"{at}.ffn", hidden)]
    return [
        *parameters,
        Parameter("pooler.weight", (hidden, hidden), whole),
        Parameter("pooler.bias", (hidden,), whole),
    ]


def _norm(at: str, hidden: int) -> list[Parameter]:
    return [Parameter(f"{at}.norm.{n}", (hidden,), Grid.tensor()) for n in ("weight", "bias")]


MODELS = {"bert-base": bert(768, 12, 3072), "bert-large": bert(1024, 24, 4096)}


def encoder(model: str) -> list[Parameter]:
    """The weights and biases of the layers, which a budget counts. 85 M values for BERT-base."""
    return [p for p in MODELS[model] if p.name.startswith("layer.")]


def random_like(
    parameters: list[Parameter], device: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """Random data, never zeros: a GPU computes faster on zeros than on a real model."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, device=device).mul_(0.02).to(dtype) for p in parameters]
