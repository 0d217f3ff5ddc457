"""Swap the linear layers of a model for masked ones, and back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..core.arguments import checked
from ..core.errors import SensibertError
from ..core.grid import Grid
from .masked_linear import MaskedLinear, check_keep, is_maskable, kind_of


@checked
def replace(model: nn.Module, keep: Mapping[str, tuple[Tensor | None, Grid]] | None = None) -> nn.Module:
    """Turn nn.Linear layers of the model into MaskedLinear, in place, and return the model.

    keep: {module name: (keep grid or None for all kept, Grid)}. None: every plain nn.Linear, all kept (no subclasses,
    and no layers whose forward was replaced). Modules, parameters and hooks keep their identity, so an optimizer, tied
    weights and DDP's reducer remain valid. A layer that is already masked gets the new masks; with keep=None it is not
    changed. Only forward applies the mask: code that reads layer.weight sees unmasked values, so save after `restore`.
    SensibertError names a layer that does not exist or cannot be masked; the model is then unchanged."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if keep is None:
        plain = (name for name, module in modules.items() if type(module) is nn.Linear and is_maskable(module))
        keep = {name: (None, Grid.row()) for name in plain}
    for name, (mask, grid) in keep.items():
        if name not in modules:
            raise SensibertError(f"replace: keep names {name!r}, which the model does not have")
        module = modules[name]
        if not is_maskable(module):
            raise SensibertError(f"replace: {name!r} is {kind_of(module)}, want a plain nn.Linear")
        try:
            check_keep(module, mask, grid)
        except SensibertError as error:
            raise SensibertError(f"replace: {name!r}: {error}") from None
    for name, (mask, grid) in keep.items():
        MaskedLinear.from_linear(modules[name], mask, grid)
    return model


@checked
def restore(model: nn.Module) -> nn.Module:
    """Turn every MaskedLinear of the model back into nn.Linear, dropped weights set to 0, in place; return the model.

    Outputs are the same up to the rounding of the matmul, which may group the terms of a sum in another way."""
    for module in list(model.modules()):
        if isinstance(module, MaskedLinear):
            module.to_linear()
    return model
