"""Packed batches: their content, and the totals that they are rounded up to."""

from itertools import combinations

import numpy as np
import pytest
import torch

from sensibert.data.batching import Collator
from sensibert.data.encode import Features
from sensibert.data.packing import BATCHES, ROUND, Packer, choose_totals


def features(lengths, seed=0, **per_item) -> Features:
    rng, count = np.random.default_rng(seed), sum(lengths)
    per_token = {"input_ids": rng.integers(5, 64, count).astype(np.int32)}
    per_token["token_type_ids"] = rng.integers(0, 2, count).astype(np.uint8)
    return Features(per_token, {k: np.array(v) for k, v in per_item.items()}, np.array(lengths))


def padding(totals, drawn) -> int:
    return sum(next(total for total in totals if total >= n) - n for n in drawn)


def test_totals_are_those_with_the_least_padding():
    lengths = np.random.default_rng(1).integers(5, 30, 200).tolist()
    drawn = np.random.default_rng(0).choice(np.array(lengths), (BATCHES, 8)).sum(1)
    sizes = sorted({int(n + -n % ROUND) for n in drawn})
    assert len(sizes) > 4
    for number in (1, 2, 3):
        best = min(padding((*some, sizes[-1]), drawn) for some in combinations(sizes[:-1], number - 1))
        totals = choose_totals(lengths, 8, number)
        assert len(totals) == number and totals == sorted(totals)
        assert padding(totals, drawn) == best


@pytest.mark.parametrize("mean", [13, 53, 175])
def test_few_totals_leave_little_padding(mean):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(mean), 0.5, 5000), 4, 384).astype(int).tolist()
    packer, order = Packer(features(lengths), 32, {}), rng.permutation(5000)
    batches = [packer(order[i : i + 32])[0]["input_ids"].numel() for i in range(0, 4992, 32)]
    assert sum(lengths) / sum(batches) >= 0.93
    assert len(packer.totals) <= 6 and len(set(batches) - set(packer.totals)) <= 2  # larger batches are rare


def test_a_batch_holds_its_rows_the_longest_first():
    data = features([3, 7, 2, 5], labels=[0, 1, 2, 3])
    batch, lengths = Packer(data, 3, {"input_ids": 9})([2, 1, 3])
    assert lengths == [7, 5, 2] and batch["labels"].tolist() == [1, 3, 2]
    rows = [data[1], data[3], data[2]]
    assert batch["input_ids"].shape == (1, 16)
    assert batch["input_ids"][0].tolist() == [*rows[0]["input_ids"], *rows[1]["input_ids"], *rows[2]["input_ids"], 9, 9]
    assert batch["position_ids"][0].tolist() == [*range(7), *range(5), 0, 1, 0, 0]
    assert batch["token_type_ids"][0, :7].tolist() == rows[0]["token_type_ids"]


def test_labels_of_tokens_and_numbers_and_answers():
    data = features([2, 3], start_positions=[1, 0], end_positions=[1, 2])
    data.per_token["labels"] = np.array([0, 1, 1, -100, 0])
    batch, _ = Packer(data, 2, Collator(0).padding)([0, 1])
    assert batch["labels"][0, :5].tolist() == [1, -100, 0, 0, 1] and set(batch["labels"][0, 5:].tolist()) == {-100}
    assert batch["start_positions"].tolist() == [0, 1]
    numbers, _ = Packer(features([2, 3], labels=[0.5, 1.5]), 2, {})([0, 1])
    assert numbers["labels"].dtype == torch.float32 and numbers["labels"].tolist() == [1.5, 0.5]


def test_vectors_of_rows_keep_their_order():
    data = features([2, 3])
    data.per_item["labels"] = np.array([[1, 2], [3, 4]], np.float32)
    batch, lengths = Packer(data, 2, {})([0, 1])
    assert lengths == [3, 2] and batch["labels"].tolist() == [[3, 4], [1, 2]]


def test_a_batch_beyond_the_largest_total_is_rounded_up_alone():
    packer = Packer(features([4] * 50 + [400]), 4, {})
    assert packer.total(packer.totals[-1] + 1) == packer.totals[-1] + ROUND


def test_other_data_has_no_packed_batches():
    assert Collator(0).packer([{"input_ids": [1]}], 4) is None
