"""A plain Trainer with MaskedAdamW: the weights of torch's fused AdamW, and of clipping before it."""

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from sensibert.core.grid import Grid
from sensibert.optim import MaskedAdamW, optimizer_cls_and_kwargs
from tests.helpers import tiny_batch, tiny_model
from tests.optim.test_masked_adamw import SETTINGS, in_two_groups, make_params


def trained(folder, optim: str = "adamw_torch", use=None, **settings) -> torch.Tensor:
    """All weights of a tiny model after three steps; use: TrainingArguments -> what Trainer takes for its optimizer."""
    batch, model = tiny_batch(), tiny_model()
    rows = [{**{name: x[i] for name, x in batch.items()}, "labels": i % 2} for i in range(3)]
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(folder, max_steps=3, learning_rate=1e-2, optim=optim, **quiet, **settings)
    options = use(model, arguments) if use else {}
    trainer = Trainer(model, arguments, train_dataset=rows, **options)
    trainer.train()
    assert not use or isinstance(trainer.optimizer.optimizer, MaskedAdamW)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_class(model, arguments):
    return {"optimizer_cls_and_kwargs": optimizer_cls_and_kwargs(arguments)}


def by_instance(model, arguments):
    return {"optimizers": (MaskedAdamW(model.parameters(), lr=1e-2, weight_decay=0.0), None)}


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9}], ids=str)
@pytest.mark.parametrize("use", [by_class, by_instance])
def test_a_plain_trainer_gets_the_very_weights_of_the_fused_adamw(use, settings, tmp_path):
    if use is by_instance and settings:
        pytest.skip("the instance has settings of its own")
    ours = trained(tmp_path, use=use, **settings)
    assert torch.equal(ours, trained(tmp_path, "adamw_torch_fused", **settings))


def test_the_settings_are_those_of_the_arguments(tmp_path):
    arguments = TrainingArguments(tmp_path, learning_rate=3e-4, adam_beta2=0.98, adam_epsilon=1e-6, weight_decay=0.02)
    kind, settings = optimizer_cls_and_kwargs(arguments)
    assert kind is MaskedAdamW
    assert settings == {"lr": 3e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.02}


@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "with masks"])
def test_clipping_in_the_step_is_bit_for_bit_clipping_before_it(masked, max_norm):
    twins = [MaskedAdamW(in_two_groups(make_params()), **SETTINGS)]
    twins.append(
        copy.deepcopy(twins[0]) if masked else torch.optim.AdamW(in_two_groups(make_params()), **SETTINGS, fused=True)
    )
    if masked:
        for optimizer in twins:
            weight = optimizer.param_groups[0]["params"][0]
            optimizer.set_keep(weight, torch.arange(6)[:, None] != 2, Grid.row())
    params = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in twins]
    for step in range(4):
        for p, q in zip(*params):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        norms = twins[0].clip_grad_norm(max_norm), nn.utils.clip_grad_norm_(params[1], max_norm)
        for optimizer in twins:
            optimizer.step()
        assert torch.equal(*norms)
        assert all(torch.equal(p, q) and torch.equal(p.grad, q.grad) for p, q in zip(*params)), step


@pytest.mark.parametrize("dtype, factor", [(torch.bfloat16, None), (torch.float32, 0.5)], ids=["bf16", "grad_factor"])
def test_these_gradients_are_clipped_without_being_written(dtype, factor):
    weight, gradient = nn.Parameter(torch.ones(6, 4, dtype=dtype)), torch.randn(6, 4).to(dtype)
    optimizer = MaskedAdamW([weight], betas=(0.0, 0.999))  # the first moment is the gradient of the last step
    optimizer.grad_factor = None if factor is None else torch.tensor(factor)
    weight.grad = gradient.clone()
    optimizer.clip_grad_norm(0.1)
    optimizer.step()
    assert torch.equal(weight.grad, gradient)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"].float().norm(), torch.tensor(0.1), rtol=0.01, atol=0)


def test_a_large_parameter_is_scaled_in_pieces_with_the_same_bits():
    weights = [nn.Parameter(torch.ones(1111, 777)) for _ in range(2)]
    ours, plain = MaskedAdamW(weights[:1], lr=0.1), torch.optim.AdamW(weights[1:], lr=0.1, fused=True)
    for _ in range(2):
        weights[0].grad = torch.randn(1111, 777)
        weights[1].grad = weights[0].grad.clone()
        ours.grad_factor = torch.tensor(0.3)
        weights[1].grad *= ours.grad_factor
        ours.step(), plain.step()
    assert torch.equal(*weights)


def test_clipping_lasts_one_step():
    ours, theirs = (MaskedAdamW(make_params(), **SETTINGS) for _ in range(2))
    ours.param_groups[0]["params"][0].grad = torch.full((6, 4), 9.0)
    ours.clip_grad_norm(0.1)
    ours.step()
    theirs.param_groups[0]["params"][0].grad = torch.full((6, 4), 9.0) * (0.1 / (9 * 24**0.5 + 1e-6))
    theirs.step()
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["params"][0].grad = torch.full((6, 4), 9.0)
        optimizer.step()
    torch.testing.assert_close(ours.param_groups[0]["params"][0], theirs.param_groups[0]["params"][0])


def test_the_norm_is_that_of_the_scaled_gradients():
    """grad_factor unscales first, as GradScaler.unscale_ does, then the norm is clipped."""
    ours, plain = MaskedAdamW(make_params(), **SETTINGS), torch.optim.AdamW(make_params(), **SETTINGS)
    weights = [optimizer.param_groups[0]["params"] for optimizer in (ours, plain)]
    ours.grad_factor = torch.tensor(1 / 1024)
    for p, q in zip(*weights):
        q.grad = torch.randn(q.shape)
        p.grad = q.grad * 1024
    norms = ours.clip_grad_norm(0.5), nn.utils.clip_grad_norm_(weights[1], 0.5)
    ours.step(), plain.step()
    torch.testing.assert_close(*norms)
    for p, q in zip(*weights):
        torch.testing.assert_close(p, q)


def test_no_gradient_has_the_norm_0():
    optimizer = MaskedAdamW(make_params())
    assert optimizer.clip_grad_norm(1.0) == 0
    optimizer.step()
