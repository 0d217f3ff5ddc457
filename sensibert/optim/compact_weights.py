"""The layers whose compact weight an optimizer writes in its own pass, and the one gather when their masks change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakMethod, ref

import torch
from torch import Tensor

from ..core.grid import Grid
from ..ops.gather_kept import gather_kept
from ..ops.masked_adamw import index_map
from ..ops.masked_linear.kept_index import CompactWeight, live, publish, withdraw

if TYPE_CHECKING:
    from ..nn.masked_linear import MaskedLinear


@dataclass(eq=False)
class _Follower:
    """One layer, and the matrix [n, k] of its kept rows and columns that stands for its weight in a matmul."""

    layer: MaskedLinear
    weight: Tensor
    keep: Tensor
    seen: tuple[int, Grid] | None = None  # version of keep and grid that the matrix was made for
    promise: CompactWeight | None = None

    @property
    def now(self) -> tuple[int, Grid]:
        return self.keep._version, self.layer.grid

    @property
    def follows(self) -> bool:
        """Until the layer gets another weight, or a keep of another shape or device, or is turned back."""
        keep, weight = self.layer._buffers.get("keep"), self.layer._parameters.get("weight")
        return keep is self.keep and weight is self.weight


class Followers:
    """All layers that follow one MaskedAdamW, whose hooks keep this object alive."""

    def __init__(self, optimizer) -> None:
        self.optimizer = ref(optimizer)
        self.members: list[_Follower] = []
        self.renew = WeakMethod(self.refresh)
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(self.after_step)

    def add(self, layer: MaskedLinear) -> None:
        self.optimizer().set_keep(layer.weight, layer.keep, layer.grid)  # refuses a weight that it does not hold
        self.members = [m for m in self.members if m.weight is not layer.weight]  # one compact matrix a weight
        self.members.append(_Follower(layer, layer.weight, layer.keep))
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """New compact matrices where keep has changed, gathered at once; the optimizer writes them from now on."""
        optimizer = self.optimizer()
        for member in [m for m in self.members if not m.follows]:
            self.members.remove(member)
            optimizer.set_shadow(member.weight, None)
            withdraw(member.weight)
        stale = [m for m in self.members if m.seen != m.now]
        with torch.inference_mode(False):  # they outlive the call that asked for them
            for device in {m.weight.device for m in stale}:
                self._gather([m for m in stale if m.weight.device == device])

    def _gather(self, members: list[_Follower]) -> None:
        optimizer, kept = self.optimizer(), [live(m.keep, m.layer.grid, *m.weight.shape) for m in members]
        columns = ([getattr(found, name) for found in kept] for name in ("rows", "cols", "bits"))
        compacts = gather_kept([m.weight for m in members], *columns, dtype=torch.bfloat16)
        for member, found, compact in zip(members, kept, compacts, strict=True):
            maps = [
                None if index is None else index_map(index, size)
                for index, size in zip((found.rows, found.cols), member.weight.shape, strict=True)
            ]
            optimizer.set_keep(member.weight, member.keep, member.layer.grid)
            optimizer.set_shadow(member.weight, compact, *maps)
            member.seen = member.now
            member.promise = publish(member.weight, member.keep, member.layer.grid, compact, self.renew)

    def before_step(self, optimizer, *_) -> None:
        self.refresh()
        for member in self.members:
            if optimizer.state[member.weight].get("keep") is not member.keep:  # loaded, or cleared: the layer decides
                optimizer.set_keep(member.weight, member.keep, member.layer.grid)

    def after_step(self, optimizer, *_) -> None:
        for member in self.members:
            # Without a gradient the step wrote nothing: what was published before stays as true as it was.
            written = member.weight.grad is not None and optimizer.shadow(member.weight) is member.promise.compact
            if written and member.seen == member.now:
                member.promise.weight_version = member.weight._version


_known: WeakKeyDictionary = WeakKeyDictionary()  # optimizer -> its Followers


def followers(optimizer) -> Followers:
    if optimizer not in _known:
        _known[optimizer] = Followers(optimizer)
    return _known[optimizer]


def follow(layer: MaskedLinear, optimizer) -> None:
    """Let `optimizer`, a MaskedAdamW that holds the weight, keep dropped weights at 0 and write in its own pass the
    bf16 matrix of the kept rows and columns that a call under bf16 autocast (or a bf16 layer) then multiplies with,
    instead of gathering, casting and masking the weight each time.

    After set_keep the next call makes it anew, in one launch for all layers that follow the optimizer. The layer's
    masks are the optimizer's, also after its load_state_dict. Ends when set_keep changes the shape of keep."""
    followers(optimizer).add(layer)
