"""Metrics against numbers worked out by hand."""

import numpy as np
import pytest

from sensibert.data import metrics
from sensibert.data.metrics import (
    answer_f1,
    answer_metrics,
    best_constant_f1,
    classification_metrics,
    embedding_metrics,
    entities,
    multi_label_metrics,
    normalize_answer,
    ranking_metrics,
    regression_metrics,
    tagging_metrics,
    unit,
)


def test_two_classes_give_accuracy_and_the_f1_of_class_one():
    predicted, expected = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    # class 1: 2 hits, 3 predicted, 3 there
    assert classification_metrics(predicted, expected, 2) == pytest.approx(
        {"accuracy": 3 / 5, "f1": 4 / 6, "matthews": 1 / 6}
    )


def test_several_labels_give_the_f1_scores_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    wanted, predicted = rng.random((40, 4)) < [0.5, 0.2, 0.0, 0.1], rng.random((40, 4)) < [0.5, 0.3, 0.1, 0.0]
    actual = multi_label_metrics(predicted, wanted, ["a", "micro", "c", "d"])
    f1 = {kind: sklearn.f1_score(wanted, predicted, average=kind, zero_division=0) for kind in ("micro", "macro", None)}
    each = zip(("f1/a", "f1/micro", "f1/c", "f1/d"), f1[None], strict=True)
    assert actual == pytest.approx({"f1_micro": f1["micro"], "f1_macro": f1["macro"], **dict(each)})
    assert actual["f1/c"] == actual["f1/d"] == 0 and 0 < actual["f1/micro"] < 1
    nothing = np.zeros((3, 2), bool)
    assert multi_label_metrics(nothing, nothing, ["a", "b"]) == {"f1_micro": 0, "f1_macro": 0, "f1/a": 0, "f1/b": 0}


def test_the_best_constant_labels_are_the_most_frequent_ones():
    wanted = np.random.default_rng(1).random((50, 4)) < [0.1, 0.6, 0.3, 0.5]
    sets = [[bool(number >> bit & 1) for bit in range(4)] for number in range(16)]
    scores = [multi_label_metrics(np.array([chosen] * 50), wanted, list("abcd"))["f1_micro"] for chosen in sets]
    assert best_constant_f1(wanted) == pytest.approx(max(scores)) and 0.5 < max(scores) < 1


def test_f1_is_zero_where_class_one_never_hits():
    assert classification_metrics(np.zeros(3, int), np.ones(3, int), 2) == {"accuracy": 0.0, "f1": 0.0, "matthews": 0.0}
    assert classification_metrics(np.zeros(3, int), np.zeros(3, int), 2) == {
        "accuracy": 1.0,
        "f1": 0.0,
        "matthews": 0.0,
    }


def test_three_classes_give_accuracy_alone():
    assert classification_metrics(np.array([0, 1, 2, 2]), np.array([0, 2, 2, 2]), 3) == {"accuracy": 0.75}


def test_correlations():
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 16.0])
    # centred: (-1.5, -.5, .5, 1.5) and (-6.5, -3.5, 1.5, 8.5): 25 / sqrt(5 * 129)
    assert regression_metrics(x, y) == pytest.approx({"pearson": 25 / 645**0.5, "spearman": 1.0})
    assert regression_metrics(x, -y) == pytest.approx({"pearson": -25 / 645**0.5, "spearman": -1.0})


def test_ties_share_their_mean_rank():
    # ranks (1.5, 1.5, 3) and (1, 2, 3): 1.5 / sqrt(1.5 * 2)
    metrics = regression_metrics(np.array([5.0, 5.0, 7.0]), np.array([1.0, 2.0, 3.0]))
    assert metrics["spearman"] == pytest.approx(3**0.5 / 2)


def test_a_constant_side_has_no_correlation():
    assert regression_metrics(np.full(3, 0.1), np.array([1.0, 2.0, 3.0])) == {"pearson": 0.0, "spearman": 0.0}


def test_a_ranking_by_hand():
    """Query a: the relevant row is second. Query b: first, with a gain of 2, then 0 and 1. Query c has none."""
    queries = np.array([*"aabbbc"])
    relevance, scores = np.array([0, 1, 2, 1, 0, 0.0]), np.array([0.9, 0.1, 0.8, -1.0, 0.3, 0.7])
    second, ideal = 1 / np.log2(3), 2 + 1 / np.log2(3)
    expected = {"mrr@10": (1 / 2 + 1) / 2, "ndcg@10": (second + (2 + 1 / np.log2(4)) / ideal) / 2}
    assert ranking_metrics(scores, relevance, queries) == pytest.approx(expected)


def test_only_ten_rows_of_a_ranking_count():
    scores, relevance = -np.arange(11.0), np.eye(11)[10]
    assert ranking_metrics(scores, relevance, np.zeros(11, int)) == {"mrr@10": 0.0, "ndcg@10": 0.0}


def test_equal_scores_rank_the_least_relevant_first():
    assert ranking_metrics(np.zeros(3), np.array([1, 0, 0.0]), np.zeros(3, int))["mrr@10"] == pytest.approx(1 / 3)


