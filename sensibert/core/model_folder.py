"""Whether a path can be a model folder, decided before transformers looks at it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from .arguments import show
from .errors import SensibertError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def want_model_folder(source: str | Path, argument: str) -> None:
    """SensibertError, naming the argument, for a file, and for a folder without a config.json that names a model type.

    What is neither passes if it can be a name on the hub."""
    text = str(source)
    if os.path.isdir(text):
        _want_config(Path(source) / "config.json", f"{argument}: {source}")
    elif os.path.exists(text):  # Path.exists raises for a name that is too long
        raise SensibertError(f"{argument}: {source} is a file, want the folder of a model")
    elif not _HUB_NAME.fullmatch(text):
        wrong = "is no folder, and cannot be loaded from the hub (names there are NAME or OWNER/NAME)"
        raise SensibertError(f"{argument}: {text or repr(text)} {wrong}")


def _want_config(file: Path, place: str) -> None:
    if not file.is_file():
        raise SensibertError(f"{place} has no config.json, want the folder of a model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"it is not JSON: {error}"
        raise SensibertError(f"{place} cannot be read, config.json: {reason}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        came = "no model_type" if isinstance(config, dict) else show(config)
        raise SensibertError(f"{place} has a config.json with {came}, want an object that names its model_type")
    if not isinstance(entry := config.get("sensibert", {}), dict):
        raise SensibertError(f"{place} has a config.json whose entry sensibert is {show(entry)}, want an object")
