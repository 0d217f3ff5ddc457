"""Packed batches of every family and task: loss and every gradient are those of the padded batch."""

import pytest
import torch
import torch.nn.functional as F

from sensibert.core.errors import SensibertError
from sensibert.models import layout_of
from sensibert.models.packed import PackedModel, pooling_of
from sensibert.nn.packed_attention import Packing
from sensibert.trimming.trim import trim
from tests.helpers import tiny_model
from tests.models.test_families import FAMILIES, OTHERS, ROTARY, make
from tests.plans import random_plan

LENGTHS, TOTAL = [7, 6, 5, 4], 24  # none so short that ModernBERT's padding sees nothing, which is NaN
UNABLE = ("mpnet", "deberta-v2", "rembert", "megatron-bert")  # attention of their own
CASES = [pytest.param(family, {}, id=family) for family in FAMILIES] + OTHERS
HEADS = ["SequenceClassification", "TokenClassification", "QuestionAnswering"]


def batches(model) -> tuple[dict, dict]:
    """The same rows, packed and padded, with labels for the model's head."""
    generator = torch.Generator().manual_seed(0)
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(5, 64, real.shape, generator=generator) * real
    padded = {"input_ids": ids, "attention_mask": real.long()}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        padded["token_type_ids"] = torch.randint(0, 2, real.shape, generator=generator) * real
    head = type(model).__name__
    if head.endswith("TokenClassification"):
        padded["labels"] = torch.randint(0, 2, real.shape, generator=generator).masked_fill(~real, -100)
    elif head.endswith("QuestionAnswering"):
        padded |= {"start_positions": torch.tensor([1, 0, 2, 0]), "end_positions": torch.tensor([6, 0, 4, 1])}
    else:
        padded["labels"] = torch.tensor([0, 1, 1, 0])
    packed = {"position_ids": F.pad(torch.cat([torch.arange(n) for n in LENGTHS]), (0, TOTAL - sum(LENGTHS)))[None]}
    for name, value in padded.items():
        if value.dim() == 2 and name != "attention_mask":
            fill = -100 if name == "labels" else 0
            value = F.pad(value[real], (0, TOTAL - sum(LENGTHS)), value=fill)[None]
        packed[name] = value
    del packed["attention_mask"]
    return packed, padded


def padded_loss(model, batch):
    """The model's loss; of answers, with a softmax over the tokens of the row alone."""
    if "start_positions" not in batch:
        return model(**batch).loss
    outputs = model(**{name: value for name, value in batch.items() if not name.endswith("positions")})
    losses = []
    for end in ("start", "end"):
        logits = outputs[f"{end}_logits"].masked_fill(batch["attention_mask"] == 0, -torch.inf)
        losses.append(F.cross_entropy(logits, batch[f"{end}_positions"]))
    return sum(losses) / 2


def assert_equal_passes(model) -> None:
    packed, padded = batches(model)
    losses = [
        PackedModel(model, pooling_of(model))(packed, Packing.of(LENGTHS, TOTAL))["loss"],
        padded_loss(model, padded),
    ]
    assert torch.allclose(*losses, atol=1e-12)
    weights = list(model.parameters())
    ours, theirs = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in losses)
    largest = max(float(g.abs().max()) for g in theirs if g is not None and g.numel())
    exact = model.config.model_type.removeprefix("sensibert_") not in ROTARY  # which compute angles in fp32
    for (name, p), mine, other in zip(model.named_parameters(), ours, theirs, strict=True):
        mine, other = (torch.zeros_like(p) if g is None else g for g in (mine, other))
        assert torch.allclose(mine, other, atol=(1e-10 if exact else 1e-6) * largest), name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family, overrides", CASES)
def test_loss_and_gradients_are_those_of_the_padded_batch(family, overrides, head):
    if head == "QuestionAnswering" and family in ("nomic_bert", "gte", "eurobert"):
        pytest.skip("transformers has no such head")
    model = make(family, head, **overrides).double().requires_grad_(True)
    if family in UNABLE or (family == "eurobert" and head == HEADS[0] and "classifier_pooling" not in overrides):
        with pytest.raises(SensibertError, match=rf"packing: {type(model).__name__} cannot run on packed rows"):
            pooling_of(model)
        return
    assert_equal_passes(model)
    trim(model, random_plan(layout_of(model), empty=("layer.0.head", "layer.1.ffn")))
    assert_equal_passes(model)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_modernbert_pools_both_ways(pooling):
    assert_equal_passes(tiny_model("modernbert", classifier_pooling=pooling).double())


def test_attention_and_modules_are_as_they_were_afterwards():
    model = tiny_model(attn_implementation="sdpa").train()
    packed, padded = batches(model)
    model.eval()
    before, training = model(**padded).logits, model.bert.pooler.training
    PackedModel(model, "first")(packed, Packing.of(LENGTHS, TOTAL))
    pooling_of(model)
    assert model.config._attn_implementation == "sdpa" and model.bert.pooler.training == training
    assert not model.bert.encoder._forward_hooks and not model.bert.embeddings._forward_hooks
    assert torch.equal(model(**padded).logits, before)


def test_a_head_that_says_the_same_of_every_row_does_not_tell_what_it_reads():
    model = tiny_model()
    torch.nn.init.zeros_(model.classifier.weight)
    with pytest.raises(SensibertError, match="its logits are the same for all rows"):
        pooling_of(model)


def test_a_model_that_does_not_hand_on_how_rows_are_packed_is_refused():
    model = tiny_model()
    attention = model.bert.encoder.layer[0].attention
    plain = attention.forward
    attention.forward = lambda *args, packing=None, **kwargs: plain(*args, **kwargs)
    with pytest.raises(SensibertError, match="BertSelfAttention does not hand on how the batch is packed"):
        pooling_of(model)
