"""Blocks of a grid on a real (tiny) model: scored, masked, and kept at exactly zero by any optimizer."""

import pytest
import torch

from sensibert.allocation.allocate import allocate
from sensibert.core.budget import Budget
from sensibert.core.errors import SensibertError
from sensibert.core.grid import Grid
from sensibert.models import base_of, layout_of
from sensibert.models.masks import Masks, masks_of
from sensibert.models.structure import read_structure, save_structure
from sensibert.nn import MaskedLinear
from sensibert.optim.masked_adamw import MaskedAdamW
from sensibert.sensitivity import sampled_loss
from sensibert.sensitivity.analyze import analyze
from sensibert.trimming.trim import restructure, trim
from tests.helpers import tiny_batch, tiny_model
from tests.plans import random_plan

GRIDS = [Grid.element(), Grid(16, 16), Grid(24, 20)]  # the last one is ragged
HALF = Budget.parse("50%params")


def batches(count: int = 3) -> list[dict]:
    return [tiny_batch(seed=seed) | {"labels": torch.tensor([0, 1, 1])} for seed in range(count)]


def state(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in base_of(model).named_parameters()}


def dropped(model) -> dict[str, torch.Tensor]:
    masks, actual = masks_of(model), state(model)
    return {name: actual[name][~masks.grid.expand(keep, *actual[name].shape)] for name, keep in masks.keep.items()}


def plan_for(model, grid=GRIDS[0], statistic="magnitude", budget=HALF):
    return allocate(analyze(model, batches(), statistic, sampled_loss, grid=grid), budget)


