"""Members, sites and FLOPs of a layout, by hand."""

import dataclasses
import json

import pytest
import torch

from sensibert.core.errors import SensibertError
from sensibert.core.layout import Flops, Member, layout_from

from .small import layout


def test_a_unit_of_a_fused_matrix_owns_a_band_in_every_section():
    member = Member("qkv", 0, span=2, parts=3)  # 4 heads of 2 rows, in q, k and v
    assert member.index(torch.tensor([0, 3]), units=4).tolist() == [0, 1, 6, 7, 8, 9, 14, 15, 16, 17, 22, 23]
    assert member.index(torch.tensor([], dtype=torch.int64), units=4).tolist() == []


def test_flops_add_up_and_grow_with_batch_and_length():
    one = Flops(token=2, pair=3, sequence=5, forward=7)
    assert one.at(1, 1) == 17
    assert one.at(4, 10) == 4 * (2 * 10 + 3 * 100 + 5) + 7
    assert (one + one) == one * 2
    assert (one * 3).at(4, 10) == 3 * one.at(4, 10)


def test_a_site_is_found_by_name():
    assert layout().site("layer.0.ffn").units == 6
    with pytest.raises(SensibertError, match="site is 'layer.9.ffn', want one of layer.0.head"):
        layout().site("layer.9.ffn")


def test_a_layout_survives_json():
    assert layout_from(json.loads(json.dumps(dataclasses.asdict(layout())))) == layout()
