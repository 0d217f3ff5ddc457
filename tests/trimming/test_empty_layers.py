"""A layer that lost all heads or all FFN neurons: its linear layers are gone, for quantizers and exporters too."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import quantize_dynamic

import sensibert
from sensibert.core.errors import SensibertError
from sensibert.models import layout_of
from sensibert.models.modeling_sensibert import EmptyLinear
from sensibert.models.modules import is_linear
from sensibert.models.structure import structure_of
from sensibert.saving.folder import export, load
from sensibert.trimming.trim import restructure, trim
from tests.helpers import tiny_batch, tiny_model
from tests.models.test_reloadable import CASES
from tests.plans import outputs, random_plan
from tests.trimming.test_trim import assert_untouched, facts, step

EMPTY = [
    pytest.param(("layer.0.head", "layer.1.head"), id="heads"),
    pytest.param(("layer.0.ffn", "layer.1.ffn"), id="ffn"),
    pytest.param(("layer.0.head", "layer.0.ffn"), id="both"),
]


def whole(family: str = "bert", **overrides) -> nn.Module:
    try:
        model = tiny_model(family, attn_implementation=None, **overrides)
    except ValueError:
        pytest.skip(f"this transformers has no {family}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def emptied(family: str = "bert", empty: tuple[str, ...] = ("layer.0.head", "layer.1.ffn"), **overrides) -> nn.Module:
    model = whole(family, **overrides)
    return trim(model, random_plan(layout_of(model), empty=empty))


def empty_layers(model: nn.Module) -> list[nn.Module]:
    """Every linear layer without inputs or outputs; none of them may be an nn.Linear."""
    empty = [module for module in model.modules() if is_linear(module) and not module.weight.numel()]
    assert not any(isinstance(module, nn.Linear) for module in empty)
    return empty


def with_linears(model: nn.Module) -> nn.Module:
    """As trimmed by an earlier version, with nn.Linear for the empty layers."""
    older = copy.deepcopy(model)
    for module in empty_layers(older):
        module.__class__ = nn.Linear
    return older


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("family, overrides", CASES)
def test_int8_is_finite_repeatable_and_close(family, overrides, empty, poisoned_empty):
    model, batch = emptied(family, empty, **overrides), tiny_batch()
    assert {site.name for site in layout_of(model).sites if not site.units} or not empty_layers(model)
    expected = outputs(model, batch)
    quantized = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    first = outputs(quantized, batch)
    assert torch.equal(outputs(quantized, batch), first)
    assert float((first - expected).abs().max()) < 0.05 * float(expected.abs().max().clamp_min(0.1))


@pytest.mark.parametrize("family, overrides", CASES)
def test_function_state_dict_and_costs_are_those_of_empty_linear_layers(family, overrides):
    model, batch = emptied(family, **overrides), tiny_batch()
    older = with_linears(model)
    assert torch.equal(outputs(model, batch), outputs(older, batch))
    assert layout_of(model) == layout_of(older)
    assert {n: p.shape for n, p in model.state_dict().items()} == {n: p.shape for n, p in older.state_dict().items()}


@pytest.mark.parametrize("family, overrides", CASES)
def test_it_is_trained_trimmed_again_restructured_and_reloaded(family, overrides, tmp_path):
    model = emptied(family, **overrides).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    assert [name for name, p in model.named_parameters() if p.grad is None] == []  # DDP waits for each of them
    trim(model, random_plan(layout_of(model), seed=3, share=0.8), optimizer)
    step(model, optimizer)
    again = restructure(whole(family, **overrides), structure_of(model))
    again.load_state_dict(model.state_dict())
    torch.optim.AdamW(again.parameters(), lr=1e-3).load_state_dict(optimizer.state_dict())
    export(model, tmp_path / "m", layout="both")
    for other in (again, load(tmp_path / "m")[0]):
        assert len(empty_layers(other)) == len(empty_layers(model))
        assert torch.equal(outputs(other.eval(), tiny_batch()), outputs(model.eval(), tiny_batch()))


@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet"])
def test_a_model_of_an_earlier_version_loads_and_loses_them_at_its_next_trim(family, tmp_path):
    model = emptied(family)
    older, count = with_linears(model), len(empty_layers(model))
    older.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert torch.equal(outputs(again, tiny_batch()), outputs(model, tiny_batch()))
    trim(older, random_plan(layout_of(older), share=0.8))
    assert count and len(empty_layers(again)) == len(empty_layers(older)) == count


def test_a_failed_trim_puts_the_linear_layers_back(monkeypatch):
    def fails(model: nn.Module, expected: torch.Tensor) -> None:
        assert empty_layers(model)
        raise SensibertError("not the same")

    model = tiny_model()
    before = facts(model)
    monkeypatch.setattr(sys.modules["sensibert.trimming.trim"], "check_same", fails)
    with pytest.raises(SensibertError, match="not the same"):
        trim(model, random_plan(layout_of(model), empty=("layer.0.head", "layer.1.ffn")))
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ["obs", "layer-obs", "fisher", "magnitude", "soft_gates"])
def test_it_is_scored(method):
    model = emptied()
    batches = [tiny_batch() | {"labels": torch.tensor([0, 1, 1])}]
    scores = sensibert.analyze(model, batches, method).scores
    assert scores["layer.0.head"].numel() == scores["layer.1.ffn"].numel() == 0 < scores["layer.0.ffn"].numel()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_an_empty_linear_computes_what_linear_does(shape, bias):
    linear, x = nn.Linear(*shape, bias=bias), torch.randn(2, 5, shape[0], requires_grad=True)
    expected = F.linear(x, linear.weight, linear.bias)
    linear.__class__ = EmptyLinear
    actual = linear(x)
    assert torch.equal(actual, expected) and actual.dtype == expected.dtype
    actual.sum().backward()
    assert all(p.grad is not None for p in (x, *linear.parameters()))


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet", "nomic_bert"])
def test_it_is_exported_by_torch(family):
    model, batch = Logits(emptied(family)), tuple(tiny_batch().values())
    exported = torch.export.export(model, batch).module()
    torch.testing.assert_close(exported(*batch), model(*batch))
