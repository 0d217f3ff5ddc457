"""Trim BERT-family models while fine-tuning: remove the attention heads and FFN neurons that the loss needs least.

Importing this lets transformers' Auto classes load trimmed folders, and sets the sizes of two libraries' caches where
the environment does not (core/library_caches.py). The names below import their modules on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ._register import register
from .core.library_caches import enlarge_caches
from .core.version import version

# Functions that share their name with a module come from that module: type checkers take one for the other.
if TYPE_CHECKING:
    from .allocation.allocate import allocate
    from .allocation.explain import explain
    from .callback import TrimCallback
    from .core.artifacts import BlockPlan, Plan, Sensitivity, UnitPlan
    from .core.budget import Budget
    from .core.config import TrimConfig
    from .core.errors import SensibertError
    from .core.grid import Grid
    from .core.layout import Layout, Site
    from .core.schedule import Schedule
    from .decide import trim_model
    from .deploy import export_graph
    from .models import families, layout_of
    from .nn import MaskedLinear, replace, restore
    from .ops.block_sensitivity import block_sensitivity
    from .ops.gather_kept import gather_kept
    from .ops.masked_adamw import masked_adamw
    from .ops.masked_linear.op import masked_linear
    from .ops.select_threshold import Selection, select_threshold
    from .optim import MaskedAdamW, optimizer_cls_and_kwargs, slice_state
    from .recipe import finetune_and_trim
    from .run_options import Options
    from .saving import export, load, load_structure
    from .sensitivity.analyze import analyze
    from .sensitivity.sampled_loss import sampled_loss
    from .training import TrimTrainer, finetune
    from .trimming.trim import trim
    from .trimming.vocabulary import trim_vocabulary

    __version__: str

_HOME = {
    "allocation": ("allocate", "explain"),
    "callback": ("TrimCallback",),
    "core.artifacts": ("BlockPlan", "Plan", "Sensitivity", "UnitPlan"),
    "core.budget": ("Budget",),
    "core.config": ("TrimConfig",),
    "core.errors": ("SensibertError",),
    "core.grid": ("Grid",),
    "core.layout": ("Layout", "Site"),
    "core.schedule": ("Schedule",),
    "decide": ("trim_model",),
    "deploy": ("export_graph",),
    "models": ("families", "layout_of"),
    "nn": ("MaskedLinear", "replace", "restore"),
    "ops": ("Selection", "block_sensitivity", "gather_kept", "masked_adamw", "masked_linear", "select_threshold"),
    "optim": ("MaskedAdamW", "optimizer_cls_and_kwargs", "slice_state"),
    "recipe": ("finetune_and_trim",),
    "run_options": ("Options",),
    "saving": ("export", "load", "load_structure"),
    "sensitivity": ("analyze", "sampled_loss"),
    "training": ("TrimTrainer", "finetune"),
    "trimming.vocabulary": ("trim_vocabulary",),
    "trimming": ("trim",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = [
    "BlockPlan",
    "Budget",
    "Grid",
    "Layout",
    "MaskedAdamW",
    "MaskedLinear",
    "Options",
    "Plan",
    "Schedule",
    "Selection",
    "SensibertError",
    "Sensitivity",
    "Site",
    "TrimCallback",
    "TrimConfig",
    "TrimTrainer",
    "UnitPlan",
    "__version__",
    "allocate",
    "analyze",
    "block_sensitivity",
    "explain",
    "export",
    "export_graph",
    "families",
    "finetune",
    "finetune_and_trim",
    "gather_kept",
    "layout_of",
    "load",
    "load_structure",
    "masked_adamw",
    "masked_linear",
    "optimizer_cls_and_kwargs",
    "replace",
    "restore",
    "sampled_loss",
    "select_threshold",
    "slice_state",
    "trim",
    "trim_model",
    "trim_vocabulary",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version()
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE[name]}", __name__), name)
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


enlarge_caches()
register()
