"""Texts, words and questions to features, and back to the texts."""

import numpy as np
import pytest

from sensibert.core.errors import SensibertError
from sensibert.data.encode import encode_questions, encode_text, encode_words

from .tiny import byte_level, word_piece

TEXTS = ["a film was good", "bad", "", "who wrote the great dull film and not it"]


def test_text_features_are_what_the_tokenizer_gives():
    tokenizer = word_piece()
    features = encode_text([TEXTS], tokenizer, 8)
    assert len(features) == 4 and features.lengths == [6, 3, 2, 8]
    for i, text in enumerate(TEXTS):
        assert features[i] == dict(tokenizer(text, truncation=True, max_length=8))
    assert features[-1] == features[3]
    with pytest.raises(IndexError):
        features[4]


def test_pairs_have_segments_and_the_longer_text_is_cut():
    features = encode_text([["good"], ["the film was not good"]], word_piece(), 7)
    pair = features[0]
    assert pair["token_type_ids"] == [0, 0, 0, 1, 1, 1, 1] and pair["attention_mask"] == [1] * 7


def test_a_tokenizer_without_segments_gives_none():
    assert set(encode_text([["good"]], byte_level(), 16)[0]) == {"input_ids", "attention_mask"}


def test_chunks_do_not_change_the_features(monkeypatch):
    whole = encode_text([TEXTS * 3], word_piece(), 8)
    monkeypatch.setattr("sensibert.data.encode.CHUNK", 5)
    cut = encode_text([TEXTS * 3], word_piece(), 8)
    assert [whole[i] for i in range(12)] == [cut[i] for i in range(12)]


@pytest.mark.parametrize("max_length", [2, 513, 0, -1])
def test_a_length_that_the_tokenizer_does_not_allow_is_named(max_length):
    with pytest.raises(SensibertError, match=f"max_length is {max_length}, want 4 to 512 with this tokenizer"):
        encode_text([["good"]], word_piece(), max_length)


def test_words_and_questions_need_a_fast_tokenizer():
    class Slow:
        is_fast = False

    with pytest.raises(SensibertError, match="token-classification needs a fast tokenizer, Slow is not one"):
        encode_words([["a"]], [[0]], Slow(), 8)
    with pytest.raises(SensibertError, match="question-answering needs a fast tokenizer, Slow is not one"):
        encode_questions(["a"], ["b"], [[]], Slow(), 8, 1)


SENTENCES = [["Anna", "lives", "in", "xyz", "."], [], ["don't", "Acme-Corp"], ["the", "", "film"]]
TAGS = [[1, 0, 0, 2, 0], [], [3, 4], [1, 2, 3]]


