"""Checked texts -> features without padding, held flat, and the collator that pads a batch."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import numpy as np
from torch.utils.data import Dataset

from ..core.errors import SensibertError

CHUNK = 2048  # rows a tokenizer call: bounds the memory its encodings take
IGNORED = -100  # the label that cross entropy skips


class Features(Dataset):
    """One dict of lists an item: input_ids, attention_mask, token_type_ids where the tokenizer gives them, labels.

    per_token: {name: [T]} over all T tokens, cut into items by lengths [F]. per_item: {name: [F]}. The order of items
    is that of the rows. One flat array a field is a tenth of the memory of a list of Python integers an item."""

    def __init__(self, per_token: dict[str, np.ndarray], per_item: dict[str, np.ndarray], lengths: np.ndarray):
        self.per_token, self.per_item = per_token, per_item
        self.ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    @property
    def lengths(self) -> list[int]:
        """Tokens of every item, for grouping by length."""
        return np.diff(self.ends).tolist()

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]  # negative indices and IndexError, as a list has them
        here = slice(self.ends[i], self.ends[i + 1])
        item = {name: values[here].tolist() for name, values in self.per_token.items()}
        item["attention_mask"] = [1] * len(item["input_ids"])
        return item | {name: values[i].item() for name, values in self.per_item.items()}


class Windows(Features):
    """Features of questions: several windows a context.

    example [F]: the row of a window. spans [T, 2]: the characters of the context that a token covers, -1 outside it.
    contexts, golds: of every row the text, and its right answers as (text, first character)."""

    def __init__(self, features: Features, example: np.ndarray, spans: np.ndarray, contexts: list, golds: list):
        super().__init__(features.per_token, features.per_item, np.diff(features.ends))
        self.example, self.spans, self.contexts, self.golds = example, spans, contexts, golds

    def window_spans(self, i: int) -> np.ndarray:
        """[S, 2] of window i."""
        return self.spans[self.ends[i] : self.ends[i + 1]]


def encode_text(columns: list[list[str]], tokenizer, max_length: int) -> Features:
    """One or two columns of texts, cut to max_length tokens, the longer text of a pair first."""
    room(tokenizer, max_length, pair=len(columns) == 2)
    return _features(tokenizer, max_length, _chunks(columns), truncation=True)


def encode_words(sentences: list[list[str]], tags: list[list[int]], tokenizer, max_length: int) -> Features:
    """Labels per token: a word's tag on its first piece, -100 elsewhere. Words beyond max_length fall away.

    Words are joined by spaces and found again by their characters: every tokenizer then sees them as in running text,
    also those (RoBERTa) that keep the space as part of the word."""
    _want_fast(tokenizer, "token-classification")
    room(tokenizer, max_length, pair=False)
    labels: list[np.ndarray] = []

    def align(encoding, offset: int) -> None:
        for row, piece in enumerate(encoding.encodings, offset):
            starts = np.cumsum([0, *(len(word) + 1 for word in sentences[row])])
            begin, end = np.array(piece.offsets, np.int64).reshape(-1, 2).T
            inside = (end > begin) & (np.array(piece.special_tokens_mask) == 0)
            # the last character tells the word: some tokenizers count the space before a word to its first piece
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
    tokenizer,
    max_length: int,
    doc_stride: int,
) -> Windows:
    """Overlapping windows over every context; doc_stride is the number of tokens that neighbours share.

    start_positions, end_positions: the first answer where the whole of it is inside the window, else the first token
    (CLS). A question is cut where it would leave the context less than half of a window."""
    _want_fast(tokenizer, "question-answering")
    half = room(tokenizer, max_length, pair=True) // 2
    if not 0 <= doc_stride < half:
        raise SensibertError(f"doc_stride is {doc_stride}, want 0 to {half - 1} at max_length {max_length}")
    questions = _cut([question.strip() for question in questions], tokenizer, half)
    example, spans = [], []

    def locate(encoding, offset: int) -> None:
        example.extend(offset + row for row in encoding["overflow_to_sample_mapping"])
        for piece in encoding.encodings:
            inside = np.array([s == 1 for s in piece.sequence_ids])
            spans.append(np.where(inside[:, None], np.array(piece.offsets, np.int32).reshape(-1, 2), -1))

    options = {"truncation": "only_second", "stride": doc_stride, "return_overflowing_tokens": True}
    features = _features(tokenizer, max_length, _chunks([questions, contexts]), locate, **options)
    ends = np.array([_answer_tokens(window, answers[row]) for row, window in zip(example, spans)], np.int64)
    features.per_item = {"start_positions": ends[:, 0], "end_positions": ends[:, 1]}
    return Windows(features, np.array(example), np.concatenate(spans), contexts, answers)


def _answer_tokens(spans: np.ndarray, answers: list[tuple[str, int]]) -> tuple[int, int]:
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


def _cut(questions: list[str], tokenizer, limit: int) -> list[str]:
    """Each question, or as much of its beginning as makes at most limit tokens."""
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    cut = []
    for text, offsets in zip(questions, tokenizer(questions, **options)["offset_mapping"]):
        while len(offsets) > limit:  # a second round where the shortened text has other pieces
            text = text[: min(offsets[limit - 1][1], len(text) - 1)]
            offsets = tokenizer(text, **options)["offset_mapping"]
        cut.append(text)
    return cut


def room(tokenizer, max_length: int, pair: bool) -> int:
    """Tokens that max_length leaves for text. SensibertError if none, or more than the model can take."""
    special = tokenizer.num_special_tokens_to_add(pair)
    if not special + 1 < max_length <= tokenizer.model_max_length:
        limit = min(tokenizer.model_max_length, 10**6)  # 'no limit' is 1e30
        raise SensibertError(f"max_length is {max_length}, want {special + 2} to {limit} with this tokenizer")
    return max_length - special


def _want_fast(tokenizer, task: str) -> None:
    if not tokenizer.is_fast:
        raise SensibertError(f"{task} needs a fast tokenizer, {type(tokenizer).__name__} is not one")


def _chunks(columns: list[list]) -> Iterable[tuple[int, list[list]]]:
    return ((i, [column[i : i + CHUNK] for column in columns]) for i in range(0, len(columns[0]), CHUNK))


def _features(tokenizer, max_length: int, chunks, visit=None, **options) -> Features:
    """Tokenise chunk by chunk; visit(encoding, first row) sees every chunk before it is dropped."""
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


def _flat(rows: list[list[int]], dtype) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype, count=sum(map(len, rows)))
