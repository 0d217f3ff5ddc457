"""nn.Linear with a keep grid on its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.grid import Grid
from ..ops.block_sensitivity import block_sensitivity
from ..ops.masked_linear.op import masked_linear


class MaskedLinear(nn.Linear):
    """y = x (weight * keep)^T + bias: an nn.Linear of the same parameters, with one more buffer and one attribute.

    keep is bool grid.shape(out_features, in_features), True survives, all True at first. It is not persistent: the
    state dict is that of nn.Linear, so a strict load works both ways, and the masks of a run belong to its Plan.
    Copies and pickles carry keep. The bias is not masked. Numerics: see sensibert.ops.masked_linear."""

    keep: Tensor
    grid: Grid

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, grid: Grid = Grid.row()):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.set_keep(None, grid)

    @classmethod
    def from_linear(cls, linear: nn.Linear, keep: Tensor | None = None, grid: Grid = Grid.row()) -> MaskedLinear:
        """Turn `linear` itself into a MaskedLinear and return it: its parameters, hooks and owners stay what they are.

        ValueError if it is neither a plain nn.Linear nor a MaskedLinear, or has had its forward replaced."""
        if not is_maskable(linear):
            raise ValueError(f"MaskedLinear: linear is {kind_of(linear)}, want a plain nn.Linear")
        check_keep(linear, keep, grid)
        linear.__class__ = cls
        linear.set_keep(keep, grid)
        return linear

    def to_linear(self) -> nn.Linear:
        """Turn this layer itself into a plain nn.Linear that computes the same: dropped weights become 0, in place."""
        with torch.no_grad():
            self.weight.masked_fill_(~self.grid.expand(self.keep, self.out_features, self.in_features), 0)
        del self.keep, self.grid
        self.__class__ = nn.Linear
        return self

    def reset_parameters(self) -> None:
        """As nn.Linear, and everything kept: after to_empty() the buffer is as undefined as the weight."""
        super().reset_parameters()
        if "keep" in self._buffers:
            self.keep.fill_(True)

    def set_keep(self, keep: Tensor | None, grid: Grid | None = None) -> None:
        """New masks: keep bool grid.shape(N, K), None for all True; grid None: as before. In place if it fits."""
        grid = self.grid if grid is None else grid
        check_keep(self, keep, grid)
        shape = grid.shape(self.out_features, self.in_features)
        if keep is None:
            keep = torch.ones(shape, dtype=torch.bool, device=self.weight.device)
        old = self._buffers.get("keep")
        if old is not None and old.shape == keep.shape and old.device == self.weight.device:
            old.copy_(keep)
        else:
            self.register_buffer("keep", keep.detach().to(self.weight.device, copy=True).contiguous(), persistent=False)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        return masked_linear(x, self.weight, self.bias, self.keep, self.grid)

    def gate_gradient(self) -> Tensor:
        """dL/dm of a gate m = 1 on each block of the grid: sum of weight * dL/dweight over the block, from weight.grad.

        fp32, the shape of keep, 0 in dropped blocks. RuntimeError before a backward."""
        if self.weight.grad is None:
            raise RuntimeError("MaskedLinear.gate_gradient: weight.grad is None, want the gradient of a backward")
        return block_sensitivity([self.weight], [self.weight.grad], self.grid, reduce="signed")[0]

    def extra_repr(self) -> str:
        kept = "?" if self.keep.is_meta else f"{int(self.keep.sum())}/{self.keep.numel()}"
        return f"{super().extra_repr()}, grid={self.grid}, kept={kept}"


def is_maskable(module: nn.Module) -> bool:
    """A plain nn.Linear or a MaskedLinear; not a subclass that may compute something else, nor a wrapped forward."""
    return type(module) in (nn.Linear, MaskedLinear) and "forward" not in vars(module)


def kind_of(module: nn.Module) -> str:
    return type(module).__name__ + (" with a forward of its own" if "forward" in vars(module) else "")


def check_keep(linear: nn.Linear, keep: Tensor | None, grid: Grid) -> None:
    """ValueError if keep is not a bool tensor of the grid's shape on this weight."""
    want = grid.shape(linear.out_features, linear.in_features)
    if keep is not None and (keep.dtype != torch.bool or tuple(keep.shape) != want):
        said = f"{keep.dtype} {tuple(keep.shape)}"
        raise ValueError(f"MaskedLinear: keep is {said}, want torch.bool {want} for the grid {grid}")