def test_queries_without_a_relevant_row_do_not_count():
    assert ranking_metrics(np.ones(2), np.zeros(2), np.zeros(2, int)) == {"mrr@10": 0.0, "ndcg@10": 0.0}


def test_ndcg_is_that_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, relevance = rng.random((5, 20)), rng.integers(0, 4, (5, 20)).astype(float)
    ours = ranking_metrics(scores.ravel(), relevance.ravel(), np.repeat(np.arange(5), 20))
    assert ours["ndcg@10"] == pytest.approx(sklearn.ndcg_score(relevance, scores, k=10))


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The  Cat!", "cat"),
        ("a an the", ""),
        ("theatre, an Arts-house", "theatre artshouse"),
        ("U.S.\tdollar", "us dollar"),
        ("“x”", "“x”"),  # the official script knows ASCII punctuation only
    ],
)
def test_answers_are_normalised_as_the_official_script_does(text, normal):
    assert normalize_answer(text) == normal


def test_answer_f1_counts_repeated_words_once_each():
    assert answer_f1("cat cat dog", "cat bird") == pytest.approx(2 * 1 / (3 + 2))
    assert answer_f1("fish", "cat") == 0.0
    assert (answer_f1("", "cat"), answer_f1("cat", ""), answer_f1("", "the")) == (0.0, 0.0, 1.0)


def test_the_best_of_several_gold_answers_counts():
    metrics = answer_metrics(["the red cat", "", "dog"], [["cat", "red cat."], [], ["a big dog"]])
    assert metrics == pytest.approx({"em": 2 / 3, "f1": (1 + 1 + 2 / 3) / 3})


@pytest.mark.parametrize(
    "tags, spans",
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("I-PER I-PER O I-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),  # an I- that continues nothing begins one
        ("B-PER B-PER I-LOC", [("PER", 0, 0), ("PER", 1, 1), ("LOC", 2, 2)]),
        ("S-PER B-LOC I-LOC E-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 3), ("LOC", 4, 4)]),
        ("O O", []),
        ("", []),
        ("0 1 1 2 0", [("1", 1, 2), ("2", 3, 3)]),
        ("B-X-Y I-X-Y", [("X-Y", 0, 1)]),
    ],
)
def test_entities_are_read_as_conlleval_reads_them(tags, spans):
    assert entities(tags.split()) == spans


def test_tagging_scores_complete_entities_of_the_right_type():
    expected = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    predicted = [["B-PER", "I-PER", "O", "B-ORG"], ["B-LOC", "B-ORG"]]
    # 4 predicted, 3 wanted, 2 correct
    metrics = tagging_metrics(predicted, expected)
    assert metrics == pytest.approx({"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "accuracy": 4 / 6})


def test_the_same_entity_in_two_sentences_counts_twice():
    tags = [["B-PER"], ["B-PER"]]
    assert tagging_metrics([["B-PER"], ["O"]], tags) == {"f1": 2 / 3, "precision": 1.0, "recall": 0.5, "accuracy": 0.5}


def test_no_entities_anywhere_is_zero_not_a_division():
    assert tagging_metrics([["O"]], [["O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}
    assert tagging_metrics([[]], [[]])["accuracy"] == 0.0


def test_tags_in_lower_case_are_the_same_entities():
    tags = ["B-PER", "I-PER", "O", "B-LOC", "O"]
    spans = [(first, last) for _, first, last in entities(tags)]
    assert [(first, last) for _, first, last in entities([tag.lower() for tag in tags])] == spans == [(0, 1), (3, 3)]


def test_neighbours_kept_and_cosine_by_hand(monkeypatch):
    original = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, 0.0]])
    assert embedding_metrics(2 * original, original, 1) == pytest.approx({"recall_at_10": 1.0, "cosine": 1.0})
    moved = original.copy()
    moved[4] = [1, 0.05]  # now nearest to 0 and 1, and they to it
    monkeypatch.setattr(metrics, "BLOCK", 2)
    found = embedding_metrics(moved, original, 1)
    assert found["recall_at_10"] == pytest.approx(2 / 5)
    assert found["cosine"] == pytest.approx((4 - 1 / np.sqrt(1 + 0.05**2)) / 5)
    assert embedding_metrics(moved, original, 10)["recall_at_10"] == 1.0  # all others are among so many


def test_neighbours_are_the_same_in_blocks(monkeypatch):
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(size=(2, 40, 6))
    cosine = [unit(vectors) @ unit(vectors).T - 9 * np.eye(40) for vectors in (ours, theirs)]
    near = [[set(np.argsort(-row)[:10]) for row in similar] for similar in cosine]
    expected = np.mean([len(a & b) / 10 for a, b in zip(*near, strict=True)])
    assert embedding_metrics(ours, theirs)["recall_at_10"] == pytest.approx(expected)
    monkeypatch.setattr(metrics, "BLOCK", 7)
    assert embedding_metrics(ours, theirs)["recall_at_10"] == pytest.approx(expected)
