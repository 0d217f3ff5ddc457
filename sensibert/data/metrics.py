"""Metrics in numpy, as fractions: accuracy, f1 and em in [0, 1], correlations in [-1, 1]."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

TOP = 10  # rows of a ranking that count
BLOCK = 1024  # rows whose similarities to all others are in memory at a time


def classification_metrics(predicted: np.ndarray, wanted: np.ndarray, num_labels: int) -> dict[str, float]:
    """Class ids [rows] -> accuracy; with two classes also f1 of class 1 (0 without true positives), and matthews, the
    correlation of predicted and wanted classes (0 if either side is constant)."""
    metrics = {"accuracy": float(np.mean(predicted == wanted))}
    if num_labels == 2:
        hits = int(np.sum((predicted == 1) & (wanted == 1)))
        metrics["f1"] = _f1(hits, int(np.sum(predicted == 1)), int(np.sum(wanted == 1)))
        metrics["matthews"] = _pearson(predicted == 1, wanted == 1)
    return metrics


def multi_label_metrics(predicted: np.ndarray, wanted: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """bool [rows, labels] -> f1_micro, f1_macro, and f1/NAME of every label; 0 without true positives.

    micro: of all pairs of row and label; macro: the mean over labels (as in scikit-learn)."""
    counts = [part.sum(0, dtype=np.int64) for part in (predicted & wanted, predicted, wanted)]
    each = [_f1(*map(int, label)) for label in zip(*counts, strict=True)]
    micro = _f1(*(int(count.sum()) for count in counts))
    return {
        "f1_micro": micro,
        "f1_macro": _mean(each),
        **{f"f1/{name}": f1 for name, f1 in zip(names, each, strict=True)},
    }


def best_constant_f1(wanted: np.ndarray) -> float:
    """f1_micro of the labels that are best to predict for every row; wanted: bool [rows, labels]."""
    hits = np.sort(wanted.sum(0))[::-1].cumsum()  # of the most frequent label, of the two most frequent ones, ...
    predicted = len(wanted) * np.arange(1, len(hits) + 1)
    return float((2 * hits / (predicted + wanted.sum())).max())


def regression_metrics(predicted: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Values [rows] -> pearson and spearman (ties have their mean rank); 0 if either side is constant."""
    return {"pearson": _pearson(predicted, wanted), "spearman": _pearson(ranks(predicted), ranks(wanted))}


def ranking_metrics(scores: np.ndarray, relevance: np.ndarray, queries: np.ndarray) -> dict[str, float]:
    """Scores, relevance (0: none) and query ids [rows] -> mrr@10 and ndcg@10, means over the queries that have a
    relevant row; 0 without any. Rows with equal scores are ranked with the least relevant first."""
    reciprocal, gains = [], []
    for query in np.unique(queries[relevance > 0]):
        ours = np.flatnonzero(queries == query)
        ranked = relevance[ours][np.lexsort((relevance[ours], -scores[ours]))]
        hits = np.flatnonzero(ranked[:TOP] > 0)
        reciprocal.append(1 / (hits[0] + 1) if len(hits) else 0.0)
        gains.append(_dcg(ranked) / _dcg(np.sort(ranked)[::-1]))
    return {f"mrr@{TOP}": _mean(reciprocal), f"ndcg@{TOP}": _mean(gains)}


def embedding_metrics(embeddings: np.ndarray, original: np.ndarray, neighbours: int = 10) -> dict[str, float]:
    """Embeddings [rows, H] of two models -> recall_at_10, the share of the original's nearest neighbours by cosine that
    are among the nearest here, and cosine, the mean cosine of the two."""
    ours, theirs = unit(embeddings), unit(original)
    k, hits = min(neighbours, len(ours) - 1), 0
    for begin in range(0, len(ours), BLOCK):
        near = [_nearest(vectors, begin, k) for vectors in (ours, theirs)]
        hits += int((near[0][:, :, None] == near[1][:, None]).sum())
    return {"recall_at_10": hits / (k * len(ours)), "cosine": float((ours * theirs).sum(1).mean())}


def _nearest(vectors: np.ndarray, begin: int, k: int) -> np.ndarray:
    """The k nearest other rows of each row of a block, in no order."""
    similar = vectors[begin : begin + BLOCK] @ vectors.T
    similar[np.arange(len(similar)), np.arange(begin, begin + len(similar))] = -np.inf
    return np.argpartition(-similar, k - 1, axis=1)[:, :k]


def unit(vectors: np.ndarray) -> np.ndarray:
    """The rows [rows, H] with length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def answer_metrics(predicted: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Answers and the correct ones of every question -> em and f1 of SQuAD: the best over the correct answers.

    Without correct answers, '' is correct."""
    em, f1 = [], []
    for text, golds in zip(predicted, wanted):
        golds = golds or [""]
        em.append(max(normalize_answer(text) == normalize_answer(gold) for gold in golds))
        f1.append(max(answer_f1(text, gold) for gold in golds))
    return {"em": float(np.mean(em)), "f1": float(np.mean(f1))}


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: as in the SQuAD evaluation script."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_f1(text: str, gold: str) -> float:
    """F1 over the multisets of normalized words. If a side has no words: 1 if both have none, else 0 (SQuAD 2.0)."""
    words, gold_words = normalize_answer(text).split(), normalize_answer(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    return _f1(sum((Counter(words) & Counter(gold_words)).values()), len(words), len(gold_words))


def tagging_metrics(predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Tags of every sentence -> f1, precision and recall of entities, as in conlleval and seqeval, and accuracy of
    tags."""
    hits = num_predicted = num_wanted = 0
    for tags, gold_tags in zip(predicted, wanted):
        ours, gold = set(entities(tags)), set(entities(gold_tags))
        hits, num_predicted, num_wanted = hits + len(ours & gold), num_predicted + len(ours), num_wanted + len(gold)
    pairs = [tag == gold for tags, gold_tags in zip(predicted, wanted) for tag, gold in zip(tags, gold_tags)]
    return {
        "f1": _f1(hits, num_predicted, num_wanted),
        "precision": hits / num_predicted if num_predicted else 0.0,
        "recall": hits / num_wanted if num_wanted else 0.0,
        "accuracy": float(np.mean(pairs)) if pairs else 0.0,
    }


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """[(type, first word, last word)] of BIO or IOBES tags, as in conlleval: an I- after no entity begins one.

    'O', 'o' and '0' are outside. A tag without prefix is its own type, and equal neighbours are one entity."""
    result, start = [], 0
    last_prefix, last_type = "O", ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, kind = ("O", "") if tag in ("O", "o", "0") else _split_tag(tag)
        begins = prefix in "BSO" or last_prefix in "OES" or kind != last_type
        if last_prefix != "O" and begins:
            result.append((last_type, start, i - 1))
        if prefix != "O" and begins:
            start = i
        last_prefix, last_type = prefix, kind
    return result


def _split_tag(tag: str) -> tuple[str, str]:
    return (tag[0].upper(), tag[2:]) if re.match(r"[BIES]-", tag, re.IGNORECASE) else ("I", tag)


def _dcg(relevance: np.ndarray) -> float:
    first = relevance[:TOP]
    return float((first / np.log2(np.arange(len(first)) + 2)).sum())


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _f1(hits: int, num_predicted: int, num_wanted: int) -> float:
    return 2 * hits / (num_predicted + num_wanted) if hits else 0.0


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm > 0 else 0.0


def ranks(x: np.ndarray) -> np.ndarray:
    """From 1; ties have their mean rank."""
    _, inverse, counts = np.unique(np.asarray(x), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
