"""Texts, words and questions -> token features without padding, each field in one flat array."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from ..core.arguments import show
from ..core.errors import SensibertError

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import BatchEncoding, PreTrainedTokenizerBase

CHUNK = 2048  # rows per tokenizer call, which bounds the memory of its encodings
IGNORED = -100  # the label that cross entropy ignores


class Features(Dataset):
    """Items as dicts: input_ids, attention_mask, token_type_ids if the tokenizer has them, and labels.

    per_token: name -> [all tokens], split into items by lengths [items]. per_item: name -> [items], or vectors
    [items, H]. Items are in the order of the rows. Flat arrays need a tenth of the memory of a list of Python integers
    per item."""

    def __init__(self, per_token: dict[str, np.ndarray], per_item: dict[str, np.ndarray], lengths: np.ndarray) -> None:
        self.per_token, self.per_item = per_token, per_item
        self.ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of every item, for grouping by length."""
        return np.diff(self.ends).tolist()

    def digest(self) -> str:
        """SHA-256 of all items, as hexadecimal digits."""
        digest = hashlib.sha256()
        for name, values in sorted({**self.per_token, **self.per_item, "ends": self.ends}.items()):
            digest.update(f"{name} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = range(len(self))[i]  # negative indices and IndexError, as in a list
        tokens = slice(self.ends[i], self.ends[i + 1])
        item = {name: values[tokens].tolist() for name, values in self.per_token.items()}
        item["attention_mask"] = [1] * len(item["input_ids"])
        return item | {name: v[i].tolist() if v.ndim == 1 else v[i] for name, v in self.per_item.items()}

    def part(self, begin: int, end: int) -> Features:
        """Items begin to end, which share the memory of these."""
        tokens, ends = slice(self.ends[begin], self.ends[end]), self.ends[begin : end + 1]
        per_token = {name: values[tokens] for name, values in self.per_token.items()}
        return Features(per_token, {name: values[begin:end] for name, values in self.per_item.items()}, np.diff(ends))


class Windows(Features):
    """Features of questions, with one or more windows per context.

    example [windows]: the row of every window. spans [all tokens, 2]: the characters of the context that a token
    covers, -1 outside the context. contexts [rows]: the texts. golds [rows]: the correct answers of every row, each as
    (text, first character)."""

    def __init__(
        self,
        features: Features,
        example: np.ndarray,
        spans: np.ndarray,
        contexts: list[str],
        golds: list[list[tuple[str, int]]],
    ) -> None:
        super().__init__(features.per_token, features.per_item, np.diff(features.ends))
        self.example, self.spans, self.contexts, self.golds = example, spans, contexts, golds

    def window_spans(self, i: int) -> np.ndarray:
        """`spans` of window i: [tokens, 2]."""
        return self.spans[self.ends[i] : self.ends[i + 1]]


def encode_text(columns: list[list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Features:
    """One or two columns of texts, truncated to max_length tokens; of a pair the longer text is truncated first.

    SensibertError if max_length is too small, or more than the tokenizer allows."""
    text_tokens(tokenizer, max_length, pair=len(columns) == 2)
    return _features(tokenizer, max_length, _chunks(columns), truncation=True)


def encode_words(
    sentences: list[list[str]], tags: list[list[int]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Features:
    """Words with one tag each -> labels per token: the tag on the first piece of a word, -100 on all other tokens.

    Words beyond max_length are dropped. The tokenizer gets the words joined by spaces, and its pieces are assigned to
    words by their characters, so the text is the same as running text also for tokenizers that treat the space as part
    of a word (RoBERTa). SensibertError for a slow tokenizer or an impossible max_length."""
    _want_fast(tokenizer, "token-classification")
    text_tokens(tokenizer, max_length, pair=False)
    labels: list[np.ndarray] = []

    def align(encoding: BatchEncoding, offset: int) -> None:
        for row, piece in enumerate(encoding.encodings or (), offset):
            starts = np.cumsum([0, *(len(word) + 1 for word in sentences[row])])
            begin, end = np.array(piece.offsets, np.int64).reshape(-1, 2).T
            inside = (end > begin) & (np.array(piece.special_tokens_mask) == 0)
            # by the last character: for some tokenizers the first piece begins with the space before the word
            word = np.where(inside, np.searchsorted(starts, end - 1, side="right") - 1, -1)
            _, firsts = np.unique(word, return_index=True)
            firsts = firsts[inside[firsts]]
            label = np.full(len(word), IGNORED, np.int64)
            label[firsts] = np.array(tags[row], np.int64)[word[firsts]]
            labels.append(label)

    features = _features(
        tokenizer, max_length, _chunks([[" ".join(words) for words in sentences]]), align, truncation=True
    )
    features.per_token["labels"] = np.concatenate(labels)
    return features


def encode_questions(
    questions: list[str],
    contexts: list[str],
    answers: list[list[tuple[str, int]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    doc_stride: int,
) -> Windows:
    """Overlapping windows of max_length tokens over every context; neighbours share doc_stride tokens.

    answers: per row the correct ones as (text, first character). start_positions and end_positions are those of the
    first answer if the window contains all of it, else 0 (the CLS token). A question is truncated if it would leave
    less than half of a window for the context. SensibertError for a slow tokenizer, or an impossible max_length or
    doc_stride."""
    _want_fast(tokenizer, "question-answering")
    half = text_tokens(tokenizer, max_length, pair=True) // 2
    if not 0 <= doc_stride < half:
        raise SensibertError(f"doc_stride is {doc_stride}, want 0 to {half - 1} at max_length {max_length}")
    questions = _cut([question.strip() for question in questions], tokenizer, half)
    example: list[int] = []
    spans: list[np.ndarray] = []

    def locate(encoding: BatchEncoding, offset: int) -> None:
        example.extend(offset + row for row in encoding["overflow_to_sample_mapping"])
        for piece in encoding.encodings or ():
            inside = np.array([s == 1 for s in piece.sequence_ids])
            spans.append(np.where(inside[:, None], np.array(piece.offsets, np.int32).reshape(-1, 2), -1))

    options = {"truncation": "only_second", "stride": doc_stride, "return_overflowing_tokens": True}
    features = _features(tokenizer, max_length, _chunks([questions, contexts]), locate, **options)
    ends = np.array([_answer_tokens(window, answers[row]) for row, window in zip(example, spans)], np.int64)
    features.per_item = {"start_positions": ends[:, 0], "end_positions": ends[:, 1]}
    return Windows(features, np.array(example), np.concatenate(spans), contexts, answers)


def _answer_tokens(spans: np.ndarray, answers: list[tuple[str, int]]) -> tuple[int, int]:
    """First and last token of the first answer in a window; (0, 0) if the window does not contain all of it."""
    inside = np.flatnonzero(spans[:, 0] >= 0)
    if not answers or len(inside) == 0:
        return 0, 0
    text, start = answers[0]
    window = spans[inside]
    if window[0, 0] > start or window[-1, 1] < start + len(text):
        return 0, 0
    first = int(np.searchsorted(window[:, 0], start, side="right")) - 1
    last = int(np.searchsorted(window[:, 1], start + len(text), side="left"))
    return int(inside[first]), int(inside[last])


def _cut(questions: list[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[str]:
    """The questions, truncated to at most `limit` tokens."""
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    cut = []
    for text, offsets in zip(questions, tokenizer(questions, **options)["offset_mapping"]):
        while len(offsets) > limit:  # again if the shorter text is split into other pieces
            text = text[: min(offsets[limit - 1][1], len(text) - 1)]
            offsets = tokenizer(text, **options)["offset_mapping"]
        cut.append(text)
    return cut


def most_tokens(tokenizer: PreTrainedTokenizerBase) -> float:
    """The largest number of tokens that the tokenizer allows; SensibertError if its files have none."""
    allowed: object = tokenizer.model_max_length
    if isinstance(allowed, bool) or not isinstance(allowed, int | float):
        raise SensibertError(f"the tokenizer has model_max_length {show(allowed)}, want a number")
    return allowed


def text_tokens(tokenizer: PreTrainedTokenizerBase, max_length: int, pair: bool) -> int:
    """Tokens of max_length that are not special; SensibertError if none are left or the tokenizer allows fewer."""
    special = tokenizer.num_special_tokens_to_add(pair)
    allowed = most_tokens(tokenizer)
    if not special + 1 < max_length <= allowed:
        limit = min(allowed, 10**6)  # 'no limit' is 1e30
        raise SensibertError(f"max_length is {max_length}, want {special + 2} to {limit} with this tokenizer")
    return max_length - special


def _want_fast(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    if not tokenizer.is_fast:
        raise SensibertError(f"{task} needs a fast tokenizer, {type(tokenizer).__name__} is not one")


def _chunks(columns: list[list]) -> Iterable[tuple[int, list[list]]]:
    """(first row, columns) of every CHUNK rows."""
    return ((i, [column[i : i + CHUNK] for column in columns]) for i in range(0, len(columns[0]), CHUNK))


def _features(
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chunks: Iterable[tuple[int, list[list]]],
    visit: Callable[[BatchEncoding, int], None] | None = None,
    **options: Any,
) -> Features:
    """Tokenize chunk by chunk and call visit(encoding, first row) for each."""
    fields: dict[str, list[np.ndarray]] = {}
    lengths: list[int] = []
    for offset, columns in chunks:
        encoding = tokenizer(*columns, max_length=max_length, padding=False, return_attention_mask=False, **options)
        lengths.extend(map(len, encoding["input_ids"]))
        for name, dtype in (("input_ids", np.int32), ("token_type_ids", np.uint8)):
            if name in encoding:
                fields.setdefault(name, []).append(_flat(encoding[name], dtype))
        if visit is not None:
            visit(encoding, offset)
    return Features({name: np.concatenate(parts) for name, parts in fields.items()}, {}, np.array(lengths))


def _flat(rows: list[list[int]], dtype: type[np.generic]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype, count=sum(map(len, rows)))
