"""Sensitivity-driven trimming of BERT-family models while fine-tuning.

Importing this is enough for transformers to load trimmed folders. The names below come with their modules on first use.
"""

from importlib import import_module

from ._register import register
from .core.version import version

_HOME = {
    "core.config": ("TrimConfig",),
    "core.errors": ("SensibertError",),
    "core.grid": ("Grid",),
    "core.layout": ("Layout", "Site"),
    "core.budget": ("Budget",),
    "core.artifacts": ("BlockPlan", "Plan", "Sensitivity", "UnitPlan"),
    "ops": ("BlockSensitivity", "Selection", "block_sensitivity", "masked_adamw", "masked_linear", "select_threshold"),
    "nn": ("MaskedLinear", "replace", "restore"),
    "models": ("layout_of", "families"),
    "optim": ("MaskedAdamW", "slice_state"),
    "sensitivity": ("analyze",),
    "allocation": ("allocate",),
    "trimming": ("trim",),
    "training": ("TrimTrainer", "finetune"),
    "saving": ("export", "load", "load_structure"),
    "run_options": ("Options",),
    "callback": ("TrimCallback",),
    "recipe": ("finetune_and_trim",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", *sorted(_MODULE)]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version()
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE[name]}", __name__), name)
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
