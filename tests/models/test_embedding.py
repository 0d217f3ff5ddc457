import pytest
import torch
import torch.nn.functional as F

from sensibert.data.encode import Features
from sensibert.data.packing import Packer
from sensibert.models import base_of, layout_of
from sensibert.models.embedding import EmbeddingModel, matching_loss
from sensibert.models.packed import PackedModel, pooling_of
from sensibert.models.pooling import POOLINGS, Pooling
from sensibert.nn.packed_attention import Packing
from sensibert.trimming import trim
from tests.helpers import tiny_batch, tiny_model
from tests.plans import random_plan


def test_the_loss_is_one_minus_the_cosine_of_vectors_of_length_one():
    ours, theirs = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    expected = 1 - F.cosine_similarity(ours, theirs).mean()
    assert float(matching_loss(ours, theirs)) == pytest.approx(float(expected), abs=1e-6)
    assert float(matching_loss(3 * ours, 3 * theirs)) == pytest.approx(float(expected), abs=1e-6)
    assert float(matching_loss(2 * theirs, theirs)) == pytest.approx(
        0.5
    )  # a length that is not the original's costs too


def test_outputs_are_embeddings_with_a_loss_where_there_is_a_target():
    encoder, batch = tiny_model(head=""), tiny_batch()
    model = EmbeddingModel(encoder, Pooling("mean", normalize=True))
    outputs = model(**batch)
    mask = batch["attention_mask"][:, :, None]
    hidden = encoder(**batch).last_hidden_state
    assert torch.allclose(outputs["logits"], F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    assert set(outputs) == {"logits"}
    assert model(labels=outputs["logits"], **batch)["loss"].item() < 1e-6


def test_the_encoder_is_trimmed_through_it_and_keeps_a_config_of_its_own():
    model = EmbeddingModel(tiny_model(head=""), Pooling())
    assert base_of(model) is model.base_model
    before = layout_of(model.base_model).encoder_params
    trim(model, random_plan(layout_of(model)))
    assert layout_of(model.base_model).encoder_params == layout_of(model).encoder_params < before
    assert model.config is model.base_model.config and model.config.model_type == "sensibert_bert"


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_packed_embeddings_and_gradients_are_those_of_the_padded_batch(family, mode):
    lengths = [7, 6, 5, 4]
    model = EmbeddingModel(tiny_model(family, head=""), Pooling(mode, normalize=True)).double()
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 64, real.shape) * real
    target = torch.randn(len(lengths), 32).double()
    features = Features({"input_ids": ids[real].numpy()}, {"labels": target.numpy()}, torch.tensor(lengths).numpy())
    batch, sorted_lengths = Packer(features, 4, {"labels": -100})([3, 0, 2, 1])
    packing = Packing.of(sorted_lengths, batch["input_ids"].numel())
    assert batch["input_ids"].numel() > sum(lengths)  # there is padding, which must not count
    losses = [
        PackedModel(model, pooling_of(model))(batch, packing)["loss"],
        model(labels=target, input_ids=ids, attention_mask=real.long())["loss"],
    ]
    assert torch.allclose(*losses)
    weight = model.get_input_embeddings().weight
    ours, theirs = (torch.autograd.grad(loss, weight)[0] for loss in losses)
    assert torch.allclose(ours, theirs, atol=1e-6 * float(theirs.abs().max()))
    assert theirs.abs().max() > 0
