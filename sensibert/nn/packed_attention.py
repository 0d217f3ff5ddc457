"""Attention within the rows of a packed batch: rows of different length, one after the other, without padding.

With q, k, v of one row [n, H, D]:   o = dropout(softmax(scale q k^T)) v,   both indices within the row.

On a GPU this is one call of FlashAttention with `cu_seq_lens`. On a CPU long rows of similar length form groups, padded
to the longest of the group, so that scores fit into a cache; short rows share lines of LINE tokens, so that there are
fewer products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dropout import as_bits, keep_mask

LINE = 64  # tokens of a line, which on a CPU holds one long row, rounded up to a multiple of ROUND, or short rows
ROUND = 8
SLOTS = 1024  # tokens of a group of lines, which has at least one


class Group(NamedTuple):
    """Tokens begin to end of [T], as [b, L] slots: b lines of L tokens."""

    begin: int
    end: int
    length: int  # L
    token: Tensor  # int64 [b * L]: the token of each slot, counted from `begin`; 0 for padding
    slot: Tensor  # int64 [end - begin]: the slot of each token
    real: Tensor  # bool [b, L]: not padding
    hidden: Tensor | None  # bool, broadcastable to [b, L, L]: keys that a query does not see; None: it sees all


@dataclass(frozen=True)
class Packing:
    """Where the rows of a packed batch are. Rows are sorted by length, the longest first; padding may follow them.

    cu_seq_lens: int32, the first token of each row, then of each part of the padding, then T; as many entries for every
    batch of `rows` rows and T tokens. max_length: no row or part is longer. groups: on a CPU."""

    cu_seq_lens: Tensor
    rows: int
    max_length: int
    groups: tuple[Group, ...] = ()

    @classmethod
    def of(
        cls, lengths: list[int], total: int, device: torch.device | str = "cpu", max_length: int | None = None
    ) -> Packing:
        """lengths: of the rows, the longest first. total: T. max_length: by default that of the longest row."""
        longest = lengths[0] if max_length is None else max_length
        ends = torch.tensor([0, *lengths, *[longest] * -(-total // longest)]).cumsum(0).clamp(max=total).int()
        if torch.device(device).type == "cpu":
            return cls(ends, len(lengths), longest, tuple(_groups(lengths)))
        return cls(ends.pin_memory().to(device, non_blocking=True), len(lengths), longest)

    def begins(self) -> Tensor:
        """The first token of each row."""
        return self.cu_seq_lens[: self.rows]

    def ends(self) -> Tensor:
        """The first token after each row."""
        return self.cu_seq_lens[1 : self.rows + 1]


def _groups(lengths: list[int]) -> Iterator[Group]:
    begin, long = 0, [n for n in lengths if n > LINE]
    while long:
        size = long[0] + -long[0] % ROUND
        count = 1 << max(1, SLOTS // size).bit_length() - 1  # a power of 2, for few shapes
        lines, long = [[n] for n in long[:count]], long[count:]
        yield _group(begin, lines, size)
        begin = int(sum(map(sum, lines)) + begin)
    lines = []
    for n in (n for n in lengths if n <= LINE):  # first fit, decreasing
        line = next((line for line in lines if sum(line) + n <= LINE), None)
        if line is None:
            lines.append(line := [])
        line.append(n)
    if lines:
        yield _group(begin, lines, LINE)


def _group(begin: int, lines: list[list[int]], size: int) -> Group:
    """Tokens are in the order of the lengths, the largest first."""
    rows = sorted(((n, -number) for number, line in enumerate(lines) for n in line), reverse=True)
    row_of = torch.full((len(lines), size), -1)
    filled, slots = [0] * len(lines), []
    for number, (n, line) in enumerate(rows):
        place = filled[-line]
        row_of[-line, place : place + n] = number
        slots.append(torch.arange(place, place + n) - line * size)
        filled[-line] += n
    slot, real = torch.cat(slots), row_of >= 0
    token = torch.zeros(real.numel(), dtype=torch.int64)
    token[slot] = torch.arange(len(slot))
    if size > LINE:
        hidden = None if bool(real.all()) else ~real[:, None]
    else:
        hidden = row_of[:, :, None] != row_of[:, None]
    return Group(begin, begin + len(slot), size, token, slot, real, hidden)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float, p: float = 0.0, window: int | None = None
) -> Tensor:
    """q, k, v [T, H, D] -> [T, H, D]. p: dropout of the probabilities. window: tokens see those less than this away.

    On a GPU in half precision only.

    Padding after the rows gets zeros on a CPU."""
    if not q.shape[1]:  # a layer without heads
        return q
    if q.is_cpu:
        return _OnCpu.apply(q, k, v, packing, scale, p, window)
    limits: dict[str, int] = {} if window is None else {"window_size_left": window - 1, "window_size_right": window - 1}
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, packing.cu_seq_lens, packing.cu_seq_lens, packing.max_length, packing.max_length, p, False, False,
        scale=scale, **limits,
    )[0]  # fmt: skip
    return out


def _padded(x: Tensor, group: Group) -> Tensor:
    """[T, H, D] -> [b, H, L, D]."""
    part = x[group.begin : group.end].flatten(1).index_select(0, group.token)
    return part.view(-1, group.length, *x.shape[1:]).transpose(1, 2).contiguous()


def _without_padding(padded: Tensor, group: Group, out: Tensor) -> None:
    """[b, H, L, D] -> the tokens of the group in out [T, H, D]."""
    rows = padded.transpose(1, 2).flatten(0, 1).flatten(1)
    torch.index_select(rows, 0, group.slot, out=out[group.begin : group.end].flatten(1))


def _hide(scores: Tensor, group: Group, window: int | None) -> None:
    """Lower the scores [b, H, L, L] of the keys that a query does not see."""
    hidden = group.hidden
    if window is not None:
        place = torch.arange(group.length)
        far = (place[:, None] - place).abs() >= window
        hidden = far[None] if hidden is None else hidden | far
    if hidden is not None:
        lowest = torch.finfo(scores.dtype).min
        scores += torch.zeros(hidden.shape, dtype=scores.dtype).masked_fill_(hidden, lowest)[:, None]


def _kept(x: Tensor, keep: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x, 0 where keep is 0; in `out`, if that is given."""
    if keep is None:
        return x
    out = torch.empty_like(x) if out is None else out
    torch.mul(as_bits(x), keep, out=as_bits(out))
    return out


