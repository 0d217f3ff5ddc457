"""Tokenizer, model and texts -> the pieces of the vocabulary that the texts need, and the rows of their embeddings.

A text that the old tokenizer splits into kept pieces alone is split in the same way, and the model computes the same,
bit for bit: greedy matching (WordPiece), merges in their order (BPE) and the likeliest path (Unigram) choose among
fewer pieces what they chose among more. Any other text still has tokens: all single characters are kept, and with them
what a text of unknown words is made of.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..core.arguments import checked, show
from ..core.errors import SensibertError
from ..models import base_of

KINDS = ("WordPiece", "BPE", "Unigram")
TOGETHER = 1024  # texts that are tokenized at a time
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"


@checked
def trim_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> PreTrainedTokenizerBase:
    """Keep the pieces that the texts are split into, special tokens and single characters. The model's embeddings are
    changed in place; the new tokenizer is returned. Numbers of tokens change, their order does not.

    SensibertError for no texts, a tokenizer that is not a fast one of WordPiece, BPE or Unigram, or does not fit the
    model, and a model with a head over the vocabulary. The model is then unchanged."""
    return shrink(model, tokenizer, texts).tokenizer


class Smaller(NamedTuple):
    """A tokenizer of fewer pieces. kept: their numbers in the old one, ascending."""

    tokenizer: PreTrainedTokenizerBase
    kept: list[int]


def shrink(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Smaller:
    """`trim_vocabulary`, with the numbers of the pieces for `keep_pieces` of models with the same vocabulary."""
    whole = _content(tokenizer)
    _table_of(model, tokenizer)
    kept = _kept(whole, _used(tokenizer, texts))
    made = Smaller(_rewritten(tokenizer, whole, {old: new for new, old in enumerate(kept)}), kept)
    keep_pieces(model, made)
    return made


def keep_pieces(model: PreTrainedModel, smaller: Smaller) -> None:
    """Keep the rows of a model's embeddings that belong to these pieces, in place. SensibertError for a model whose
    positions would change; the model is then unchanged."""
    kept, table = smaller.kept, model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)  # `_table_of` checked it
    number = {old: new for new, old in enumerate(kept)}
    rows = torch.tensor(kept, device=table.weight.device)
    pad = number.get(model.config.pad_token_id)
    made = nn.Embedding(len(kept), table.embedding_dim, None if table.padding_idx is None else pad, device="meta")
    made.weight = nn.Parameter(table.weight.detach().index_select(0, rows), table.weight.requires_grad)
    for module in base_of(model).modules():
        if module is not table and getattr(module, "padding_idx", None) == model.config.pad_token_id != pad:
            raise SensibertError(
                "trim_vocabulary: the positions of this model count from its padding token, whose number would change"
            )
    model.set_input_embeddings(made.train(table.training))
    configs: list[Any] = [model.config, base_of(model).config]
    for config in {id(each): each for each in configs}.values():
        config.vocab_size = len(kept)
        for name, value in vars(config).items():
            if name.endswith("_token_id") and isinstance(value, int):
                setattr(config, name, number.get(value, value))


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """tokenizer.json of a fast tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = {"model": {"type": None}} if backend is None else json.loads(backend.to_str())
    kind = whole["model"].get("type")
    if kind not in KINDS:
        came = type(tokenizer).__name__ if kind is None else f"of the kind {kind}"
        raise SensibertError(f"trim_vocabulary: tokenizer is {came}, want a fast one of {', '.join(KINDS)}")
    return whole


def _table_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> nn.Embedding:
    table = model.get_input_embeddings()
    if model.get_output_embeddings() is not None:
        raise SensibertError(f"trim_vocabulary: {type(model).__name__} has a head over the vocabulary, want another")
    if not isinstance(table, nn.Embedding):
        raise SensibertError(f"trim_vocabulary: the embeddings are {show(table)}, want nn.Embedding")
    if len(tokenizer) > table.num_embeddings:
        raise SensibertError(
            f"trim_vocabulary: tokenizer has {len(tokenizer):,} tokens, want at most {table.num_embeddings:,}, the "
            "rows of the model's embeddings"
        )
    return table


