"""Start and end logits of windows -> answer texts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .encode import Windows


class Answer(NamedTuple):
    text: str
    score: float  # start logit + end logit
    start: int  # characters of the context
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
    """Logits [F, S] -> for every context up to n_best answers, best first.

    A span begins and ends inside the context of one window and has at most max_answer_tokens; among all windows of a
    context the highest start + end logit wins, ties go to the earlier one. null_answers: the CLS span of the
    window where it is weakest competes as the text '' (SQuAD 2.0)."""
    found: list[list[Answer]] = [[] for _ in windows.contexts]
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
            found[row].append(Answer(windows.contexts[row][begin:stop], score, begin, stop))
    if null_answers:
        for row, score in enumerate(null_score):
            found[row].append(Answer("", score, NO_ANSWER, NO_ANSWER))
    return [_distinct(sorted(answers, key=lambda a: -a.score), n_best) for answers in found]


def _top(logits: np.ndarray, n: int) -> np.ndarray:
    return np.argsort(-logits, kind="stable")[:n]


def _distinct(answers: list[Answer], n: int) -> list[Answer]:
    """The first of each span: overlapping windows find the same one more than once."""
    first: dict[tuple[int, int], Answer] = {}
    for answer in answers:
        first.setdefault((answer.start, answer.end), answer)
    return list(first.values())[:n]
