"""nn.Linear with a keep grid on its weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..core.arguments import checked, want
from ..core.errors import SensibertError
from ..core.grid import Grid
from ..ops.masked_linear.kept_index import CompactWeight
from ..ops.masked_linear.op import masked_linear


class MaskedLinear(nn.Linear):
    """y = x (weight * keep)^T + bias: an nn.Linear of the same parameters, with a buffer `keep` and a `grid`.

    keep: bool grid.shape(out_features, in_features), True survives, all True at first. The buffer is not persistent:
    the state dict is that of nn.Linear, so a strict load works in both directions, and the masks of a run are saved in
    its Plan. Copies and pickles contain keep. The bias is not masked. Numerics: see sensibert.ops.masked_linear.

    compact: the kept part of the weight, if an optimizer writes it (`MaskedAdamW.follow`); forward multiplies with it
    while it is valid. State dicts, copies and pickles do not contain it."""

    keep: Tensor
    grid: Grid
    compact: CompactWeight | None = None

    @checked
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        grid: Grid = Grid.row(),
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.set_keep(None, grid)

    @classmethod
    @checked
    def from_linear(cls, linear: nn.Linear, keep: Tensor | None = None, grid: Grid = Grid.row()) -> MaskedLinear:
        """Change the class of `linear` to MaskedLinear and return it. Parameters and hooks keep their identity.

        SensibertError if it is neither a plain nn.Linear nor a MaskedLinear, or if its forward was replaced."""
        if not is_maskable(linear):
            raise SensibertError(f"MaskedLinear: linear is {kind_of(linear)}, want a plain nn.Linear")
        check_keep(linear, keep, grid)
        linear.__class__ = cls
        assert isinstance(linear, cls)  # by the line above
        linear.set_keep(keep, grid)
        return linear

    def to_linear(self) -> nn.Linear:
        """Change this layer into a plain nn.Linear that computes the same: dropped weights become 0, in place."""
        with torch.no_grad():
            self.weight.masked_fill_(~self.grid.expand(self.keep, self.out_features, self.in_features), 0)
        del self.keep, self.grid
        self.__dict__.pop("compact", None)
        self.__class__ = nn.Linear  # type: ignore[assignment]  # mypy knows no change to a base class
        return self

    def reset_parameters(self) -> None:
        """Like nn.Linear, and set keep to True: after to_empty() the buffer is uninitialized too."""
        super().reset_parameters()
        if "keep" in self._buffers:
            self.keep.fill_(True)

    def set_keep(self, keep: Tensor | None, grid: Grid | None = None) -> None:
        """Set the masks, in place if the shape is unchanged. keep: bool grid.shape(N, K), None for all True. grid: None
        for the current grid. SensibertError if keep does not fit the grid."""
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
            self.compact = None
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        return masked_linear(x, self.weight, self.bias, self.keep, self.grid, self.compact)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLinear:
        # to(), half(), cuda(), ... do not convert the matrix
        self.compact = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "compact"}

    def extra_repr(self) -> str:
        kept = "?" if self.keep.is_meta else f"{int(self.keep.sum())}/{self.keep.numel()}"
        return f"{super().extra_repr()}, grid={self.grid}, kept={kept}"


def is_maskable(module: nn.Module) -> bool:
    """Whether module is a plain nn.Linear or a MaskedLinear, not another subclass, and its forward was not replaced."""
    return type(module) in (nn.Linear, MaskedLinear) and "forward" not in vars(module)


def kind_of(module: nn.Module) -> str:
    return type(module).__name__ + (" with a forward of its own" if "forward" in vars(module) else "")


def check_keep(linear: nn.Linear, keep: Tensor | None, grid: Grid) -> None:
    """SensibertError if keep is not a bool tensor of the grid's shape on this weight."""
    want("MaskedLinear: keep", keep, Tensor | None)
    want("MaskedLinear: grid", grid, Grid)
    shape = grid.shape(linear.out_features, linear.in_features)
    if keep is not None and (keep.dtype != torch.bool or tuple(keep.shape) != shape):
        got = f"{keep.dtype} {tuple(keep.shape)}"
        raise SensibertError(f"MaskedLinear: keep is {got}, want torch.bool {shape} for the grid {grid}")