def _used(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> set[int]:
    """The numbers of the pieces that texts are split into."""
    found: set[int] = set()
    texts = iter(texts)
    seen = False
    while some := list(islice(texts, TOGETHER)):
        for text in some:
            if not isinstance(text, str):
                raise SensibertError(f"trim_vocabulary: a text is {show(text)}, want str")
        seen = True
        for ids in tokenizer(some, truncation=False, padding=False, verbose=False)["input_ids"]:
            found.update(ids)
    if not seen:
        raise SensibertError("trim_vocabulary: texts is empty, want at least one")
    return found


def _pieces(content: dict[str, Any]) -> dict[str, int]:
    vocabulary = content["model"]["vocab"]
    if content["model"]["type"] == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return vocabulary


def _kept(content: dict[str, Any], used: set[int]) -> list[int]:
    """Numbers of the pieces that stay, ascending."""
    model, pieces = content["model"], _pieces(content)
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    keep = set(used) | {token["id"] for token in content["added_tokens"]}
    if model.get("unk_id") is not None:
        keep.add(model["unk_id"])
    for piece, number in pieces.items():
        bare = piece.removeprefix(prefix) if prefix and piece.startswith(prefix) else piece
        bare = bare.removesuffix(suffix) if suffix else bare
        byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        if len(bare) <= 1 or byte or piece == model.get("unk_token"):
            keep.add(number)
    if model["type"] == "BPE":  # what a kept piece is merged from
        parents: dict[str, list[tuple[str, str]]] = {}
        for pair in _merges(model):
            parents.setdefault(pair[0] + pair[1].removeprefix(prefix), []).append(pair)
        named = {number: piece for piece, number in pieces.items()}
        waiting = [named[number] for number in keep if number in named]
        while waiting:
            for part in (part for pair in parents.get(waiting.pop(), ()) for part in pair):
                if pieces[part] not in keep:
                    keep.add(pieces[part])
                    waiting.append(part)
    return sorted(keep)


def _merges(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of pieces; older files write them as one text."""
    for merge in model["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _rewritten(
    tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], number: dict[int, int]
) -> PreTrainedTokenizerBase:
    """The tokenizer with the pieces in `number` (old number -> new one) alone."""
    model, pieces = content["model"], _pieces(content)
    if model["type"] == "Unigram":
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in number]
        if model.get("unk_id") is not None:
            model["unk_id"] = number[model["unk_id"]]
    else:
        model["vocab"] = {piece: number[old] for piece, old in pieces.items() if old in number}
    if model["type"] == "BPE":
        prefix, left = model.get("continuing_subword_prefix") or "", model["vocab"]
        model["merges"] = [
            list(pair) for pair in _merges(model) if {*pair, pair[0] + pair[1].removeprefix(prefix)} <= left.keys()
        ]
    content["added_tokens"] = [token | {"id": number[token["id"]]} for token in content["added_tokens"]]
    if content.get("padding"):
        content["padding"]["pad_id"] = number.get(content["padding"]["pad_id"], 0)
    _renumber(content.get("post_processor"), number)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        settings = json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))
        tokens = settings.get("added_tokens_decoder", {})
        if tokens:
            settings["added_tokens_decoder"] = {str(number[int(old)]): token for old, token in tokens.items()}
        for name, text in ((FILE, content), (SETTINGS, settings)):
            (Path(folder) / name).write_text(json.dumps(text, ensure_ascii=False), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _renumber(processor: Any, number: dict[int, int]) -> None:
    """The numbers of special tokens in the post-processor of tokenizer.json, in place."""
    if not isinstance(processor, dict):
        return
    for part in processor.get("processors") or ():
        _renumber(part, number)
    for name in ("sep", "cls"):
        if name in processor:
            token, old = processor[name]
            processor[name] = [token, number[old]]
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [number[old] for old in token["ids"]]
