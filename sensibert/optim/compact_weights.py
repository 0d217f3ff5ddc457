"""The masked layers whose compact weight an optimizer writes in its own pass: `MaskedAdamW.follow`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import SensibertError
from ..nn.masked_linear import MaskedLinear
from ..ops.gather_kept import gather_kept
from ..ops.masked_adamw import index_map
from ..ops.masked_linear.kept_index import CompactWeight, kept_index

Optimizer = Any  # a MaskedAdamW, whose module imports this one


@dataclass(eq=False)
class _Followed:
    """One layer, and the latest compact weight that was made for it."""

    layer: MaskedLinear
    weight: Tensor
    compact: CompactWeight | None = None

    @property
    def versions(self) -> list[int]:
        """The value of compact.versions for which compact is valid."""
        return [self.weight._version, self.layer.keep._version]

    @property
    def ended(self) -> bool:
        """Whether the layer is no longer masked or has another weight."""
        return not isinstance(self.layer, MaskedLinear) or self.layer._parameters.get("weight") is not self.weight

    @property
    def stale(self) -> bool:
        """Whether the masks have changed since compact was made, or the layer no longer has it."""
        compact, keep = self.layer.compact, self.layer.keep
        return compact is None or compact is not self.compact or compact.versions.numpy()[1] != keep._version


class CompactWeights:
    """All layers that one MaskedAdamW follows. The optimizer owns it and passes itself to each method."""

    def __init__(self) -> None:
        self._followed: list[_Followed] = []

    def follow(self, optimizer: Optimizer, model: nn.Module) -> None:
        owned = {param for group in optimizer.param_groups for param in group["params"]}
        by_weight = {entry.weight: entry for entry in self._followed if not entry.ended}
        for name, layer in model.named_modules():
            if not isinstance(layer, MaskedLinear) or layer._parameters.get("weight") not in owned:
                continue
            entry = by_weight.setdefault(layer.weight, _Followed(layer, layer.weight))
            if entry.layer is not layer and not _same_masks(entry.layer, layer):
                raise SensibertError(
                    f"follow: {name} shares its weight with a layer of other masks, want the same masks"
                )
        for entry in by_weight.values():
            optimizer.set_keep(entry.weight, entry.layer.keep, entry.layer.grid)
        self._followed += [entry for entry in by_weight.values() if entry not in self._followed]
        self.before_step(optimizer)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Set the layers' masks in the optimizer, and gather a new matrix for each layer whose masks have changed."""
        for entry in [entry for entry in self._followed if entry.ended]:
            self._followed.remove(entry)
            optimizer.set_working_copy(entry.weight, None)
        for entry in self._followed:
            if optimizer.state[entry.weight].get("keep") is not entry.layer.keep:  # new buffer, or loaded state
                optimizer.set_keep(entry.weight, entry.layer.keep, entry.layer.grid)
        stale = [entry for entry in self._followed if entry.stale]
        with torch.inference_mode(False):  # the matrices are used after the call
            for device in {entry.weight.device for entry in stale}:
                _gather(optimizer, [entry for entry in stale if entry.weight.device == device])

    def after_step(self, optimizer: Optimizer) -> None:
        """Mark the matrices that the step has written as valid for the current weights."""
        for entry in self._followed:
            assert entry.compact is not None  # made by before_step
            # Without a gradient, neither the parameter nor its matrix was written.
            if entry.weight.grad is not None and optimizer.working_copy(entry.weight) is entry.compact.matrix:
                entry.compact.versions.numpy()[:] = entry.versions  # numpy does not change its version


def _gather(optimizer: Optimizer, entries: list[_Followed]) -> None:
    kept = [kept_index(entry.layer.keep, entry.layer.grid, *entry.weight.shape) for entry in entries]
    indices = ([getattr(index, name) for index in kept] for name in ("rows", "cols", "bits"))
    matrices = gather_kept([entry.weight for entry in entries], *indices, dtype=torch.bfloat16)
    for entry, index, matrix in zip(entries, kept, matrices, strict=True):
        maps = [
            None if positions is None else index_map(positions, size)
            for positions, size in zip((index.rows, index.cols), entry.weight.shape, strict=True)
        ]
        optimizer.set_keep(entry.weight, entry.layer.keep, entry.layer.grid)
        optimizer.set_working_copy(entry.weight, matrix, *maps)
        entry.compact = CompactWeight(matrix, torch.tensor(entry.versions), entry.weight, entry.layer.keep)
        entry.layer.compact = entry.compact


def _same_masks(a: MaskedLinear, b: MaskedLinear) -> bool:
    return a.grid == b.grid and torch.equal(a.keep, b.keep)
