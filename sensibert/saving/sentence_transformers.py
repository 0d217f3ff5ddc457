"""The files beside a model's own with which sentence-transformers loads its folder: modules, pooling, prompts."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..core.errors import SensibertError
from ..core.json_text import parse_json
from ..models import base_of
from ..models.pooling import MODULES
from ..models.pooling import PROMPTS as SETTINGS

# Settings of the first module, the transformers model; the later names are of old folders.
FIRST = (
    *("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json"),
    *("sentence_camembert_config.json", "sentence_albert_config.json", "sentence_xlm-roberta_config.json"),
)
BESIDE = (MODULES, SETTINGS, *FIRST)
HEADS = {"feature-extraction": "", "fill-mask": "ForMaskedLM", "sequence-classification": "ForSequenceClassification"}
IDENTITY = "torch.nn.modules.linear.Identity"


def source_of(model: PreTrainedModel) -> Path | None:
    """The sentence-transformers folder that a model was loaded from, if its modules still fit; see `fits`."""
    folder = _folder(model.config)
    return folder if folder is not None and fits(folder, model) else None


def fits(folder: Path, model: PreTrainedModel) -> bool:
    """Whether the modules in a folder are for this model: it has the head that they expect, with as many outputs, and
    their width. Those of an embedding model are not for a classifier made of it.

    SensibertError for modules that cannot be copied."""
    modules = _modules(folder)
    for path in (module["path"] for module in modules):
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise SensibertError(f"export: {folder / MODULES} names the path {path!r}, want a folder beside it")
    kind, inside = modules[0]["type"].rpartition(".")[2], folder / modules[0]["path"]
    first: dict[str, Any] = next((_read(inside / name, dict) for name in FIRST if (inside / name).is_file()), {})
    task = "fill-mask" if kind == "MLMTransformer" else first.get("transformer_task", "feature-extraction")
    if not _has_head(model, HEADS.get(task), _read(inside / "config.json", dict)):
        return False
    other = next((m["type"] for m in modules if not m["type"].startswith("sentence_transformers.")), None)
    if other is not None:
        raise SensibertError(
            f"export: {folder} has the module {other}, whose code would not come along; want modules of "
            "sentence-transformers, or save_pretrained of the SentenceTransformer"
        )
    return True


def first_module(folder: Path) -> Path:
    """Where a folder of sentence-transformers has its transformers model and tokenizer."""
    return folder / _modules(folder)[0]["path"]


def library_class(folder: Path) -> str:
    """The class of sentence-transformers that loads a folder."""
    settings = _read(folder / SETTINGS, dict) if (folder / SETTINGS).is_file() else {}
    return settings.get("model_type", "SentenceTransformer")


def copy_modules(source: Path, target: Path, logits: bool) -> None:
    """Copy modules and settings that fit a model from a folder into that of the model. logits: it was trained on its
    logits as they are, so a reranker predicts these, not their sigmoid."""
    first, *others = _modules(source)
    for file in (source / SETTINGS, *(source / first["path"] / name for name in FIRST)):
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    for path in (module["path"] for module in others):
        if path and (source / path).is_dir():  # a module without settings may have none
            shutil.copytree(source / path, target / path, dirs_exist_ok=True)
    listed = [first | {"path": ""}, *others]  # the model is beside the list, in old folders it was in 0_Transformer
    (target / MODULES).write_text(json.dumps(listed, indent=2), encoding="utf-8")
    settings = target / SETTINGS
    if settings.is_file() and logits:
        text = _read(settings, dict) | {"activation_fn": IDENTITY}
        settings.write_text(json.dumps(text, indent=2), encoding="utf-8")


def _folder(config: Any) -> Path | None:
    """Where the model was loaded from, if there are modules. A model of the hub is fetched as far as it is missing."""
    name = config._name_or_path
    if not name:
        return None
    if os.path.isdir(name):
        here, outside = Path(name).resolve(), Path(name).resolve().parent
        if (here / MODULES).is_file():
            return here
        inside = (outside / MODULES).is_file() and _modules(outside)[0]["path"] == here.name
        return outside if inside else None
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path
        cached = None
    if not isinstance(cached, str):
        message = "export: %s, which the model was loaded from, is not there; modules beside it are not copied"
        logging.getLogger("sensibert").warning(message, name)
        return None
    if cached_file(name, MODULES, _raise_exceptions_for_missing_entries=False) is None:
        return None
    return Path(snapshot_download(name, allow_patterns=["*.json", "*_*/*"]))


def _read(file: Path, kind: type) -> Any:
    try:
        content = parse_json(file.read_text(encoding="utf-8"), any_size=True)
    except (OSError, ValueError) as error:
        raise SensibertError(f"export: cannot read {file} ({error})") from None
    if not isinstance(content, kind):
        raise SensibertError(f"export: {file} holds {type(content).__name__}, want {kind.__name__}")
    return content


def _has_head(model: PreTrainedModel, head: str | None, was: dict) -> bool:
    """was: the config.json beside the modules."""
    if head is None or (base_of(model) is model) != (head == "") or not type(model).__name__.endswith(head):
        return False
    own = model.config.to_dict()
    same = [name for name in ("hidden_size", "dim") if name in was]
    outputs = len(was.get("id2label") or ("LABEL_0", "LABEL_1")) if head == HEADS["sequence-classification"] else 0
    return all(own.get(name) == was[name] for name in same) and outputs in (0, model.config.num_labels)


def _modules(folder: Path) -> list[dict[str, str]]:
    modules = _read(folder / MODULES, list)
    known = ({"path": "", **module} if isinstance(module, dict) else {} for module in modules)
    listed = [module for module in known if all(isinstance(module.get(name), str) for name in ("type", "path"))]
    if not listed or len(listed) < len(modules):
        raise SensibertError(f"export: {folder / MODULES} lists no modules, want a folder of sentence-transformers")
    return listed
