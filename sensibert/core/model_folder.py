"""Whether a path can be a model folder, decided before transformers looks at it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .arguments import show
from .errors import SensibertError
from .folder_facts import want_entry
from .json_text import parse_json

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")  # names of the number of layers
MOST_LAYERS = 1000
WIDTHS = ("hidden_size", "dim", "d_model", "n_embd")
FFN_WIDTHS = ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim")
TABLES = ("vocab_size", "max_position_embeddings", "type_vocab_size", "position_buckets", "max_relative_positions")
# A config may ask for this many bytes of weights, or for this many times the bytes of its files: layers that were
# trimmed and weights of 8 or 16 bits are smaller than what a config says.
FREE_BYTES, RATIO = 2**30, 8


def want_model_folder(source: str | Path, argument: str) -> None:
    """SensibertError, naming the argument, for a file, and for a folder without a config.json that names a model type
    and sizes that its weights can have.

    What is neither passes if it can be a name on the hub."""
    text = str(source)
    if os.path.isdir(text):
        place = f"{argument}: {source}"
        config = _config(Path(source) / "config.json", place)
        want_entry(config.get("sensibert", {}), place)
        _want_sizes(config, Path(source), place)
    elif os.path.exists(text):  # Path.exists raises for a name that is too long
        raise SensibertError(f"{argument}: {source} is a file, want the folder of a model")
    elif not _HUB_NAME.fullmatch(text):
        wrong = "is no folder, and cannot be loaded from the hub (names there are NAME or OWNER/NAME)"
        raise SensibertError(f"{argument}: {text or repr(text)} {wrong}")


def _config(file: Path, place: str) -> dict[str, Any]:
    if not file.is_file():
        members = sorted(path.parent.name for path in file.parent.glob(f"*/{file.name}"))
        among = f"; it holds {', '.join(members)}" if members else ""
        raise SensibertError(f"{place} has no config.json, want the folder of a model{among}")
    try:
        config = parse_json(file.read_text(encoding="utf-8"), any_size=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"it is not JSON: {error}"
        raise SensibertError(f"{place} cannot be read, config.json: {reason}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        came = "no model_type" if isinstance(config, dict) else show(config)
        raise SensibertError(f"{place} has a config.json with {came}, want an object that names its model_type")
    return config


def _want_sizes(config: Mapping[str, Any], folder: Path, place: str) -> None:
    """SensibertError for sizes that would take far more memory than the weights of the folder: before any is taken."""
    for name in (*LAYERS, *WIDTHS, *FFN_WIDTHS, *TABLES):
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and not -1 <= value < 2**40:
            raise SensibertError(
                f"{place} has a config.json with {name} {show(value)}, want a size that memory can hold"
            )
    if (layers := _size(config, LAYERS)) > MOST_LAYERS:
        raise SensibertError(f"{place} has a config.json with {layers:,} layers, want at most {MOST_LAYERS:,}")
    width, narrow = _size(config, WIDTHS), config.get("embedding_size")
    narrow = narrow if isinstance(narrow, int) and 0 < narrow < width else width
    labels = config.get("id2label")
    rows = sum(_size(config, (name,)) for name in TABLES) + (len(labels) if isinstance(labels, dict) else 0)
    groups = config.get("num_hidden_groups")  # of ALBERT, whose layers share weights
    own = groups if isinstance(groups, int) and 0 < groups < layers else layers
    asked = 4 * (rows * narrow + own * (2 * width * width + width * _size(config, FFN_WIDTHS)))  # at least, in fp32
    files = [file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)]
    if asked > max(FREE_BYTES, RATIO * sum(files)):
        raise SensibertError(
            f"{place} has a config.json that asks for at least {asked / 1e9:.1f} GB of weights, and its files have "
            f"{sum(files) / 1e9:.3f} GB; want the config of these weights"
        )


def _size(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """The first of these entries that is a size; 0 if there is none."""
    values = (config.get(name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), 0)
