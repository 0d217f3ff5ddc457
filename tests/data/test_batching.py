"""Batches are padded no more than needed; micro-batches hold random rows, each once."""

import numpy as np
import pytest
import torch

from sensibert.data.batching import Collator, micro_batches
from sensibert.data.encode import encode_text, encode_words

from .tiny import word_piece

SENTENCES = [["anna", "lives", "in", "paris", "."], [], ["the", "dull", "film"]]
TAGS = [[1, 0, 0, 2, 0], [], [1, 2, 3]]


def test_a_batch_is_padded_to_its_longest_item_labels_included():
    features = encode_words(SENTENCES, TAGS, word_piece(), 64)
    items = [features[0], features[1]]
    batch = Collator(pad_token_id=9)(items)
    longest = features.lengths[0]
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(items[0], (2, longest))
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"][1].tolist() == items[1]["input_ids"] + [9] * (longest - 2)
    assert batch["labels"][1].tolist() == [-100] * longest
    assert batch["attention_mask"][1].tolist() == [1, 1] + [0] * (longest - 2)
    assert batch["token_type_ids"].sum() == 0


@pytest.mark.parametrize(
    "multiple, limit, width", [(8, None, 8), (6, None, 6), (5, None, 10), (None, 8, 6), (8, 8, 8), (8, 7, 7), (8, 5, 6)]
)
def test_a_batch_is_padded_to_a_multiple_but_not_beyond_the_limit(multiple, limit, width):
    features = encode_text([["a film was good"]], word_piece(), 8)
    assert Collator(0, multiple, limit)([features[0]])["input_ids"].shape == (1, width)


def test_a_batch_padded_further_is_the_one_padded_at_once():
    features = encode_words(SENTENCES, TAGS, word_piece(), 64)
    items = [features[0] | {"weight": 0.5}, features[1] | {"weight": 1.5}]
    collator, at_once = Collator(9, max_length=64), Collator(9, pad_to_multiple_of=8, max_length=64)
    later = collator.extended(collator(items), 8)
    assert later["input_ids"].shape[1] % 8 == 0 and later.keys() == items[0].keys()
    for name, value in at_once(items).items():
        torch.testing.assert_close(later[name], value, rtol=0, atol=0)
    assert Collator(9, max_length=features.lengths[0]).extended(collator(items), 8)["labels"].shape[1] == max(
        features.lengths[:2]
    )


def test_a_batch_without_padding_has_no_mask_until_it_is_padded():
    features = encode_text([["good film", "dull film", "film"]], word_piece(), 8)
    collator = Collator(0, max_length=8)
    even = collator([features[0], features[1]])
    assert set(even) == set(features[0]) - {"attention_mask"}
    assert set(collator([features[0], features[2]])) == set(features[0])
    longer = collator.extended(even, 8)
    assert longer["attention_mask"].tolist() == [[1] * 4 + [0] * 4] * 2 and longer["input_ids"].shape == (2, 8)
    assert collator.extended(even, 4).keys() == even.keys()


def test_labels_keep_their_type():
    features = encode_text([["bad", "good"]], word_piece(), 8)
    features.per_item["labels"] = np.array([0.5, 2.0], np.float32)
    batch = Collator(0)([features[0], features[1]])
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [0.5, 2.0]
    features.per_item["labels"] = np.array([1, 0])
    assert Collator(0)([features[0], features[1]])["labels"].dtype == torch.int64


def test_labels_may_be_vectors():
    features = encode_text([["bad", "good film"]], word_piece(), 8)
    features.per_item["labels"] = np.arange(12, dtype=np.float32).reshape(2, 6)
    batch = Collator(0)([features[1], features[0]])
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [[6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5]]
    longer = Collator(0).extended(batch, 8)
    assert longer["input_ids"].shape == (2, 8) and torch.equal(longer["labels"], batch["labels"])


def test_micro_batches_hold_random_rows_once_each_by_falling_length():
    features = encode_text([[" ".join(["film"] * length) for length in (1, 5, 3, 2, 4, 6, 7)]], word_piece(), 16)
    batches = list(micro_batches(features, Collator(0), samples=5, size=2, seed=0))
    lengths = [int(row.sum()) for batch in batches for row in batch["input_ids"] != 0]
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) == 5
    assert [batch["input_ids"].shape[1] for batch in batches] == lengths[::2], "padded to the longest of the batch"
    again = list(micro_batches(features, Collator(0), samples=5, size=2, seed=0))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    picks = {
        tuple(len(item["input_ids"]) for item in batch)
        for seed in range(9)
        for batch in micro_batches(features, list, samples=2, size=2, seed=seed)
    }
    assert len(picks) > 1, "another seed draws other rows"
    assert sum(len(batch) for batch in micro_batches(features, list, samples=100, size=4, seed=0)) == 7


def test_micro_batches_of_texts_are_sorted_by_characters_and_not_mixed_over_columns():
    texts = [{"a": "x" * n, "b": "y"} for n in (1, 5, 3)]
    rows = [*texts, {"a": "x", "score": 1.0}, {"a": "xx", "score": 1.0}]
    batches = list(micro_batches(rows, list, 5, 2, 0))
    assert [[len(row["a"]) for row in batch] for batch in batches] == [[5, 3], [1], [2, 1]]
    assert all(len({tuple(row) for row in batch}) == 1 for batch in batches)


def test_several_labels_of_an_item_are_not_padded():
    items = [{"input_ids": [1, 2, 3], "labels": [0.5]}, {"input_ids": [1], "labels": [1.0]}]
    assert Collator(0)(items)["labels"].tolist() == [[0.5], [1.0]]
