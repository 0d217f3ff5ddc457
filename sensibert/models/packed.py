"""Runs a model on packed batches: rows one after the other in one row of tokens, without padding.

Attention stays within the rows (`nn/packed_attention.py`, through transformers' AttentionInterface). A head that reads
one vector per row gets [rows, 1, hidden]; heads of tokens and of answers get all tokens, and the logits of answers are
split into rows again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ..core.errors import SensibertError, described
from ..nn.packed_attention import Packing, packed_attention
from .modules import attending, attribute, base_of, configs_of, embeddings_of, family_of, of_all_heads

ATTENTION = "sensibert_packed"
POOLINGS = ("first", "mean", "max")  # what a head can read of a row
PROBE = (5, 3, 2)  # tokens of the rows that a model is tried on
# The largest difference of their logits, as a fraction of the largest logit: in fp32, and in bf16.
TOLERANCE, TOLERANCE_BF16 = 1e-3, 5e-2
ENDS = ("start_logits", "end_logits")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query, key, value [1, H, T, D] -> [1, T, H, D]."""
    if packing is None:
        raise SensibertError(f"packing: {type(module).__name__} does not hand on how the batch is packed")
    q, k, v = (x.transpose(1, 2)[0] for x in (query, key, value))
    k, v = of_all_heads(q, k, v)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_attention(q, k, v, packing, scale, dropout, sliding_window)[None], None


AttentionInterface.register(ATTENTION, _attend)


