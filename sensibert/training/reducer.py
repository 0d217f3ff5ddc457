"""DistributedDataParallel around a model whose parameters change.

Its reducer sums the gradients of the parameters that it was made with. After a cut these are gone from the model: the
gradients of the new ones would stay in their process, without an error. So the wrapper is made again, in place, because
the Trainer and accelerate hold the wrapper itself.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from ..core.errors import SensibertError

SAME = (
    *("device_ids", "output_device", "dim", "process_group", "find_unused_parameters", "gradient_as_bucket_view"),
    *("static_graph", "skip_all_reduce_unused_params", "batched_grad_copy"),
)
IGNORED = "_ddp_params_and_buffers_to_ignore"  # attribute of a module that DistributedDataParallel reads


class Reducer:
    """Finds the DistributedDataParallel around a model at its first forward pass, since a callback does not get it."""

    def __init__(self, model: nn.Module) -> None:
        """model: of the Trainer. Call `end` to stop the search."""
        self._model = model
        self._wrapper: DistributedDataParallel | None = None
        self._search = register_module_forward_pre_hook(self._look)

    @property
    def found(self) -> bool:
        return self._wrapper is not None

    def _look(self, module: nn.Module, inputs: object) -> None:
        if isinstance(module, DistributedDataParallel) and module.module is self._model:
            self._search.remove()
            self._wrapper = module
            self.renew()  # parameters may have been trimmed, frozen or masked since the wrapper was made

    def renew(self) -> None:
        """Make the wrapper, if there is one, reduce the parameters that the model has and trains now.

        All processes have to call it. SensibertError for a wrapper with settings that would be lost."""
        if self._wrapper is not None:
            _make_again(self._wrapper)

    def end(self) -> None:
        self._search.remove()


def _make_again(wrapper: DistributedDataParallel) -> None:
    if wrapper._comm_hooks or wrapper.mixed_precision is not None:
        raise SensibertError(
            "TrimCallback: DistributedDataParallel has a communication hook or mixed_precision, want it without"
        )
    module, training, syncs = wrapper.module, wrapper.training, wrapper.require_backward_grad_sync
    accepted = inspect.signature(DistributedDataParallel.__init__).parameters
    same: dict[str, Any] = {name: getattr(wrapper, name) for name in SAME if name in accepted}
    if not wrapper.broadcast_buffers:
        same["broadcast_buffers"] = False
    if not wrapper.bucket_bytes_cap_default:
        same["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
    ignored = getattr(module, IGNORED, None)
    empty = [name for name, weight in module.named_parameters() if not weight.numel()]
    setattr(module, IGNORED, [*(ignored or ()), *empty])  # of emptied layers: no gradient comes, none is waited for
    try:
        DistributedDataParallel.__init__(wrapper, module, **same)
    finally:
        setattr(module, IGNORED, ignored) if ignored is not None else delattr(module, IGNORED)
    wrapper.train(training)
    wrapper.require_backward_grad_sync = syncs
