"""The check of every trim: the masked and the trimmed encoder must agree on one batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..core.artifacts import Plan
from ..core.errors import SensibertError
from ..models import base_of, family_of
from ..models.modules import attribute

CHECK_TOKENS = 12


@contextmanager
def silenced(model: nn.Module, plan: Plan) -> Iterator[None]:
    """A context in which dropped units contribute nothing: the consuming layer reads zeros in their columns."""
    handles = []
    for site in plan.layout.sites:
        consumer = attribute(base_of(model), site.consumer.parameter.removesuffix(".weight"))
        gate = plan.keep[site.name].repeat_interleave(site.consumer.span)

        def zero(module: nn.Module, args: tuple[Tensor, ...], gate: Tensor = gate) -> tuple[Tensor, ...]:
            return (args[0].masked_fill(~gate.to(args[0].device), 0), *args[1:])

        handles.append(consumer.register_forward_pre_hook(zero))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def probe(model: nn.Module) -> Tensor:
    """Last hidden states, [tokens, hidden] fp64, of two fixed sequences of random tokens, the second one padded.

    SensibertError for a base model that returns something else first."""
    base, config = base_of(model), attribute(model, "config")
    length = min(CHECK_TOKENS, getattr(config, "max_position_embeddings", 2 * CHECK_TOKENS) // 2)
    table = getattr(base, "get_input_embeddings", lambda: None)()
    high = min(config.vocab_size, getattr(table, "num_embeddings", config.vocab_size))
    ids = torch.randint(min(10, high - 1), high, (2, length), generator=torch.Generator().manual_seed(0))
    attend = torch.ones_like(ids)
    attend[1, length - length // 3 :] = 0
    device = next(base.parameters()).device
    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        outputs = base(input_ids=ids.to(device), attention_mask=attend.to(device))
        first = outputs[0] if isinstance(outputs, tuple | ModelOutput) else outputs
    finally:
        for module in training:  # one by one: a frozen part may be in eval mode on purpose
            module.training = True
    if not isinstance(first, Tensor) or first.shape[:2] != ids.shape:
        came = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
        wanted = f"hidden states [{ids.shape[0]}, {ids.shape[1]}, ...]"
        raise SensibertError(f"trim: the base_model, a {type(base).__name__}, returns {came} first, want {wanted}")
    return first[attend.to(device).bool()].double()


def _tolerance(dtype: torch.dtype) -> float:
    """The rounding error allowed for an encoder, relative to its largest output.

    In fp32, 24 wide layers reach 5e-6. A small DeBERTa with stale head counts differs by only 2e-5 to 4e-5."""
    if dtype == torch.float64:
        return 1e-6  # some families round to fp32 inside
    if dtype == torch.float32:
        return 2e-5 if torch.get_float32_matmul_precision() == "highest" else 5e-3
    return 5e-2


def check_same(model: nn.Module, expected: Tensor) -> None:
    """SensibertError unless the trimmed model computes what the masked one did."""
    advice = "the model was restored. Is its table in sensibert/models/families/ complete?"
    family = family_of(model).model_type
    try:
        result = probe(model)
    except (RuntimeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise SensibertError(f"trim: the trimmed {family} does not run ({reason}); {advice}") from error
    difference = float((expected - result).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not difference <= _tolerance(next(model.parameters()).dtype):  # a NaN is an error too
        raise SensibertError(
            f"trim: masked and trimmed {family} differ by {difference:.1e} (relative), want rounding; {advice}"
        )
