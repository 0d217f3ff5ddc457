"""A cut that would change what the model computes is noticed, and the model is put back as it was."""

import copy
from dataclasses import replace

import pytest
import torch

from sensibert.core.errors import SensibertError
from sensibert.models import families, layout_of
from sensibert.nn import MaskedLinear
from sensibert.trimming.self_check import check_same, probe
from sensibert.trimming.trim import trim
from tests.helpers import tiny_batch, tiny_model
from tests.plans import outputs, random_plan
from tests.trimming.test_trim import DEBERTA, assert_untouched, facts, masked_by, step


def bare(family: str, **changes):
    """The table of a family without the attributes that its code reads."""
    table = families()[family]
    return replace(table, head=replace(table.head, counts=(), widths=()), **changes)


@pytest.mark.parametrize(
    "family, overrides, table, message",
    [
        ("deberta-v2", DEBERTA, lambda: bare("deberta-v2"), r"masked and trimmed deberta-v2 differ by \d"),
        ("rembert", {"embedding_size": 16}, lambda: bare("rembert"), "the trimmed rembert does not run"),
        ("mpnet", {}, lambda: bare("mpnet"), "the trimmed mpnet does not run"),
        ("mpnet", {}, lambda: replace(families()["mpnet"], position_bias=""), "the trimmed mpnet does not run"),
        (
            "modernbert",
            {},
            lambda: replace(families()["modernbert"], ffn=replace(families()["modernbert"].ffn, consumes="attn.Wo")),
            "mlp.Wi has 128 outputs, want 2 x 32 units of 1",
        ),
    ],
    ids=["deberta-v2 silently", "rembert", "mpnet", "mpnet positions", "modernbert"],
)
def test_a_wrong_table_is_caught_and_the_model_left_as_it_was(family, overrides, table, message, monkeypatch):
    model, batch = tiny_model(family, **overrides), tiny_batch()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    model.eval()
    plan = random_plan(layout_of(model))
    assert 0 < int(plan.keep["layer.0.head"].sum()) < 4
    before, expected = facts(model), outputs(model, batch)
    monkeypatch.setitem(families(), family, table())
    with pytest.raises(SensibertError, match=message) as caught:
        trim(model, plan, optimizer)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert_untouched(model, before)
    assert torch.equal(outputs(model, batch), expected)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    trim(model, plan, optimizer)


def test_a_masked_model_whose_cut_fails_is_still_masked(monkeypatch):
    model, batch = tiny_model("deberta-v2", **DEBERTA), tiny_batch()
    plan = random_plan(layout_of(model))
    masked_by(model, plan)
    masks = {name: layer.keep.clone() for name, layer in model.named_modules() if isinstance(layer, MaskedLinear)}
    before, expected = copy.deepcopy(model.state_dict()), outputs(model, batch)
    monkeypatch.setitem(families(), "deberta-v2", bare("deberta-v2"))
    with pytest.raises(SensibertError, match="masked and trimmed deberta-v2 differ"):
        trim(model, plan)
    actual = {name: layer.keep for name, layer in model.named_modules() if isinstance(layer, MaskedLinear)}
    assert masks and actual.keys() == masks.keys() and all(torch.equal(actual[name], masks[name]) for name in masks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(outputs(model, batch), expected)


def test_deberta_without_its_attributes_would_run_and_be_wrong(monkeypatch):
    """Why the check is there: nothing else would notice."""
    model, batch = tiny_model("deberta-v2", **DEBERTA), tiny_batch()
    plan = random_plan(layout_of(model))
    right = outputs(trim(model, plan, copy_model=True), batch)
    monkeypatch.setitem(families(), "deberta-v2", bare("deberta-v2"))
    wrong = outputs(trim(model, plan, copy_model=True, check=False), batch)
    assert wrong.isfinite().all() and not torch.allclose(wrong, right)


def test_weights_that_are_not_numbers_are_named():
    model = tiny_model()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias[3] = float("nan")
    with pytest.raises(SensibertError, match="hidden states are NaN or inf"):
        trim(model, random_plan(layout_of(model)))


def test_modes_and_random_state_are_as_they_were():
    model = tiny_model(hidden_dropout_prob=0.5).train()
    model.bert.embeddings.eval()  # frozen on purpose
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    trim(model, random_plan(layout_of(model)))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "dtype, matmul, passes, fails",
    [
        (torch.float64, "highest", 5e-7, 2e-6),
        (torch.float32, "highest", 1e-5, 4e-5),
        (torch.float32, "high", 2e-3, 1e-2),
        (torch.bfloat16, "highest", 2e-2, 1e-1),
        (torch.float16, "high", 2e-2, 1e-1),
    ],
)
def test_only_rounding_of_the_precision_in_use_is_allowed(dtype, matmul, passes, fails):
    model = tiny_model().to(dtype)
    expected, before = probe(model), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        check_same(model, expected * (1 + passes))
        with pytest.raises(SensibertError, match=r"masked and trimmed bert differ by .* \(relative\), want rounding"):
            check_same(model, expected * (1 + fails))
        with pytest.raises(SensibertError, match="differ by nan"):
            check_same(model, expected * torch.nan)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_base_model_that_returns_something_else_first_is_named(monkeypatch):
    model = tiny_model()
    for output, came in (((None,), "NoneType"), (torch.zeros(2, 5), r"\[2, 5\]")):
        monkeypatch.setattr(model.bert, "forward", lambda output=output, **inputs: output)
        with pytest.raises(
            SensibertError, match=rf"a BertModel, returns {came} first, want hidden states \[2, 12, ..."
        ):
            probe(model)