def train(model, optimizer, steps: int = 3) -> None:
    model.train()
    for number in range(steps):
        model(**batches(number + 1)[-1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fisher_of_a_block_is_the_square_of_its_gate_gradient(grid):
    model, expected = tiny_model(), {}
    scores = analyze(model, batches(), "saliency", grid=grid).scores
    fisher = analyze(model, batches(1), "fisher", lambda out, batch, rng: out.loss, grid=grid).scores
    for batch in batches():
        model.zero_grad()
        model(**batch).loss.backward()
        for name, p in base_of(model).named_parameters():
            if name in scores:
                wide = (p * p.grad).detach().double()
                rows, cols = grid.shape(*p.shape)
                pad = torch.zeros(rows * grid.block_rows, cols * grid.block_cols, dtype=torch.float64)
                pad[: len(p), : p.shape[1]] = wide
                blocks = pad.view(rows, grid.block_rows, cols, grid.block_cols)
                expected.setdefault(name, []).append((blocks.abs().sum((1, 3)), blocks.sum((1, 3)).square()))
    assert set(scores) == {w.parameter for w in layout_of(model).weights} and len(scores) == 12
    for name, parts in expected.items():
        torch.testing.assert_close(scores[name].double(), sum(p[0] for p in parts), rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(fisher[name].double(), parts[0][1], rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("statistic", ["fisher", "taylor", "magnitude", "random"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_statistic_meets_the_budget_within_a_block(statistic, grid):
    model = tiny_model()
    plan = plan_for(model, grid, statistic)
    dense = plan.layout.encoder_params
    assert 0 <= int(0.5 * dense) - plan.params < grid.block_rows * grid.block_cols
    trim(model, plan)
    zeros = sum(int((p == 0).sum()) for name, p in state(model).items() if name in plan.keep)
    assert plan.params == dense - zeros


def test_the_masked_model_equals_the_untrimmed_one_with_zeros():
    model, other = tiny_model(), tiny_model()
    plan = plan_for(model, Grid(16, 16))
    trim(model, plan)
    with torch.no_grad():
        for name, keep in plan.keep.items():
            other.get_parameter(f"bert.{name}").mul_(plan.grid.expand(keep, *model.get_parameter(f"bert.{name}").shape))
        torch.testing.assert_close(model(**tiny_batch()).logits, other(**tiny_batch()).logits)


@pytest.mark.parametrize("kind", ["AdamW", "fused", "MaskedAdamW", "SGD"])
def test_dropped_weights_are_exactly_zero_after_steps_and_the_others_learn(kind):
    model = tiny_model()
    make = {
        "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.3),
        "fused": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.3, fused=True),
        "MaskedAdamW": lambda p: MaskedAdamW(p, 1e-2, weight_decay=0.3),
        "SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.3),
    }
    optimizer = make[kind](model.parameters())
    train(model, optimizer)  # moments everywhere
    plan = plan_for(model, Grid(24, 20))
    trim(model, plan, optimizer)
    before = state(model)
    train(model, optimizer)
    assert all((gone == 0).all() for gone in dropped(model).values())
    for name, keep in plan.keep.items():
        kept = plan.grid.expand(keep, *before[name].shape)
        assert (state(model)[name] != before[name])[kept].all()


@pytest.mark.parametrize("family", ["albert", "deberta-v2", "modernbert", "distilbert", "nomic_bert"])
def test_other_families_keep_their_zeros_too(family):
    model = tiny_model(family)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    plan = plan_for(model, GRIDS[0], "fisher")
    trim(model, plan, optimizer)
    train(model, optimizer, 2)
    assert all((gone == 0).all() for gone in dropped(model).values())
    assert sum(gone.numel() for gone in dropped(model).values()) == plan.layout.encoder_params - plan.params


@pytest.mark.parametrize("statistic", ["fisher", "random"])
def test_a_second_cut_keeps_no_block_that_the_first_dropped(statistic):
    model = tiny_model()
    first = plan_for(model, Grid(8, 8), statistic, Budget.parse("70%params"))
    trim(model, first)
    again = analyze(model, batches(), statistic, sampled_loss, seed=5, grid=Grid(8, 8))
    second = allocate(again, HALF)
    for name, keep in second.keep.items():
        assert not (keep & ~first.keep[name]).any()
    more = allocate(again, Budget.parse("90%params"))  # nothing else is left: dropped blocks come back, as zeros
    trim(model, more)
    assert masks_of(model).keep.keys() == more.keep.keys()
    assert all(torch.equal(masks_of(model).keep[name], keep) for name, keep in more.keep.items())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_masks_come_back_from_a_file_bit_by_bit(tmp_path, grid):
    model, other = tiny_model(), tiny_model()
    trim(model, plan_for(model, grid, "random"))
    save_structure(model, tmp_path / "structure.safetensors")
    actual = read_structure(tmp_path / "structure.safetensors")
    assert isinstance(actual, Masks) and actual.grid == grid
    restructure(other, actual)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(**tiny_batch()).logits, other(**tiny_batch()).logits)
    assert all(torch.equal(masks_of(other).keep[name], keep) for name, keep in masks_of(model).keep.items())


def test_combinations_that_cannot_work_are_refused_in_words(tmp_path):
    model = tiny_model()
    plan = plan_for(model)
    with pytest.raises(SensibertError, match="'soft_gates' scores whole units, want another with a grid"):
        analyze(model, batches(), "soft_gates", grid=Grid.element())
    with pytest.raises(SensibertError, match="the optimizer holds none of the weights"):
        trim(model, plan, torch.optim.AdamW(tiny_model().parameters()))
    with pytest.raises(SensibertError, match="made for another model"):
        trim(tiny_model(intermediate_size=32), plan)
    save_structure(trim(tiny_model(), plan), tmp_path / "masks.safetensors")
    with pytest.raises(SensibertError, match="masks: do not fit this model .*keep is torch.bool"):
        restructure(tiny_model(intermediate_size=32), read_structure(tmp_path / "masks.safetensors"))
    small = trim(tiny_model(), random_plan(layout_of(model)))
    with pytest.raises(SensibertError, match="units were removed already, want an untrimmed model for grid element"):
        trim(small, allocate(analyze(small, (), "magnitude", grid=Grid.element()), Budget.parse("90%params")))
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())
