"""Counts the ops of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Ops that compute nothing.
VIEWS = frozenset(
    ("view", "_unsafe_view", "t", "transpose", "expand", "as_strided", "slice", "select", "split", "unbind")
    + ("split_with_sizes", "unsqueeze", "squeeze", "detach", "alias", "permute", "narrow", "lift_fresh", "empty")
    + ("empty_like", "empty_strided", "new_empty", "chunk")
)


class OpCount(TorchDispatchMode):
    """total: ops within the context except VIEWS, forward and backward. On a GPU about as many are launched."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Sequence, args: Sequence = (), kwargs: Mapping | None = None
    ) -> Any:
        self.total += function._schema.name.partition("::")[2] not in VIEWS
        return function(*args, **(kwargs or {}))
