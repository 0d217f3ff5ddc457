"""How large an encoder is, for a line about a cut."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core.text import short
from .layout_of import layout_of
from .masks import cost_of, masks_of


@dataclass(frozen=True)
class Sizes:
    """Parameters, attention heads and FFN neurons of an encoder; with a grid also its blocks, (left, of all)."""

    params: int
    heads: int
    neurons: int
    blocks: tuple[int, int] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        sites, masks = layout_of(model).sites, masks_of(model)
        units = [(site.kind == "head", site.units) for site in sites]
        heads, neurons = (sum(count for is_head, count in units if is_head is wanted) for wanted in (True, False))
        keep = [] if masks is None else list(masks.keep.values())
        blocks = sum(int(part.sum()) for part in keep), sum(part.numel() for part in keep)
        return cls(cost_of(model, "encoder")[0], heads, neurons, blocks if keep else None)

    def since(self, before: Sizes) -> str:
        """`encoder 10.6M -> 5.3M parameters, 72 -> 41 heads, FFN 9,216 -> 4,512 neurons`; with a grid the blocks."""
        text = f"encoder {short(before.params)} -> {short(self.params)} parameters"
        if self.blocks is not None:
            return "{}, {:,} of {:,} blocks left".format(text, *self.blocks)
        return f"{text}, {before.heads} -> {self.heads} heads, FFN {before.neurons:,} -> {self.neurons:,} neurons"
