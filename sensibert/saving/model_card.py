"""The README.md of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..core.text import share
from ..models import base_of, family_of, modeling_sensibert, sites
from ..models.modules import attribute
from ..models.unfinished import UNFINISHED

CARD, CODE = "README.md", modeling_sensibert.CODE_FILE
_CARD = """---
library_name: {library}
tags: [sensibert, pruned]
pipeline_tag: {pipeline}
{base_model}{licence}---
# {name}

`{head}` with a trimmed {family} encoder, made by sensibert {version}.

| | this model | base model |
|---|---|---|
| encoder parameters | {encoder:,} | {base_encoder:,} ({left} left) |
| all parameters | {total:,} | {base_total:,} |
| heads by layer | {heads} | {base_heads} |
| FFN neurons by layer | {ffn} | {base_ffn} |
| data type of the weights | {dtype} | |

Budget: {budget}. Method: {method}.

{scores}## Load

```python
import sensibert  # registers the model class with transformers
{imports}

model = {load}("{name}")
{tokenizer}```

Without sensibert installed, the folder's own code (`{code}`) is used:

```python
model = {load}("{name}", trust_remote_code=True)
```

Trimmed means that attention heads and feed-forward neurons were removed. `structure.safetensors` lists the indices of
those that are kept, in the base model.
"""


# Facts of a run that `export` writes on the card alone: in the config they would stay when the weights change.
OF_RUN = ("metrics", "metrics_baseline", "base_model", "train_data", "validation_data")
# Part of a model's class -> the task by which people look for it.
PIPELINES = {
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MaskedLM": "fill-mask",
    "MultipleChoice": "multiple-choice",
}
LICENCE = ("license", "license_name", "license_link")
LIBRARY_PIPELINES = {"SentenceTransformer": "sentence-similarity", "CrossEncoder": "text-ranking"}


def _pipeline(head: str, library_class: str | None) -> str:
    found = next((task for part, task in PIPELINES.items() if part in head), "feature-extraction")
    return LIBRARY_PIPELINES.get(library_class or "", found)


def licence_of(source: str | Path) -> dict[str, Any]:
    """What the model card of a folder, or of a name on the hub, says about the licence: `license`, and where that is
    `other` also `license_name` and `license_link`. Empty without a card that can be read.

    A link to a file in the folder is left out: the file is not copied."""
    try:
        if not Path(source).is_dir():  # a card of the hub is fetched only if the model came from there
            if not source or not isinstance(try_to_load_from_cache(str(source), "config.json"), str):
                return {}
            found = cached_file(source, CARD, _raise_exceptions_for_missing_entries=False)
        else:
            found = str(Path(source, CARD))
        stated = metadata_load(found) if found and Path(found).is_file() else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError, HFValidationError):
        return {}
    known = {name: value for name in LICENCE if isinstance(value := (stated or {}).get(name), str) and value}
    if "://" not in known.get("license_link", ""):
        known.pop("license_link", None)
    return known if known.get("license") == "other" else {name: known[name] for name in known.keys() & {"license"}}


def _scores(run: Mapping[str, Any]) -> str:
    """A section with the scores of the run, if it had any."""
    if not run.get("metrics"):
        return ""
    baseline = run.get("metrics_baseline") or {}
    rows = "".join(
        f"| {name} | {value:.4f} |{f' {baseline[name]:.4f} |' if name in baseline else ''}\n"
        for name, value in run["metrics"].items()
    )
    header = "| | this model | not trimmed, equally long |\n|---|---|---|\n" if baseline else "| | |\n|---|---|\n"
    parts = ("validation", "train")
    where = ", ".join(f"{part}: {run[f'{part}_data']}" for part in parts if run.get(f"{part}_data"))
    return f"## Scores\n\n{header}{rows}\n{f'Data ({where}).' if where else ''}\n\n"


def _numbers(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else " ".join(map(str, values))


def card(
    name: str,
    view: PreTrainedModel,
    base: PreTrainedModel,
    library_class: str | None = None,
    run: Mapping[str, Any] | None = None,
    licence: Mapping[str, Any] | None = None,
    tokenizer: bool = False,
) -> str:
    """The model card: sizes of the model and of its base, origin, and both ways of loading.

    library_class: of sentence-transformers, for a folder with its modules. run: facts of the run (OF_RUN). licence: of
    the base model (`licence_of`). tokenizer: whether the folder has one."""
    run = run or {}
    entry, encoder = view.config.sensibert, family_of(base).encoder
    full = {kind: [site.units for site in sites(base) if site.kind == kind] for kind in ("head", "ffn")}
    base_encoder = sum(p.numel() for p in attribute(base_of(base), encoder).parameters())
    head = type(view).__name__
    tokenizer = tokenizer and library_class is None  # the classes of sentence-transformers load their own
    auto = next((auto for auto, path in view.config.auto_map.items() if path.endswith(f".{head}")), "AutoModel")
    return _CARD.format(
        name=name,
        head=type(base).__name__,
        pipeline=_pipeline(head, library_class),
        base_model=f"base_model: {run['base_model']}\n" if run.get("base_model") else "",
        licence=yaml.safe_dump(dict(licence), sort_keys=False, allow_unicode=True) if licence else "",
        scores=_scores(run),
        family=entry["base_model_type"],
        version=entry["sensibert_version"],
        encoder=entry["encoder_params"],
        base_encoder=base_encoder,
        left=share(entry["encoder_params"], base_encoder),
        total=sum(p.numel() for p in view.parameters()),
        base_total=sum(p.numel() for p in base.parameters()),
        heads=_numbers(entry["heads"]),
        base_heads=_numbers(full["head"]),
        ffn=_numbers(entry["ffn"]),
        base_ffn=_numbers(full["ffn"]),
        dtype=str(view.dtype).removeprefix("torch."),
        budget=(entry["budget"] or "not noted")
        + (f", on the way to {entry[UNFINISHED]}" if UNFINISHED in entry else ""),
        method=entry["method"] or "not noted",
        library="transformers" if library_class is None else "sentence-transformers",
        tokenizer=f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n' if tokenizer else "",
        imports=f"from transformers import {auto}{', AutoTokenizer' if tokenizer else ''}"
        if library_class is None
        else f"from sentence_transformers import {library_class}",
        load=f"{auto}.from_pretrained" if library_class is None else library_class,
        code=CODE,
    )


def is_card(path: Path) -> bool:
    """Whether a file is a model card of ours, rather than a README of somebody's own."""
    return path.name == CARD and b"tags: [sensibert" in path.read_bytes()[:200]
