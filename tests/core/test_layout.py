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
    assert Member("dense", 1).index(torch.tensor([0, 3]), units=4).tolist() == [0, 3]


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


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["sites"][0].update(kind="layer"), "Site: layer.0.head is no axis of a layer"),
        (lambda d: d["sites"][0].update(minimum=5), "Site: layer.0.head is no axis of a layer"),
        (lambda d: d["sites"][0]["consumer"].update(span=9), "Site: layer.0.head is no axis of a layer"),
        (lambda d: d["sites"][0].update(name=3), "Site: name is 3, want text"),
        (lambda d: d["sites"][1]["flops"].update(pair=-1), "Flops: pair is -1, want 0 to"),
        (lambda d: d["sites"][1]["members"][0].update(dim="0"), "Member: dim is '0', want a whole number"),
        (lambda d: d["encoder_rest"].update(token=10**15), "Flops: token is 1000000000000000, want 0 to"),
        (lambda d: d["weights"][0].update(rows=-1), "Weight: rows is -1, want 0 to"),
        (lambda d: d["weights"].append(d["weights"][0]), "Layout: a site or weight is listed twice"),
        (lambda d: d.update(encoder_params=9001), "have 4,390 parameters, the encoder 9,001 and the model 9,000"),
        (lambda d: d.update(encoder_params=4389), "have 4,390 parameters, the encoder 4,389 and the model 9,000"),
    ],
)
def test_a_layout_that_no_model_has_is_refused(change, message):
    data = json.loads(json.dumps(dataclasses.asdict(layout())))
    change(data)
    with pytest.raises(SensibertError, match=message):
        layout_from(data)


def test_the_bounds_of_a_layout_are_allowed():
    data = json.loads(json.dumps(dataclasses.asdict(layout())))
    data["sites"][0]["minimum"] = data["sites"][0]["units"]
    data |= {"encoder_params": 4390, "total_params": 4390}
    data["encoder_rest"]["token"] = 10**15 - 1
    assert layout_from(data).encoder_params == 4390
