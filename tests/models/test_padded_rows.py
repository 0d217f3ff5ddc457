"""Padded batches that run packed: outputs, losses and gradients are those of the padded rows."""

import pytest
import torch
from torch.nn.functional import pad

from sensibert.core.errors import SensibertError
from sensibert.models import layout_of
from sensibert.models.packed import pooling_of
from sensibert.models.padded_rows import PaddedRows
from sensibert.sensitivity import collect_factors, sampled_loss
from sensibert.sensitivity.gradients import model_loss
from tests.helpers import tiny_model
from tests.models.test_families import make
from tests.models.test_packed import CASES, HEADS, UNABLE, batches

ORDER = [2, 0, 3, 1]  # of the rows, not that of their lengths


def shuffled(model) -> dict[str, torch.Tensor]:
    """Padded rows of different length, with more padding than the longest needs (of which ModernBERT makes NaN)."""
    batch = {name: value[ORDER] for name, value in batches(model)[1].items()}
    more = 0 if "modernbert" in model.config.model_type else 3
    return {
        name: pad(value, (0, more), value=-100 if name == "labels" else 0) if value.dim() == 2 else value
        for name, value in batch.items()
    }


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family, overrides", CASES)
def test_outputs_loss_and_gradients_are_those_of_the_padded_rows(family, overrides, head):
    if head == "QuestionAnswering" and family in ("nomic_bert", "gte", "eurobert"):
        pytest.skip("transformers has no such head")
    model = make(family, head, **overrides).double().requires_grad_(True).eval()
    rows, batch = PaddedRows(model), shuffled(model)
    expected, actual = model(**batch), rows(**batch)
    packs = family not in UNABLE and not (
        family == "eurobert" and head == HEADS[0] and "classifier_pooling" not in overrides
    )
    assert rows.lengths == ([7, 6, 5, 4] if packs else None)
    real = batch["attention_mask"] != 0
    assert set(actual) == set(expected)
    for name in set(actual) - {"loss"}:
        ours, theirs = actual[name], expected[name]
        assert ours.shape == theirs.shape
        per_token = ours.shape[:2] == real.shape
        assert torch.allclose(ours[real] if per_token else ours, theirs[real] if per_token else theirs, atol=1e-6)
    losses = [model_loss(outputs, batch) for outputs in (actual, expected)]
    assert torch.allclose(*losses, atol=1e-6)
    of = next(p for name, p in model.named_parameters() if name.endswith("weight") and "embed" not in name)
    ours, theirs = (torch.autograd.grad(loss, of)[0] for loss in losses)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_one_row_with_as_many_classes_as_tokens():
    model = tiny_model(num_labels=7).double().eval()
    batch = {"input_ids": torch.arange(5, 12)[None]}
    rows = PaddedRows(model)
    assert torch.allclose(rows(**batch).logits, model(**batch).logits)
    assert rows.lengths == [7]


@pytest.mark.parametrize("change", ["left", "hole", "empty row", "position_ids", "hidden states"])
def test_other_batches_run_as_they_are(change):
    model = tiny_model(output_hidden_states=change == "hidden states").double().eval()
    batch = {name: value for name, value in shuffled(model).items() if name in ("input_ids", "attention_mask")}
    if change == "left":
        batch = {name: value.flip(1) for name, value in batch.items()}
    elif change == "hole":
        batch["attention_mask"][1, 2] = 0
    elif change == "empty row":
        batch["attention_mask"][1] = 0
    elif change == "position_ids":
        batch["position_ids"] = torch.arange(10).flip(0).expand(4, -1)
    rows = PaddedRows(model)
    assert torch.equal(rows(**batch).logits, model(**batch).logits)
    assert rows.lengths is None


def test_a_model_that_a_trainer_runs_in_bf16_is_packed():
    """Rounding makes its logits differ by more than those of fp32 may."""
    refused = 0
    for seed in range(8):
        model = tiny_model(seed=seed, num_hidden_layers=4).eval()
        forward = model.forward
        model.forward = torch.autocast("cpu", torch.bfloat16)(forward)  # as accelerate does
        try:
            pooling_of(model)
        except SensibertError:
            refused += 1
        rows = PaddedRows(model, bf16=True)
        rows(**{name: value for name, value in shuffled(model).items() if name != "token_type_ids"})
        assert rows.lengths == [7, 6, 5, 4]
    assert refused


@pytest.mark.parametrize("head", HEADS)
def test_factors_in_bf16_are_those_of_padded_rows_to_within_its_rounding(head, monkeypatch):
    model = make("bert", head).requires_grad_(True)
    layout, data = layout_of(model), [shuffled(model)]
    exact = collect_factors(model, layout, data, sampled_loss)
    packed = collect_factors(model, layout, data, sampled_loss, autocast=torch.bfloat16)
    monkeypatch.setattr("sensibert.models.padded_rows.pooling_of", refuse)
    padded = collect_factors(model, layout, data, sampled_loss, autocast=torch.bfloat16)
    for name in exact:
        for part in ("weight", "second", "output", "slope", "gates"):
            want, *others = (getattr(of[name], part).flatten() for of in (exact, packed, padded))
            ours, theirs = (float((other - want).norm() / want.norm()) for other in others)
            assert ours < 2 * theirs + 1e-2 < 0.2, (name, part)


def refuse(model, bf16):
    raise SensibertError("cannot pack")