@pytest.mark.parametrize("make", [word_piece, byte_level, lambda: byte_level(trim_offsets=False)])
def test_the_first_piece_of_a_word_carries_its_tag(make):
    tokenizer = make()
    features = encode_words(SENTENCES, TAGS, tokenizer, 64)
    for i, (sentence, tags) in enumerate(zip(SENTENCES, TAGS)):
        item = features[i]
        labels = item["labels"]
        assert len(labels) == len(item["input_ids"]) and labels[0] == labels[-1] == -100
        assert [tag for tag in labels if tag != -100] == [t for t, w in zip(tags, sentence) if w]
        assert item["input_ids"] == tokenizer(" ".join(sentence))["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(features[0]["input_ids"])
    firsts = [piece.strip("Ġ") for piece, label in zip(pieces, features[0]["labels"]) if label != -100]
    assert [word[0].lower() for word in SENTENCES[0]] == [piece[0].lower() for piece in firsts]


def test_words_beyond_the_length_are_dropped():
    features = encode_words([["a", "film", "was", "good"]], [[1, 2, 3, 4]], word_piece(), 4)
    assert features[0]["labels"] == [-100, 1, 2, -100]


CONTEXT = "the film was good . anna wrote it in paris , and acme works in rome . who lives in paris ? not anna . " * 3
QUESTIONS = ["who wrote it ?", "who works in rome ?"]


def gold(text: str, nth: int = 0) -> list[tuple[str, int]]:
    start = -1
    for _ in range(nth + 1):
        start = CONTEXT.index(text, start + 1)
    return [(text, start)]


@pytest.mark.parametrize("make", [word_piece, byte_level])
@pytest.mark.parametrize("stride", [6, 10])
def test_every_answer_inside_a_window_maps_back_to_the_exact_text(make, stride):
    answers = [gold("anna", 3), gold("acme works", 1)]
    windows = encode_questions(QUESTIONS, [CONTEXT] * 2, answers, make(), 40, stride)
    calls = set()
    for i, row in enumerate(windows.example):
        item, spans = windows[i], windows.window_spans(i)
        inside = spans[spans[:, 0] >= 0]
        (text, start), first, last = answers[row][0], item["start_positions"], item["end_positions"]
        if inside[0, 0] <= start and start + len(text) <= inside[-1, 1]:
            assert CONTEXT[spans[first, 0] : spans[last, 1]] == text
            assert spans[first, 0] == start
            calls.add(int(row))
        else:
            assert (first, last) == (0, 0)
    assert calls == {0, 1}


def test_windows_cover_the_context_and_share_the_stride():
    windows = encode_questions(QUESTIONS[:1], [CONTEXT], [[]], word_piece(), 40, 6)
    assert len(windows) >= 3 and max(windows.lengths) == 40
    spans = [s[s[:, 0] >= 0] for s in (windows.window_spans(i) for i in range(len(windows)))]
    for left, right in zip(spans, spans[1:]):
        np.testing.assert_array_equal(left[-6:], right[:6])
    assert spans[0][0, 0] == 0 and spans[-1][-1, 1] == len(CONTEXT.rstrip())
    assert CONTEXT[spans[1][0, 0] : spans[1][0, 1]] in CONTEXT


def test_unanswerable_questions_and_empty_contexts_have_the_cls_token():
    windows = encode_questions(["who ?", "who ?"], ["", "anna"], [[], []], word_piece(), 20, 4)
    assert [(w["start_positions"], w["end_positions"]) for w in (windows[0], windows[1])] == [(0, 0), (0, 0)]
    assert windows.example.tolist() == [0, 1]


def test_an_answer_within_a_word_covers_its_whole_pieces():
    windows = encode_questions(["who ?"], ["the film"], [[("il", 5)]], word_piece(), 20, 4)
    spans, item = windows.window_spans(0), windows[0]
    assert "the film"[spans[item["start_positions"], 0] : spans[item["end_positions"], 1]] == "film"


@pytest.mark.parametrize("make", [word_piece, byte_level])
def test_a_long_question_leaves_half_of_the_window_for_the_context(make):
    windows = encode_questions(["  who wrote xyzzyx it 🙂 " * 40], [CONTEXT], [gold("anna", 1)], make(), 40, 8)
    sizes = [(windows.window_spans(i)[:, 0] >= 0).sum() for i in range(len(windows))]
    assert sizes[0] >= 18 and max(windows.lengths) <= 40
    assert any(windows[i]["start_positions"] for i in range(len(windows)))


def test_a_stride_that_leaves_no_step_is_named():
    with pytest.raises(SensibertError, match="doc_stride is 18, want 0 to 17 at max_length 40"):
        encode_questions(QUESTIONS, [CONTEXT] * 2, [[], []], word_piece(), 40, 18)
    with pytest.raises(SensibertError, match="doc_stride is -1, want 0 to 17"):
        encode_questions(QUESTIONS, [CONTEXT] * 2, [[], []], word_piece(), 40, -1)


def test_a_part_shares_the_items_in_a_range():
    features = encode_text([["the film", "bad", "a good film", "great"]], word_piece(), 8)
    features.per_item["labels"] = np.arange(8.0).reshape(4, 2)
    part = features.part(1, 3)
    assert len(part) == 2 and part.lengths == features.lengths[1:3]
    for i in range(2):
        mine, whole = part[i], features[1 + i]
        assert mine.pop("labels").tolist() == whole.pop("labels").tolist() and mine == whole
    assert np.shares_memory(part.per_token["input_ids"], features.per_token["input_ids"])
