"""masked_linear with one bit per weight, for any pattern. The CUDA kernel (csrc/kernels) applies the bits between
memory and the matrix units, so it makes no masked copy of W. The reference is here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import define, impl, register_fake

from ...core.grid import Grid

OP = "sensibert::masked_linear_bits"
define(OP, "(Tensor x, Tensor weight, Tensor? bias, Tensor bits, bool by_columns) -> Tensor")
ROW_BYTES = 16  # the kernel's copies need rows of bits that start at multiples of it


def pack(kept: Tensor) -> Tensor:
    """bool [N, K] -> uint8 [N, ceil(K / 8)], lowest bit first, each row padded with 0. The row stride is a
    multiple of ROW_BYTES."""
    N, K = kept.shape
    bytes_of = F.pad(kept, (0, -K % (8 * ROW_BYTES))).view(N, -1, 8).to(torch.uint8)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=kept.device)
    return (bytes_of * powers).sum(-1, dtype=torch.uint8)[:, : -(-K // 8)]


def unpack(bits: Tensor, num_cols: int) -> Tensor:
    """uint8 [N, ceil(K / 8)] -> bool [N, K]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, :, None] >> shifts & 1).flatten(1)[:, :num_cols].bool()


def row_bits(keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> Tensor:
    """keep bool grid.shape(N, K) -> bits [N, ceil(K / 8)] of W, for y = x (W * keep)^T."""
    return pack(grid.expand(keep, num_rows, num_cols))


def column_bits(keep: Tensor, grid: Grid, num_rows: int, num_cols: int) -> Tensor:
    """keep bool grid.shape(N, K) -> bits [K, ceil(N / 8)] of W^T, for y = x (W * keep)."""
    return pack(grid.expand(keep, num_rows, num_cols).T)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, by_columns: bool) -> Tensor:
    """y [..., N] = x [..., K] (weight [N, K] where its bit is set, else 0)^T + bias [N] or None; bits [N, ceil(K / 8)].

    by_columns: the weight is [K, N] and not transposed. Every column of x is read."""
    weight = weight.T if by_columns else weight
    return F.linear(x, weight.masked_fill(~unpack(bits, weight.shape[1]), 0), bias)


impl(OP, "default", reference)


@register_fake(OP)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, by_columns: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1 if by_columns else 0])
