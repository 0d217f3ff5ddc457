"""The kept units of a trimmed model, and how MPNet's shared positions follow the kept heads."""

import pytest
import torch
from torch import nn

from sensibert.core.errors import SensibertError
from sensibert.models import sites
from sensibert.models.structure import PickHeads, is_trimmed, read_structure, save_structure, structure_of
from tests.helpers import tiny_model


def test_a_model_that_was_never_trimmed_has_all_its_units():
    model = tiny_model()
    structure = structure_of(model)
    assert not is_trimmed(model)
    assert {name: kept.tolist() for name, kept in structure.items()} == {
        s.name: [*range(s.units)] for s in sites(model)
    }


def test_the_structure_is_handed_out_as_a_copy():
    model = tiny_model()
    structure = {"layer.0.head": torch.tensor([1, 3])}
    model.base_model.sensibert_structure = dict(structure)
    structure["layer.0.head"] = structure_of(model)["layer.0.ffn"] = torch.tensor([0])
    assert is_trimmed(model) and structure_of(model).keys() == {"layer.0.head"}
    assert structure_of(model)["layer.0.head"].tolist() == [1, 3]


def test_the_structure_survives_a_file(tmp_path):
    model = tiny_model()
    expected = {"layer.0.head": torch.tensor([1, 3]), "layer.0.ffn": torch.tensor([], dtype=torch.int64)}
    model.base_model.sensibert_structure = dict(expected)
    save_structure(model, tmp_path / "file")
    actual = read_structure(tmp_path / "file")
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-1])
    with pytest.raises(SensibertError, match="file: not a readable structure file"):
        read_structure(tmp_path / "file")


class Attention(nn.Module):
    def forward(self, hidden, attention_mask=None, position_bias=None):
        return position_bias


@pytest.mark.parametrize("call", [lambda m, b: m(0, None, b), lambda m, b: m(0, position_bias=b)])
def test_only_the_kept_heads_go_in_and_a_second_cut_narrows(call):
    attention, bias = Attention(), torch.randn(2, 5, 3, 3)
    undo_all = PickHeads.attach(attention, torch.tensor([0, 2, 4]))
    assert torch.equal(call(attention, bias), bias[:, [0, 2, 4]])
    undo_second = PickHeads.attach(attention, torch.tensor([1, 2]))
    assert torch.equal(call(attention, bias), bias[:, [2, 4]])
    undo_second()
    assert torch.equal(call(attention, bias), bias[:, [0, 2, 4]])
    undo_all()
    assert torch.equal(call(attention, bias), bias)


def test_without_a_position_bias_the_hook_changes_nothing():
    attention = Attention()
    PickHeads.attach(attention, torch.tensor([0]))
    assert attention(0) is None and attention(0, None, None) is None and attention(0, position_bias=None) is None
