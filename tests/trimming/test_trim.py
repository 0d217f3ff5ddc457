"""The cut itself: exact twice over, undone when anything is wrong, and training goes on after it."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sensibert.core.errors import SensibertError
from sensibert.models import base_of, layout_of
from sensibert.models.structure import is_trimmed, structure_of
from sensibert.nn import MaskedLinear, restore
from sensibert.nn import replace as mask_layers
from sensibert.saving.folder import export, load
from sensibert.trimming.self_check import silenced
from sensibert.trimming.trim import restructure, trim
from tests.helpers import tiny_batch, tiny_model
from tests.plans import outputs, random_plan

DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
KINDS = [("bert", {}), ("modernbert", {}), ("mpnet", {}), ("deberta-v2", DEBERTA)]


def facts(model: nn.Module) -> dict[str, object]:
    """All that a cut could change: tensors by identity and value, sizes, attributes, modes, hooks."""
    actual: dict[str, object] = {name: (id(p), p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, int | bool)}
        actual[f"{name}()"] = (plain, list(module._forward_pre_hooks.values()))
        own = vars(module).get("config")
        actual[f"{name} itself"] = (type(module), id(own), own and own.to_dict(), sorted(vars(module)))
    return actual | {"trimmed": is_trimmed(model)}


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = facts(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if isinstance(value, tuple) and isinstance(value[1], torch.Tensor):
            assert value[0] == after[name][0] and torch.equal(value[1], after[name][1]), name
        else:
            assert value == after[name], name


@pytest.mark.parametrize("family, overrides", KINDS)
def test_a_trimmed_model_can_be_trimmed_again(family, overrides):
    model = tiny_model(family, **overrides).double()
    batch, whole = tiny_batch(), copy.deepcopy(model)
    trim(model, random_plan(layout_of(model), seed=1, share=0.8))
    trim(model, random_plan(layout_of(model), seed=2, share=0.6))
    layout, structure = layout_of(whole), structure_of(model)
    keep = {s.name: torch.isin(torch.arange(s.units), structure[s.name]) for s in layout.sites}
    assert {s.name: s.units for s in layout_of(model).sites} == {name: int(kept.sum()) for name, kept in keep.items()}
    with silenced(whole, replace(random_plan(layout), keep=keep)):
        expected = outputs(whole, batch)
    assert float((outputs(model, batch) - expected).abs().max()) < 1e-9


def test_a_copy_leaves_the_model_alone_and_in_place_returns_it():
    model, batch = tiny_model(), tiny_batch()
    before, plan = facts(model), random_plan(layout_of(model))
    trimmed = trim(model, plan, copy_model=True)
    assert trimmed is not model and is_trimmed(trimmed)
    assert_untouched(model, before)
    expected = outputs(trimmed, batch)
    assert trim(model, plan) is model
    assert torch.equal(outputs(model, batch), expected)


def test_untrimmed_parameters_are_the_same_tensors():
    model = tiny_model()
    before, plan = dict(model.named_parameters()), random_plan(layout_of(model))
    plan.keep["layer.1.ffn"][:] = plan.keep["layer.1.head"][:] = True
    trim(model, plan)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before if "layer.0" not in name)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert torch.equal(after[name], before[name][plan.keep["layer.0.ffn"]])


def loss_of(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(**tiny_batch()).logits, torch.tensor([0, 1, 1]))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("family, overrides", KINDS)
def test_training_continues_after_the_cut(family, overrides):
    model = tiny_model(family, **overrides).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        step(model, optimizer)
    plan = random_plan(layout_of(model))
    trim(model, plan, optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape == parameter.grad.shape
        assert int(optimizer.state[parameter]["step"]) == 3
    first = step(model, optimizer)
    for _ in range(10):
        last = step(model, optimizer)
    assert last < first


def test_state_and_gradients_are_those_of_the_kept_units():
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    value = model.bert.encoder.layer[0].attention.self.value
    moment, grad = optimizer.state[value.weight]["exp_avg_sq"].clone(), value.weight.grad.clone()
    plan = random_plan(layout_of(model))
    trim(model, plan, optimizer)
    rows = plan.keep["layer.0.head"].repeat_interleave(8)
    assert torch.equal(optimizer.state[value.weight]["exp_avg_sq"], moment[rows])
    assert torch.equal(value.weight.grad, grad[rows])


def test_dropped_units_never_mattered_to_the_step_after():
    """One step of SGD on the trimmed model is the step on the masked one, in every kept tensor."""
    masked = tiny_model().double()
    plan, trimmed = random_plan(layout_of(masked)), copy.deepcopy(masked)
    trim(trimmed, plan)
    for model in (masked, trimmed):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if model is masked:
            with silenced(model, plan):
                step(model, optimizer)
        else:
            step(model, optimizer)
    torch.testing.assert_close(
        dict(trim(masked, plan).named_parameters()), dict(trimmed.named_parameters()), atol=1e-12, rtol=0
    )


def test_frozen_parts_may_be_unknown_to_the_optimizer():
    model = tiny_model()
    model.bert.encoder.layer[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    trim(model, random_plan(layout_of(model)), optimizer)
    assert not any(p.requires_grad for p in model.bert.encoder.layer[0].parameters())
    assert all(p.requires_grad for p in model.bert.encoder.layer[1].parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_optimizer_of_another_model_is_refused():
    model, other = tiny_model(), tiny_model()
    before, optimizer = facts(model), torch.optim.AdamW(other.parameters())
    with pytest.raises(SensibertError, match="holds none of the tensors to cut, want the optimizer of this model"):
        trim(model, random_plan(layout_of(model)), optimizer)
    assert_untouched(model, before)
    with pytest.raises(SensibertError, match="copy_model cuts a copy"):
        trim(model, random_plan(layout_of(model)), torch.optim.AdamW(model.parameters()), copy_model=True)


@pytest.mark.parametrize("family, overrides", KINDS)
def test_a_trimmed_model_can_be_copied_and_pickled(family, overrides):
    model, batch = tiny_model(family, **overrides), tiny_batch()
    trim(model, random_plan(layout_of(model)))
    expected = outputs(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, batch), expected)
        assert all(torch.equal(kept, structure_of(model)[name]) for name, kept in structure_of(twin).items())
        trim(twin, random_plan(layout_of(twin), seed=1))  # and trimmed on its own
    assert torch.equal(outputs(model, batch), expected)


def masked_by(model: nn.Module, plan) -> nn.Module:
    """The same function by masks: the rows and columns of dropped units, in MaskedLinear layers."""
    masks = {}
    for site in plan.layout.sites:
        for member in site.members:
            path, _, name = member.parameter.rpartition(".")
            if name == "weight":
                keep = plan.keep[site.name].repeat(member.parts)
                masks[path] = (keep[:, None] if member.dim == 0 else keep[None], member.grid)
    mask_layers(base_of(model), masks)
    return model


@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet"])
def test_a_trim_ends_the_masks_of_layers(family):
    model = tiny_model(family).double()
    plan, batch = random_plan(layout_of(model)), tiny_batch()
    expected = outputs(masked_by(model, plan), batch)
    trim(model, plan)
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())
    torch.testing.assert_close(outputs(model, batch), expected, atol=1e-12, rtol=0)


def test_restore_keeps_the_function_with_zeros_in_the_weights():
    model, batch = tiny_model().double(), tiny_batch()
    expected = outputs(masked_by(model, random_plan(layout_of(model))), batch)
    restore(model)
    torch.testing.assert_close(outputs(model, batch), expected, atol=1e-12, rtol=0)
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())


@pytest.mark.parametrize(
    "family, overrides",
    [("bert", {"intermediate_size": 96}), ("bert", {"num_attention_heads": 2}), ("distilbert", {}), ("roberta", {})],
    ids=["width", "heads", "names", "family"],
)
def test_the_plan_of_another_model_is_refused(family, overrides):
    model, plan = tiny_model(), random_plan(layout_of(tiny_model(family, **overrides)))
    before = facts(model)
    with pytest.raises(SensibertError, match=f"the plan was made for another model .{family}, 4 sites, .* one is bert"):
        trim(model, plan)
    assert_untouched(model, before)


def test_a_plan_serves_once():
    model = tiny_model()
    plan = random_plan(layout_of(model))
    trim(model, plan)
    before = facts(model)
    with pytest.raises(SensibertError, match="the plan was made for another model"):
        trim(model, plan)
    assert_untouched(model, before)


def test_a_plan_of_the_encoder_serves_every_task_head():
    plan = random_plan(layout_of(tiny_model(head="")))
    for head in ("SequenceClassification", "QuestionAnswering", "MaskedLM"):
        assert is_trimmed(trim(tiny_model(head=head), plan))


def test_less_than_a_family_can_do_without_is_refused():
    model = tiny_model("deberta-v2")
    plan = random_plan(layout_of(model))
    plan.keep["layer.0.head"][:] = False
    with pytest.raises(SensibertError, match=r"layer.0.head keeps 0 of 4 units, want at least 1 of 4 \(deberta-v2\)"):
        trim(model, plan)


def test_nan_in_a_dropped_unit_is_removed_with_it():
    model = tiny_model()
    plan = random_plan(layout_of(model))
    dropped = int((~plan.keep["layer.0.ffn"]).nonzero()[0])
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight[dropped] = float("nan")
    assert outputs(trim(model, plan), tiny_batch()).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_cut_too(dtype):
    model, batch = tiny_model().to(dtype), tiny_batch()
    plan = random_plan(layout_of(model))
    with silenced(model, plan):
        expected = outputs(model, batch)
    trim(model, plan)
    assert {p.dtype for p in model.parameters()} == {dtype}
    torch.testing.assert_close(outputs(model, batch), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("family, overrides", KINDS)
def test_a_fresh_model_takes_the_shapes_of_a_stored_structure(family, overrides):
    model, batch = tiny_model(family, **overrides), tiny_batch()
    trim(model, random_plan(layout_of(model), seed=1, share=0.8))
    trim(model, random_plan(layout_of(model), seed=2, share=0.8))
    fresh = restructure(tiny_model(family, seed=9, **overrides), structure_of(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh, batch), outputs(model, batch))
    assert all(torch.equal(kept, structure_of(model)[name]) for name, kept in structure_of(fresh).items())


def test_fused_attention_is_never_called_without_heads(monkeypatch, tmp_path):
    """torch 2.11 on CUDA cannot compute it; nor may a copy, a restructured model or the exported folder call it."""
    fused = F.scaled_dot_product_attention

    def checked(query, *args, **kwargs):
        assert query.numel(), "0 heads"
        return fused(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", checked)
    model, batch = tiny_model("bert", attn_implementation="sdpa"), tiny_batch()
    plan = random_plan(layout_of(model), empty=["layer.0.head"])
    trimmed = trim(model, plan, copy_model=True)
    again = restructure(copy.deepcopy(model), structure_of(trimmed))
    again.load_state_dict(trimmed.state_dict())
    export(trimmed, tmp_path / "folder")
    for other in (copy.deepcopy(trimmed), again, load(tmp_path / "folder")[0]):
        assert torch.equal(outputs(other, batch), outputs(trimmed, batch))
    assert model.config._attn_implementation == trimmed.config._attn_implementation == "sdpa"


def test_a_structure_that_does_not_fit_is_refused():
    structure = structure_of(tiny_model(num_hidden_layers=3))
    with pytest.raises(SensibertError, match="structure: does not fit this bert model"):
        restructure(tiny_model(), structure)
    with pytest.raises(SensibertError, match="does not fit this bert model .at layer.0.ffn."):
        restructure(tiny_model(), structure_of(tiny_model()) | {"layer.0.ffn": torch.tensor([64])})
