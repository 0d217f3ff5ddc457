"""The transformers model inside a SentenceTransformer or CrossEncoder, and what it reads of a batch."""

import pytest
import torch
from torch import nn

from sensibert import SensibertError, layout_of
from sensibert.models.wrapped import inner_batches, inner_model
from tests.helpers import tiny_batch, tiny_model


class Wrapped(nn.Sequential):
    """What this package relies on, without the library."""

    @property
    def transformers_model(self):
        return self[0]

    def preprocess(self, pairs, prompt=None, task=None):
        ids = torch.tensor([[len(a), len(b)] for a, b in pairs])
        return {"input_ids": ids, "prompt": prompt, "modality": "text"}


def batches(batch):
    return list(inner_batches(Wrapped(tiny_model()), [batch]))


def test_any_other_model_is_its_own_and_its_batches_are_unchanged():
    model, batch = tiny_model(), tiny_batch()
    assert inner_model(model) is model and list(inner_batches(model, [batch])) == [batch]
    assert inner_model(Wrapped(model)) is model


def test_every_column_is_an_input_without_what_the_model_does_not_take():
    ids = [torch.full((2, 3), number) for number in range(2)]
    batch = {"a_input_ids": ids[0], "a_attention_mask": ids[0], "a_modality": "text", "a_b_input_ids": ids[1]}
    batch |= {"a_b_special_tokens_mask": ids[1], "label": torch.ones(2), "dataset_name": "x"}
    first, second = batches(batch)
    assert first.keys() == {"input_ids", "attention_mask"} and first["input_ids"] is ids[0]
    assert second.keys() == {"input_ids"} and second["input_ids"] is ids[1]


def test_pairs_are_those_of_the_first_column_with_each_other_one():
    batch = {"query": ["a", "bb"], "good": ["c" * 3, "c" * 4], "bad": [["c" * 5, "c" * 6], ["c" * 7]]}
    found = batches(batch | {"label": torch.ones(2), "prompt": "p", "task": "t"})
    assert [each["input_ids"].tolist() for each in found] == [[[1, 3], [2, 4]], [[1, 5], [1, 6]], [[2, 7]]]


@pytest.mark.parametrize(
    "batch, message",
    [
        ({"pixel_values": torch.ones(2, 3)}, "Wrapped gets pixel_values, want columns of texts"),
        ({"query": ["a"], "label": torch.ones(1)}, "want columns of texts"),
        ({"a_input_ids": torch.ones(1, 9), "a_cu_seq_lens_q": torch.ones(3)}, "want unpad_inputs=False"),
    ],
)
def test_a_batch_that_cannot_be_read_is_refused(batch, message):
    with pytest.raises(SensibertError, match=message):
        batches(batch)


def test_a_model_without_one_encoder_is_refused():
    with pytest.raises(SensibertError, match=r"holds no transformers model \(its modules are Linear\)"):
        inner_model(Wrapped(nn.Linear(2, 2)))
    with pytest.raises(SensibertError, match="holds several transformers models, want one with a single encoder"):
        inner_model(Wrapped(tiny_model(), tiny_model()))


def test_a_verb_that_wants_the_model_inside_says_where_it_is():
    with pytest.raises(SensibertError, match=r"is a Wrapped, want the model inside it \(model.transformers_model\)"):
        layout_of(Wrapped(tiny_model()))
