"""Model -> folder with a model card, written atomically, and folder -> model."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..core.arguments import checked, one_of, want
from ..core.config import LAYOUTS
from ..core.cost_table import WEIGHTS
from ..core.errors import SensibertError, first_line
from ..core.files import make_readable, writing
from ..core.folder_facts import want_facts
from ..core.model_folder import want_model_folder
from ..core.output_paths import check_apart, check_movable, unfinished_name
from ..core.version import version
from ..models import base_of, family_of, layout_of, modeling_sensibert, sites
from ..models.masks import Masks, kept_of, masks_of, set_masks
from ..models.modules import want_finite
from ..models.reloadable import stock_class, stock_config
from ..models.structure import STRUCTURE, is_trimmed, read_structure, save_structure, structure_of
from ..models.unfinished import unfinished
from ..models.weight_bits import with_weights
from ..models.weights import from_pretrained
from ..models.wrapped import inner_model, is_wrapped
from ..nn import MaskedLinear
from .model_card import CARD, OF_RUN, card, licence_of
from .publish import publish
from .sentence_transformers import copy_modules, first_module, fits, library_class, source_of

DENSE = "dense"  # subfolder of layout="both"
# Entries of config.json that `info` does not override.
SHAPES = ("format", "base_model_type", "head_dim", "heads", "ffn", "kept_heads", "table")


def _shapes(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model with the sizes of the base model, on the meta device."""
    with torch.device("meta"):
        made = stock_class(model)._from_config(stock_config(model.config))
    if hasattr(base_of(made), "pooler"):  # some heads leave it out of their encoder, others add one
        base_of(made).pooler = copy.deepcopy(base_of(model).pooler)
    return made


def zero_filled(model: PreTrainedModel) -> PreTrainedModel:
    """A stock model of the original sizes that computes the same, with zeros in place of removed weights."""
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
        assert grid is not None  # the grid of keep
        wide[name].masked_fill_(~grid.expand(kept.to(wide[name].device), *wide[name].shape), 0)
    prefix = "" if base_of(model) is model else f"{model.base_model_prefix}."
    state = model.state_dict() | {prefix + name: value for name, value in wide.items()}
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    return made


def _view(model: PreTrainedModel, info: dict) -> PreTrainedModel:
    """A shallow copy that shares the model's modules. Its own config has more facts in the entry `sensibert`."""
    layout, view = layout_of(model), copy.copy(model)
    origin = {"budget": None, "method": None} | model.config.sensibert
    counted = {"digest": layout.digest, "encoder_params": layout.encoder_params, "sensibert_version": version()}
    shapes = {name: model.config.sensibert[name] for name in SHAPES}
    view.config = copy.deepcopy(model.config)
    view.config.sensibert = origin | counted | info | shapes
    return view


@contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A context with a new empty folder. On success it becomes `path`; on an error it is deleted."""
    anchor = next(parent for parent in path.parents if parent.exists())
    temporary = anchor / unfinished_name(path.name)
    try:
        with writing(path):
            temporary.mkdir()
            yield temporary
            for file in filter(Path.is_file, temporary.rglob("*")):
                make_readable(file)  # safetensors makes files that only their owner can read
            publish(temporary, path, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_class(model: PreTrainedModel) -> None:
    """SensibertError if the class or config of the model does not belong to its trimmed layers, as in a model that was
    put together around one."""
    stock, base = stock_class(model), base_of(model)
    own, of_base = (getattr(part.config, "sensibert", None) for part in (model, base))
    if own != of_base or (type(model) is stock and (own or is_trimmed(model))):
        raise SensibertError(
            f"export: {type(model).__name__} has trimmed layers but the class or config of another model, so its "
            "folder would not load; want a model that was trimmed or loaded as a whole"
        )


def _check(
    model: PreTrainedModel, path: Path, layout: str, overwrite: bool, info: dict, accept_unfinished: bool
) -> None:
    if layout not in LAYOUTS:
        raise SensibertError(f"export: layout is {layout!r}, {one_of(layout, LAYOUTS)}")
    try:
        json.dumps(info)
    except (TypeError, ValueError) as error:
        raise SensibertError(f"export: info does not fit into a JSON file ({error})") from None
    want_facts(info, "export: info")
    family_of(model)
    _check_class(model)
    masked = [name for name, module in model.named_modules() if isinstance(module, MaskedLinear)]
    if masked and masks_of(model) is None:
        raise SensibertError(
            f"export: {len(masked)} layers are masked ({masked[0]}, ...), want none: restore() them first"
        )
    want_finite(model.named_parameters(), "export")
    if not accept_unfinished and (budgets := unfinished(model)) is not None:
        raise SensibertError(
            f"export: the model reached {budgets[0]} on the way to {budgets[1]}, when its training ended; want "
            "trim(model, plan) first, or accept_unfinished=True to write it as it is"
        )
    if path.exists() and not path.is_dir():
        raise SensibertError(f"export: {path} is a file, want a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise SensibertError(f"export: {path} is not empty; pass overwrite=True to replace what is in it")
    check_apart(path)
    check_movable(path)


@contextmanager
def _modules(model: nn.Module) -> Iterator[Path | None]:
    """A context with the folder of the sentence-transformers modules that belong to a model; None without any."""
    if not is_wrapped(model):
        yield source_of(cast(PreTrainedModel, model))
        return
    with tempfile.TemporaryDirectory() as temporary:
        cast(Any, model).save_pretrained(temporary, create_model_card=False)
        folder = Path(temporary)
        yield folder if fits(folder, cast(PreTrainedModel, inner_model(model))) else None


def export(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layout: str = "trimmed",
    overwrite: bool = False,
    info: dict | None = None,
    accept_unfinished: bool = False,
    weights: str | None = None,
) -> Path:
    """Write a transformers model, trimmed or not, as a folder that reloads to the same logits; return the path.

    `model.save_pretrained` does that too; export adds the tokenizer, a model card and facts, and writes atomically.
    layout: "trimmed" (the sizes of the model), "dense" (a stock model of the original sizes with zeros in place of
    removed weights: loads everywhere, with the same logits up to rounding) or "both" (the dense one in a subfolder). An
    untrimmed model is written without changes; one masked by a grid as a stock model with zeros, with its masks in
    structure.safetensors. info: more facts for the entry `sensibert` of config.json; `metrics`, `base_model`,
    `train_data` and `validation_data` go on the model card instead, with the licence that the card of the base model
    states. overwrite: replace a model in the folder; its other
    files are kept. accept_unfinished: also write a model whose training ended between two cuts, with the budget that it
    reached. weights: `fp16` or `bf16` writes model.safetensors in 16 bits, half as large, and config.json says so;
    `from_pretrained(path, dtype=torch.float32)` computes in 32 bits with them. None: as the model has them.

    model may be a SentenceTransformer, SparseEncoder or CrossEncoder, or come from the folder of one and fit its
    modules. Those are written too, with pooling, prompts and tokenizer. SensibertError if the path is not empty or
    cannot be written, and for modules whose code is not in sentence-transformers."""
    wanted = {"path": str | Path, "tokenizer": PreTrainedTokenizerBase | None, "overwrite": bool, "info": dict | None}
    for (name, hint), value in zip(wanted.items(), (path, tokenizer, overwrite, info), strict=True):
        want(f"export: {name}", value, hint)
    path, info, whole = Path(os.path.expanduser(path)).resolve(), info or {}, model
    model = cast(PreTrainedModel, inner_model(whole))
    if weights is not None and weights not in WEIGHTS:
        raise SensibertError(f"export: weights is {weights!r}, {one_of(weights, WEIGHTS)}")
    _check(model, path, layout, overwrite, info, accept_unfinished)
    run, info = ({n: v for n, v in info.items() if (n in OF_RUN) is both} for both in (True, False))
    parts: dict[str, PreTrainedModel] = {}  # subfolder -> what goes into it
    masked, trimmed = masks_of(model) is not None, is_trimmed(model)
    if masked:
        parts[""] = zero_filled(model)
    elif not trimmed or layout != "dense":
        parts[""] = _view(model, info) if trimmed else model
    if trimmed and layout != "trimmed":
        parts[DENSE if parts else ""] = zero_filled(model)
    with _modules(whole) as modules, new_folder(path, overwrite) as folder:
        if tokenizer is None and modules is not None:
            beside = first_module(modules)
            if (beside / "tokenizer_config.json").is_file():
                tokenizer = AutoTokenizer.from_pretrained(beside, trust_remote_code=False)
        for part, made in parts.items():
            made = made if weights is None else with_weights(made, weights)
            made.save_pretrained(folder / part)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / part)
            if modules is not None:
                copy_modules(
                    modules, folder / part, not is_wrapped(whole) and model.config.problem_type == "regression"
                )
            if is_trimmed(made):
                library = None if modules is None else library_class(modules)
                licence = licence_of(modules or "") or licence_of(model.config._name_or_path)
                text = card(path.name, made, _shapes(model), library, run, licence, tokenizer is not None)
                (folder / CARD).write_text(text, encoding="utf-8")
        if masked:
            save_structure(model, folder / STRUCTURE)
    return path


@checked
def load(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load (model, tokenizer) of a folder: the model in eval mode, with its head and masks; the tokenizer may be None.
    SensibertError if the folder cannot be loaded, or lacks weights."""
    try:
        want_model_folder(path, "path")
        name = (AutoConfig.from_pretrained(path, trust_remote_code=False).architectures or ["no architecture"])[0]
        model_class = getattr(modeling_sensibert if name.startswith("Sensibert") else transformers, name, None)
        if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
            raise ValueError(f"its config.json names {name}, want a model class of transformers")
        model = from_pretrained(model_class, path)
        cut = cached_file(path, STRUCTURE, _raise_exceptions_for_missing_entries=False)
        structure = {} if cut is None else read_structure(cut)
        if isinstance(structure, Masks):
            set_masks(model, structure)
        tokenized = cached_file(path, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
        return model, None if tokenized is None else AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except SensibertError:
        raise
    except Exception as error:  # of transformers, its libraries and pickle
        raise SensibertError(f"{path}: not a model folder that can be loaded ({first_line(error)})") from error


@checked
def load_structure(path: str | Path) -> dict[str, Tensor] | Masks:
    """Read the structure of a trimmed folder: site name -> indices of the kept units in the original model (int64,
    ascending). For a folder masked by a grid: its masks. SensibertError if there is no such file."""
    return read_structure(Path(path) / STRUCTURE)
