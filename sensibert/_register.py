"""Lets transformers' Auto classes load trimmed folders without trust_remote_code, once sensibert is imported.

The import stays quick: neither this file nor the package's __init__ imports torch or transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO = "transformers.models.auto.configuration_auto"
PREFIX = "sensibert_"


def register_families() -> None:
    """Register every `sensibert_<family>` with AutoConfig; the first config of a type registers its model classes."""
    auto = importlib.import_module(AUTO)
    code = importlib.import_module(f"{__package__}.models.modeling_sensibert")
    for model_type in importlib.import_module(f"{__package__}.models").families():
        if model_type in auto.CONFIG_MAPPING:  # an older transformers may lack an alias
            config_class = getattr(code, f"Sensibert{auto.CONFIG_MAPPING[model_type].__name__}")
            auto.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


class _Known(dict):
    """Transformers' dict of registered config types. The first lookup of one of our types registers all of them: the
    classes cannot be built earlier, while transformers itself is being imported."""

    waiting = True

    def __contains__(self, model_type: object) -> bool:
        if self.waiting and isinstance(model_type, str) and model_type.startswith(PREFIX):
            self.waiting = False
            register_families()
        return super().__contains__(model_type)


def _prepare(auto: ModuleType) -> None:
    mapping = auto.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _Known):
        mapping._extra_content = _Known(mapping._extra_content)


class _WhenImported(Loader):
    """Import hook for AUTO: prepares the module once it is loaded, and removes itself."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None  # made from the spec of `find_spec`
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _prepare(module)


def register() -> None:
    """Prepare transformers' Auto classes now, or as soon as they are imported."""
    if AUTO in sys.modules:
        _prepare(sys.modules[AUTO])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
