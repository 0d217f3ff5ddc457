"""Model -> folder. It reloads exactly with `import sensibert`, and without it through `trust_remote_code=True`.

A new folder is written beside its target and renamed: it is there whole or not at all. Into a folder that already
holds something, files move one by one, config.json last: without it nothing loads.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..core.errors import SensibertError
from ..core.version import version
from ..models import base_of, family_of, layout_of, modeling_sensibert, sites
from ..models.masks import Masks, kept_of, masks_of, set_masks
from ..models.reloadable import is_reloadable, reloadable, stock_class, stock_config
from ..models.structure import STRUCTURE, is_trimmed, read_structure, save_structure, structure_of
from ..nn import MaskedLinear
from .model_card import CODE, card

LAYOUTS = ("trimmed", "dense", "both")
CONFIG, CARD = "config.json", "README.md"
REPORTS = ("result.json", "recipe.json")  # what a run says of itself
DENSE = "dense"  # subfolder of layout="both"


def _shapes(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model of the base sizes, without values."""
    with torch.device("meta"):
        return stock_class(model)._from_config(stock_config(model.config))


def dense(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model of the base sizes that computes the same: what was cut away comes back as zeros."""
    structure, made, wide = structure_of(model), _shapes(model), {}
    narrow = dict(base_of(model).named_parameters())
    for site in sites(made):
        kept = structure[site.name]
        for member in site.members:
            old, shape = narrow[member.parameter].detach(), base_of(made).get_parameter(member.parameter).shape
            index = member.index(kept.to(old.device), site.units)
            wide[member.parameter] = old.new_zeros(shape).index_copy_(member.dim, index, old)
    keep, grid = kept_of(model)
    for name, kept in (keep or {}).items():
        wide[name].masked_fill_(~grid.expand(kept.to(wide[name].device), *wide[name].shape), 0)
    prefix = "" if base_of(model) is model else f"{model.base_model_prefix}."
    state = model.state_dict() | {prefix + name: value for name, value in wide.items()}
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    return made


def _facts(model: PreTrainedModel, info: dict | None) -> dict:
    """What config.sensibert says beside the shapes; a re-exported model keeps what it knew of its origin."""
    try:
        json.dumps(info)
    except (TypeError, ValueError) as error:
        raise SensibertError(f"export: info does not fit into a JSON file ({error})") from None
    known, layout = getattr(model.config, "sensibert", {}), layout_of(model)
    origin = {name: known.get(name) for name in ("budget", "method")}
    now = {"digest": layout.digest, "encoder_params": layout.encoder_params, "sensibert_version": version()}
    return origin | now | (info or {})


def _place(temporary: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or not any(path.iterdir()):
        os.replace(temporary, path)
        return
    for old in (CONFIG, STRUCTURE, CODE, *REPORTS):  # of an earlier export; without a config.json nothing loads
        (path / old).unlink(missing_ok=True)
    if (path / DENSE / CONFIG).exists():
        shutil.rmtree(path / DENSE)
    for new in sorted(temporary.iterdir(), key=lambda new: new.name == CONFIG):
        os.replace(new, path / new.name)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A new empty folder that becomes `path` (or moves into it) if all goes well, and else leaves nothing behind."""
    anchor = next(parent for parent in path.parents if parent.exists())
    temporary = anchor / f".{path.name}.{secrets.token_hex(4)}"
    try:
        temporary.mkdir()
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            file.chmod(0o644)  # safetensors writes for its owner alone
        _place(temporary, path)
    except (OSError, SafetensorError) as error:
        raise SensibertError(f"export: cannot write {path} ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(model: PreTrainedModel, path: Path, layout: str, overwrite: bool) -> None:
    if layout not in LAYOUTS:
        raise SensibertError(f"export: layout is {layout!r}, want one of {', '.join(LAYOUTS)}")
    family_of(model), stock_class(model)
    masked = [name for name, module in model.named_modules() if isinstance(module, MaskedLinear)]
    if masked and masks_of(model) is None:
        raise SensibertError(
            f"export: {len(masked)} layers are masked ({masked[0]}, ...), want none: restore() them first"
        )
    if path.exists() and not path.is_dir():
        raise SensibertError(f"export: {path} is a file, want a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise SensibertError(f"export: {path} is not empty; pass overwrite=True to replace what is in it")


def export(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layout: str = "trimmed",
    overwrite: bool = False,
    info: dict | None = None,
) -> Path:
    """Write a transformers model, trimmed or not, as a folder that reloads to the same logits; returns the path.

    layout: "trimmed" (as small as the model is), "dense" (a stock model of the base sizes with zeros where something
    was cut: loads everywhere, to the same logits within rounding) or "both" (the dense one in a subfolder). A model
    that was never trimmed is written as it is; one that a grid masks becomes a stock model with zeros, its masks beside
    it in structure.safetensors. info: more facts for the entry `sensibert` of config.json. overwrite: files of the same
    names are replaced, others stay. SensibertError if the path is taken or cannot be written."""
    path = Path(path).expanduser().resolve()
    _check(model, path, layout, overwrite)
    parts: dict[str, PreTrainedModel] = {}  # subfolder -> what goes into it
    if masks_of(model) is not None:
        parts[""] = dense(model)
    elif not is_trimmed(model):
        parts[""] = model
    else:
        if layout != "dense":
            parts[""] = reloadable(model, _facts(model, info))
        if layout != "trimmed":
            parts[DENSE if parts else ""] = dense(model)
    with _whole(path) as folder:
        for part, made in parts.items():
            made.save_pretrained(folder / part)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / part)
            if masks_of(model) is not None:
                save_structure(model, folder / STRUCTURE)
            if is_reloadable(made):
                (folder / CARD).write_text(card(path.name, made, _shapes(model)), encoding="utf-8")
    return path


def load(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Model (in eval mode, with its head and masks) and tokenizer, if there is one, of an exported folder."""
    try:
        name = (AutoConfig.from_pretrained(path).architectures or ["no architecture"])[0]
        model_class = getattr(modeling_sensibert if name.startswith("Sensibert") else transformers, name, None)
        if model_class is None:
            raise ValueError(f"its config.json names {name}, want a model class of transformers")
        model = model_class.from_pretrained(path)
        cut = cached_file(path, STRUCTURE, _raise_exceptions_for_missing_entries=False)
        structure = {} if cut is None else read_structure(cut)
        if isinstance(structure, Masks):
            set_masks(model, structure)
        tokenized = cached_file(path, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
        return model, None if tokenized is None else AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SensibertError(f"{path}: not a model folder that can be loaded ({reason})") from None


def load_structure(path: str | Path) -> dict[str, Tensor] | Masks:
    """Site name -> numbers of the base model's units that are left (int64, ascending), of a trimmed folder; the masks
    of one that a grid cut."""
    return read_structure(Path(path) / STRUCTURE)