class _OnCpu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float, p: float, window: int | None
    ) -> Tensor:
        out, saved, q = torch.empty_like(q, memory_format=torch.contiguous_format), [], q * scale
        for group in packing.groups:
            queries, keys, values = (_padded(x, group) for x in (q, k, v))
            scores = queries @ keys.transpose(2, 3)
            _hide(scores, group, window)
            probabilities = scores.softmax(-1)
            keep = keep_mask(scores, p) if p else None
            result = _kept(probabilities, keep, scores) @ values
            if p:
                result *= 1 / (1 - p)
            _without_padding(result, group, out)
            saved += [queries, keys, values, probabilities, keep]
        out[packing.groups[-1].end :] = 0
        ctx.save_for_backward(*saved)
        ctx.packing, ctx.scale, ctx.p = packing, scale, p
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dout, saved = grads[0], ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(dout, memory_format=torch.contiguous_format) for _ in range(3))
        for number, group in enumerate(ctx.packing.groups):
            queries, keys, values, probabilities, keep = saved[5 * number : 5 * number + 5]
            d = _padded(dout, group)
            d *= (group.real * (1 / (1 - ctx.p))).to(d.dtype)[:, None, :, None]
            dprobabilities = d @ values.transpose(2, 3)
            _without_padding(_kept(probabilities, keep).transpose(2, 3) @ d, group, dv)
            if keep is not None:
                as_bits(dprobabilities).mul_(keep)
            dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, probabilities.dtype)
            _without_padding(dscores @ keys, group, dq)
            _without_padding(dscores.transpose(2, 3) @ queries, group, dk)
        dq *= ctx.scale
        for gradient in (dq, dk, dv):
            gradient[ctx.packing.groups[-1].end :] = 0
        return dq, dk, dv, None, None, None, None