class PackedModel:
    """A transformers model, as it is now, on packed batches.

    pooling (`pooling_of`): what the head reads of a row: "first", its first token, "mean", "max", or None for all
    tokens. dtype: of the encoder, if it is another than that of embeddings and head, as with bf16 working copies."""

    def __init__(self, model: nn.Module, pooling: str | None) -> None:
        self.model, self.pooling = model, pooling
        self.dtype: torch.dtype | None = None
        family, base = family_of(model), base_of(model)
        encoder, pooler = base.get_submodule(family.encoder), getattr(base, "pooler", None)
        self._pooled = encoder if not isinstance(encoder, nn.ModuleList) else base if pooler is None else pooler
        self._before = self._pooled is pooler
        self._configs = configs_of(model)
        self._embeddings, self._outside = embeddings_of(model), next(model.parameters()).dtype
        table = getattr(self._embeddings, "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        self._first_position = 0 if padding is None else padding + 1  # RoBERTa counts from there

    def __call__(self, batch: Mapping[str, Tensor], packing: Packing) -> Any:
        """The outputs, with the loss if the batch has labels. Answers: start_logits, end_logits [rows, longest row]."""
        inputs = {name: value for name, value in batch.items() if name not in ("start_positions", "end_positions")}
        inputs["position_ids"] = batch["position_ids"] + self._first_position
        with self._running(packing):
            outputs = self.model(**inputs, packing=packing)
        if ENDS[0] in outputs:
            for name in ENDS:
                outputs[name] = _split(outputs[name][0], packing)
            if "start_positions" in batch:
                ends = ((outputs[f"{end}_logits"], batch[f"{end}_positions"]) for end in ("start", "end"))
                outputs["loss"] = torch.stack([F.cross_entropy(logits, place) for logits, place in ends]).mean()
        return outputs

    @contextlib.contextmanager
    def _running(self, packing: Packing) -> Iterator[None]:
        def enter(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output.to(self.dtype)

        def leave(hidden: Tensor) -> Tensor:
            pooled = hidden if self.pooling is None else self._pool(hidden, packing)
            return pooled if self.dtype is None else pooled.to(self._outside)

        def leave_before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (leave(args[0]), *args[1:])

        def leave_after(module: nn.Module, args: tuple, output: Any) -> Any:
            if isinstance(output, tuple):
                return (leave(output[0]), *output[1:])
            output["last_hidden_state"] = leave(output["last_hidden_state"])
            return output

        handles = [self._embeddings.register_forward_hook(enter)] if self.dtype is not None else []
        if self._before:
            handles.append(self._pooled.register_forward_pre_hook(leave_before))
        else:
            handles.append(self._pooled.register_forward_hook(leave_after))
        try:
            with attending(self._configs, ATTENTION):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _pool(self, hidden: Tensor, packing: Packing) -> Tensor:
        """[1, T, hidden] -> [rows, 1, hidden]."""
        begins, ends = packing.begins(), packing.ends()
        if self.pooling == "first":
            return hidden[0].index_select(0, begins)[:, None]
        place = torch.arange(hidden.shape[1], device=hidden.device)
        member = (place >= begins[:, None]) & (place < ends[:, None])  # [rows, T]
        if self.pooling == "max":
            # padding goes to a row of its own
            row = torch.where(member.any(0), member.long().argmax(0), len(member))
            none = hidden.new_full((len(member) + 1, hidden.shape[2]), torch.finfo(hidden.dtype).min)
            return none.scatter_reduce(0, row[:, None].expand_as(hidden[0]), hidden[0], "amax")[:-1, None]
        share = member.to(hidden.dtype) / (ends - begins)[:, None]
        return (share @ hidden[0])[:, None]


def _split(logits: Tensor, packing: Packing) -> Tensor:
    """[T] -> [rows, longest row], the lowest number after a row's tokens."""
    begins, ends = packing.begins()[:, None], packing.ends()[:, None]
    source = begins + torch.arange(packing.max_length, device=logits.device)
    split = logits[source.clamp(max=len(logits) - 1)]
    return split.masked_fill(source >= ends, torch.finfo(logits.dtype).min)


def pooling_of(model: nn.Module, bf16: bool = False) -> str | None:
    """The pooling that the model's head needs in `PackedModel`, found by trying it on three rows.

    bf16: whether the model computes in bf16 there. On a GPU it does: FlashAttention takes no fp32. SensibertError says
    why the model cannot run on packed batches."""
    device, training = next(model.parameters()).device, [module for module in model.modules() if module.training]
    longest = torch.arange(max(PROBE), device=device)
    real = longest < torch.tensor(PROBE, device=device)[:, None]
    vocabulary = attribute(model, "get_input_embeddings")().num_embeddings
    ids = torch.linspace(vocabulary // 2, vocabulary - 1, real.numel(), device=device).long().view(real.shape) * real
    flat = {"input_ids": ids[real][None], "position_ids": longest.expand(real.shape)[real][None]}
    packing, bf16 = Packing.of(list(PROBE), sum(PROBE), device), bf16 or device.type == "cuda"
    tolerance = TOLERANCE_BF16 if bf16 else TOLERANCE
    reason = "its logits of packed rows are not those of padded ones"
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            expected = model(input_ids=ids, attention_mask=real.long())
            whole = ENDS[0] in expected or expected["logits"].dim() == 3
            if not whole and torch.equal(expected["logits"][0], expected["logits"][1]):
                raise SensibertError("its logits are the same for all rows")
            for pooling in (None,) if whole else POOLINGS:
                if _agree(PackedModel(model, pooling)(flat, packing), expected, real, tolerance):
                    return pooling
    except (SensibertError, RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = described(error)
    finally:
        for module in training:
            module.training = True
    raise SensibertError(f"packing: {type(model).__name__} cannot run on packed rows ({reason}), want packing 'off'")


def _agree(actual: Any, expected: Any, real: Tensor, tolerance: float) -> bool:
    """Whether the logits of all real tokens, or of all rows, are the same."""
    for name in (name for name in (*ENDS, "logits") if name in expected):
        ours, theirs = actual[name], expected[name]
        if name in ENDS:
            ours, theirs = ours[real], theirs[real]
        elif theirs.dim() == 3:
            ours, theirs = ours[0], theirs[real]
        if ours.shape != theirs.shape or not (ours - theirs).abs().max() <= tolerance * theirs.abs().max():
            return False
    return True
