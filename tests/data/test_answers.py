"""Logits of windows -> the best span over all windows, and none that cannot be an answer."""

import numpy as np
import pytest

from sensibert.data.answers import best_answers
from sensibert.data.encode import encode_questions
from sensibert.data.metrics import answer_metrics

from .tiny import byte_level, word_piece

CONTEXTS = ["the film was good . anna wrote it in paris , and acme works in rome . " * 3, "who lives in Rome ?", ""]
QUESTIONS = ["who wrote it ?", "where ?", "who ?"]


def windows_of(answers, make=word_piece):
    return encode_questions(QUESTIONS, CONTEXTS, answers, make(), 40, 8)


def logits_of(windows, *peaks) -> tuple[np.ndarray, np.ndarray]:
    """Zeros [F, S], padded with -100 as the Trainer does, but for peaks (window, first, last, height)."""
    longest = max(windows.lengths)
    logits = np.zeros((2, len(windows), longest), np.float32)
    for i, length in enumerate(windows.lengths):
        logits[:, i, length:] = -100
    for i, first, last, height in peaks:
        logits[0, i, first] = logits[1, i, last] = height
    return logits[0], logits[1]


@pytest.mark.parametrize("make", [word_piece, byte_level])
def test_gold_spans_as_predictions_are_exactly_right(make):
    golds = [[("in paris", CONTEXTS[0].rindex("in paris"))], [("Rome", 13)], []]
    windows = windows_of(golds, make)
    ends = zip(windows.per_item["start_positions"], windows.per_item["end_positions"])
    peaks = [(i, first, last, 5.0) for i, (first, last) in enumerate(ends)]
    best = best_answers(*logits_of(windows, *peaks), windows, null_answers=True)
    texts = [answers[0].text for answers in best]
    assert texts == ["in paris", "Rome", ""]
    assert answer_metrics(texts, [[text for text, _ in gold] for gold in golds]) == {"em": 1.0, "f1": 1.0}


def test_the_best_window_wins_and_the_text_keeps_its_case():
    windows = windows_of([[], [], []])
    of_first = np.flatnonzero(windows.example == 0)
    begin = int(np.flatnonzero(windows.window_spans(0)[:, 0] >= 0)[0])
    peaks = [(of_first[0], begin, begin + 1, 2.0), (of_first[1], begin + 2, begin + 4, 3.0)]
    best = best_answers(*logits_of(windows, *peaks), windows)[0]
    assert best[0].score == 6.0 and best[0].start == windows.window_spans(of_first[1])[begin + 2, 0]
    assert best[0].text == CONTEXTS[0][best[0].start : best[0].end]
    assert next(answer.score for answer in best if answer.text == "the film") == 4.0
    assert len(best) == 20 and [a.score for a in best] == sorted((a.score for a in best), reverse=True)
    assert len({(a.start, a.end) for a in best}) == 20


def test_a_span_never_ends_before_it_begins_nor_in_the_question_nor_runs_too_long():
    windows = windows_of([[], [], []])
    i = int(np.flatnonzero(windows.example == 1)[0])
    inside = np.flatnonzero(windows.window_spans(i)[:, 0] >= 0)
    start, end = logits_of(windows)
    start[i, inside[3]] = end[i, inside[1]] = 9.0  # backwards
    start[i, 1] = end[i, 2] = 50.0  # in the question
    assert best_answers(start, end, windows)[1][0].score == 9.0
    start[i, inside[0]] = end[i, inside[3]] = 9.0
    assert best_answers(start, end, windows, max_answer_tokens=4)[1][0].score == 18.0
    start[i, inside[3]] = end[i, inside[1]] = 0.0
    assert best_answers(start, end, windows, max_answer_tokens=3)[1][0].score == 9.0


def test_a_context_without_tokens_has_no_answer():
    windows = windows_of([[], [], []])
    assert best_answers(*logits_of(windows), windows)[2] == []
    null = best_answers(*logits_of(windows), windows, null_answers=True)[2]
    assert [(a.text, a.start) for a in null] == [("", -1)]


def test_no_answer_is_scored_by_its_weakest_window():
    windows = windows_of([[], [], []])
    peaks = [(i, 0, 0, height) for i, height in zip(np.flatnonzero(windows.example == 0), (4.0, 1.5, 3.0, 3.0))]
    best = best_answers(*logits_of(windows, *peaks), windows, null_answers=True)[0][0]
    assert (best.text, best.score, best.start, best.end) == ("", 3.0, -1, -1)
