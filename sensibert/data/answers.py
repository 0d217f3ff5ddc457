"""Start and end logits of windows -> answer texts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .encode import Windows


class Answer(NamedTuple):
    """A span of the context: characters start to end (exclusive), or NO_ANSWER for both."""

    text: str
    score: float  # start logit + end logit
    start: int
    end: int


NO_ANSWER = -1  # start and end of the null answer


def best_answers(
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    windows: Windows,
    n_best: int = 20,
    max_answer_tokens: int = 30,
    null_answers: bool = False,
) -> list[list[Answer]]:
    """Start and end logits [windows, tokens] -> for every context up to n_best answers, the best first.

    A span lies inside the context of one window and has at most max_answer_tokens. The spans of all windows of a
    context are ordered by start + end logit, ties by window. null_answers: the text '' is a candidate too; its score is
    the lowest of the first tokens (CLS) of all windows, as in SQuAD 2.0."""
    candidates: list[list[Answer]] = [[] for _ in windows.contexts]
    null_score = [np.inf] * len(windows.contexts)
    for i, row in enumerate(windows.example):
        spans = windows.window_spans(i)
        null_score[row] = min(null_score[row], float(start_logits[i, 0]) + float(end_logits[i, 0]))
        inside = np.flatnonzero(spans[:, 0] >= 0)
        if len(inside) == 0:
            continue
        first, last = _top(start_logits[i, inside], n_best), _top(end_logits[i, inside], n_best)
        gap = last[None, :] - first[:, None]
        a, b = np.nonzero((gap >= 0) & (gap < max_answer_tokens))
        for start, end in zip(inside[first[a]], inside[last[b]]):
            score = float(start_logits[i, start]) + float(end_logits[i, end])
            begin, stop = int(spans[start, 0]), int(spans[end, 1])
            candidates[row].append(Answer(windows.contexts[row][begin:stop], score, begin, stop))
    if null_answers:
        for row, score in enumerate(null_score):
            candidates[row].append(Answer("", score, NO_ANSWER, NO_ANSWER))
    return [_distinct(sorted(answers, key=lambda a: -a.score), n_best) for answers in candidates]


def _top(logits: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n largest logits, ties by index."""
    return np.argsort(-logits, kind="stable")[:n]


def _distinct(answers: list[Answer], n: int) -> list[Answer]:
    """The first n answers with different spans; overlapping windows give some spans more than once."""
    first: dict[tuple[int, int], Answer] = {}
    for answer in answers:
        first.setdefault((answer.start, answer.end), answer)
    return list(first.values())[:n]
