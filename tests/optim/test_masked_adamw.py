"""MaskedAdamW is torch.optim.AdamW plus masks, and its state survives save, load and physical trimming."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sensibert.core import arguments
from sensibert.core.grid import Grid
from sensibert.ops import block_sensitivity
from sensibert.ops.masked_adamw import index_map
from sensibert.optim.masked_adamw import MaskedAdamW
from sensibert.optim.state import slice_state
from tests.helpers import DTYPES, dtype_id

SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def make_params(dtype=torch.float32, device="cpu", shapes=((6, 4), (5,), (), (3, 2, 2))):
    rng = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(s, generator=rng, dtype=torch.float64).to(device, dtype)) for s in shapes]


def train(optimizer, steps=5, seed=4):
    """Some steps with gradients that depend on the seed and the step alone."""
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p)
        optimizer.step()


def in_two_groups(params):
    return [{"params": params[:1], "weight_decay": 0.0, "lr": 3e-3, "betas": (0.5, 0.9)}, {"params": params[1:]}]


def same_state(a, b):
    return all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(b[name]))
        and torch.as_tensor(x).dtype == torch.as_tensor(b[name]).dtype
        for name, x in a.items()
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_id)
def test_without_masks_many_steps_are_those_of_adamw(dtype, device):
    ours, theirs = make_params(dtype, device), make_params(dtype, device)
    optimizer, plain = (
        MaskedAdamW(in_two_groups(ours), **SETTINGS),
        torch.optim.AdamW(in_two_groups(theirs), **SETTINGS),
    )
    for chosen in (optimizer, plain):
        schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1 / (1 + step))
        for i in range(20):
            train(chosen, 1, seed=i)
            schedule.step()
    close = 40 * torch.finfo(dtype).eps
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=close, atol=close)
        assert optimizer.state[p]["step"] == plain.state[q]["step"] == 20


def test_types_of_arguments_are_checked_at_the_first_step_alone(monkeypatch):
    """They take a millisecond on a model of a hundred tensors."""
    optimizer = MaskedAdamW(make_params(), **SETTINGS)
    train(optimizer, 1)
    monkeypatch.setattr(arguments, "want", None)
    train(optimizer, 1)


def test_a_parameter_without_a_gradient_is_left_alone():
    first, second = make_params()[:2]
    optimizer = MaskedAdamW([first, second], **SETTINGS)
    before, first.grad = second.detach().clone(), torch.ones_like(first)
    optimizer.step()
    assert torch.equal(second, before) and not optimizer.state[second]


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    params = make_params()
    optimizer = MaskedAdamW(params, **SETTINGS)

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure) > 0


@pytest.mark.parametrize("grid", [Grid.row(), Grid.columns(2), Grid.block(4, 3), Grid.element()], ids=str)
def test_dropped_blocks_stay_zero(grid, device):
    weight = make_params(device=device)[0]
    optimizer = MaskedAdamW([weight], **SETTINGS)
    train(optimizer, 2)
    keep = torch.rand(grid.shape(6, 4), device=device) < 0.5
    optimizer.set_keep(weight, keep, grid)
    train(optimizer, 3)
    dropped, state = ~grid.expand(keep, 6, 4), optimizer.state[weight]
    for tensor in (weight, state["exp_avg"], state["exp_avg_sq"]):
        assert (tensor[dropped] == 0).all() and (tensor[~dropped] != 0).all()


def test_the_gradient_factor_clips_without_touching_the_gradient():
    ours, theirs = make_params(), make_params()
    optimizer, plain = MaskedAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for p, q in zip(ours, theirs):
        p.grad, q.grad = torch.full_like(p, 100.0), torch.full_like(q, 100.0)
    norm = nn.utils.clip_grad_norm_(theirs, 1.0)
    optimizer.grad_factor = 1.0 / (norm + 1e-6)
    optimizer.step()
    plain.step()
    assert all(torch.equal(p.grad, torch.full_like(p, 100.0)) for p in ours)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q)


def test_the_working_copy_and_the_score_are_written_every_step(device):
    weight = make_params(device=device)[0]
    optimizer = MaskedAdamW([weight], **SETTINGS)
    working_copy, score = torch.empty(6, 4, dtype=torch.bfloat16, device=device), torch.zeros(6, 1, device=device)
    optimizer.set_working_copy(weight, working_copy)
    optimizer.track({weight: (score, Grid.row())}, reduce="signed", finish="square")
    expected = torch.zeros(6, 1, device=device)
    for i in range(3):
        before = weight.detach().clone()
        train(optimizer, 1, seed=i)
        block_sensitivity([before], [weight.grad], Grid.row(), "signed", "square", out=[expected])
        assert torch.equal(working_copy, weight.bfloat16())
    torch.testing.assert_close(score, expected)
    compact, rows = torch.empty(2, 4, dtype=torch.bfloat16, device=device), torch.tensor([1, 4], device=device)
    optimizer.set_working_copy(weight, compact, index_map(rows, 6))
    assert optimizer.working_copy(weight) is compact
    optimizer.track({})
    train(optimizer, 1)
    assert torch.equal(compact, weight[rows].bfloat16())
    optimizer.set_working_copy(weight, None)
    train(optimizer, 1)
    assert not torch.equal(working_copy, weight.bfloat16())
    torch.testing.assert_close(score, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_training_from_a_saved_state_equals_uninterrupted_training(dtype, tmp_path):
    def start():
        params = make_params(dtype)
        optimizer = MaskedAdamW(in_two_groups(params), **SETTINGS)
        optimizer.set_keep(params[0], torch.arange(6)[:, None] % 2 == 0, Grid.row())
        return params, optimizer

    unbroken, optimizer = start()
    train(optimizer, 3)
    torch.save({"optimizer": optimizer.state_dict(), "params": unbroken}, tmp_path / "state.pt")
    train(optimizer, 3, seed=9)
    saved = torch.load(tmp_path / "state.pt")
    resumed = saved["params"]
    other = MaskedAdamW(in_two_groups(resumed))
    other.load_state_dict(saved["optimizer"])
    train(other, 3, seed=9)
    for p, q in zip(unbroken, resumed):
        assert torch.equal(p, q) and same_state(optimizer.state[p], other.state[q])
    assert (resumed[0][1::2] == 0).all()


def test_the_state_of_a_torch_adamw_is_taken_over():
    ours, theirs = make_params(), make_params()
    plain = torch.optim.AdamW(theirs, **SETTINGS)
    train(plain)
    optimizer = MaskedAdamW(ours)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    for p, q in zip(ours, theirs):
        p.data.copy_(q)
    train(optimizer)
    train(plain)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q)


def test_a_copy_of_the_optimizer_trains_on_by_itself():
    params = make_params()
    optimizer = MaskedAdamW(params, **SETTINGS)
    optimizer.set_keep(params[0], torch.arange(6)[:, None] != 1, Grid.row())
    train(optimizer)
    twin = copy.deepcopy(optimizer)
    train(twin, seed=9)
    train(optimizer, seed=9)
    for p, q in zip(params, twin.param_groups[0]["params"]):
        assert p is not q and torch.equal(p, q)


def test_a_backward_pass_over_changed_weights_is_refused():
    weight = nn.Parameter(torch.randn(3, 3))
    loss = (weight * weight).sum()
    optimizer = MaskedAdamW([weight])
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_learning_rate_may_be_a_tensor():
    ours, theirs = make_params(), make_params()
    rate = torch.tensor(1e-2)
    optimizer, plain = MaskedAdamW(ours, lr=rate), torch.optim.AdamW(theirs, lr=1e-2)
    for lr in (1e-2, 1e-3):
        rate.fill_(lr)
        plain.param_groups[0]["lr"] = lr
        train(optimizer)
        train(plain)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}], ids=str)
def test_a_setting_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=f"MaskedAdamW: .*{next(iter(wrong))}"):
        MaskedAdamW(make_params(), **wrong)


def test_a_mask_that_does_not_fit_is_named():
    weight, bias = make_params()[:2]
    optimizer = MaskedAdamW([weight])
    with pytest.raises(ValueError, match=r"set_keep: keep is torch.bool \(6, 4\), want torch.bool \(6, 1\)"):
        optimizer.set_keep(weight, torch.ones(6, 4, dtype=torch.bool), Grid.row())
    with pytest.raises(ValueError, match=r"param \(5,\) is in none of the optimizer's param_groups"):
        optimizer.set_keep(bias, torch.ones(5, 1, dtype=torch.bool), Grid.row())


def test_a_sparse_gradient_is_named():
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradient is torch.sparse_coo, want a dense one"):
        MaskedAdamW(embedding.parameters()).step()


def with_gaps(tensor):
    return tensor.detach().t().contiguous().t()


def set_data(tensor, data):
    tensor.data = data


def cut(optimizer):
    old, rows = optimizer.param_groups[0]["params"][1], torch.tensor([0, 2, 3])
    slice_state(optimizer, old, nn.Parameter(old.detach()[rows.to(old.device)].clone()), {0: rows})


def mapped(weight, places):
    places = torch.tensor(places, device=weight.device)
    return torch.zeros(len(places), 4, dtype=torch.bfloat16, device=weight.device), index_map(places, 6)


CHANGES = {  # optimizer, its first weight [6, 4] and that weight's state
    "nothing": lambda o, w, s: None,
    "a keep": lambda o, w, s: o.set_keep(w, torch.arange(6, device=w.device)[:, None] % 3 != 1, Grid.row()),
    "another keep": lambda o, w, s: o.set_keep(w, torch.arange(6, device=w.device)[:, None] != 4, Grid.row()),
    "the keep in place": lambda o, w, s: s["keep"].logical_not_(),
    "the grid alone": lambda o, w, s: s.update(keep=s["keep"][:1].clone(), keep_grid=(0, 0)),
    "no keep": lambda o, w, s: (s.pop("keep"), s.pop("keep_grid")),
    "a working copy": lambda o, w, s: o.set_working_copy(w, torch.zeros(6, 4, dtype=torch.bfloat16, device=w.device)),
    "a compact working copy": lambda o, w, s: o.set_working_copy(w, *mapped(w, [1, 4])),
    "a score": lambda o, w, s: o.track({w: (torch.zeros(6, 1, device=w.device), Grid.row())}),
    "another statistic": lambda o, w, s: o.track(o._scores, "signed", "square", decay=0.5),
    "the score elsewhere": lambda o, w, s: set_data(o._scores[w][0], torch.ones(6, 1, device=w.device)),
    "lr": lambda o, w, s: o.param_groups[0].update(lr=3e-3),
    "lr, a tensor": lambda o, w, s: o.param_groups[0].update(lr=torch.tensor(2e-3)),
    "betas": lambda o, w, s: o.param_groups[0].update(betas=(0.7, 0.9)),
    "eps": lambda o, w, s: o.param_groups[0].update(eps=1e-3),
    "weight_decay": lambda o, w, s: o.param_groups[0].update(weight_decay=0.3),
    "a gradient factor": lambda o, w, s: setattr(o, "grad_factor", torch.tensor(0.25)),
    "no gradient factor": lambda o, w, s: setattr(o, "grad_factor", None),
    "a weight elsewhere": lambda o, w, s: set_data(w, w.detach() * 2),
    "a moment elsewhere": lambda o, w, s: set_data(s["exp_avg"], s["exp_avg"] + 1),
    "another moment": lambda o, w, s: s.update(exp_avg_sq=s["exp_avg_sq"] + 1),
    "another step count": lambda o, w, s: s.update(step=s["step"] * 0 + 7),
    "a weight with gaps": lambda o, w, s: set_data(w, with_gaps(w)),
    "the weight without": lambda o, w, s: set_data(w, w.detach().contiguous()),
    "a moment with gaps": lambda o, w, s: set_data(s["exp_avg"], with_gaps(s["exp_avg"])),
    "the moment without": lambda o, w, s: set_data(s["exp_avg"], s["exp_avg"].contiguous()),
    "a loaded state": lambda o, w, s: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "no working copy": lambda o, w, s: o.set_working_copy(w, None),
    "no score": lambda o, w, s: o.track({}),
    "a cut parameter": lambda o, w, s: cut(o),
    "a new group": lambda o, w, s: o.add_param_group({"params": [nn.Parameter(torch.ones(3, 5, device=w.device))]}),
    "groups swapped": lambda o, w, s: o.param_groups[0].update(params=o.param_groups[0]["params"][::-1]),
}


def changed_between_steps(device, held=lambda change: None):
    """Everything that an optimizer leaves behind which is changed between its steps, and one that forgets each step."""
    twins = [MaskedAdamW(make_params(device=device), **SETTINGS) for _ in range(2)]
    weights = [twin.param_groups[0]["params"][0] for twin in twins]
    for number, (change, make) in enumerate(CHANGES.items()):
        for twin, weight in zip(twins, weights):
            make(twin, weight, twin.state[weight])
        for step in range(3):
            for forgets, twin in enumerate(twins):
                if forgets:
                    twin._held.clear()
                params = [p for group in twin.param_groups for p in group["params"]]
                for p, g in zip(params, make_params(device=device, shapes=[p.shape for p in params])):
                    p.grad = g.detach() * (1 + step)
                weights[forgets].grad = with_gaps(weights[forgets].grad) if step == 1 else weights[forgets].grad
                params[-1].grad = None if number % 4 == 3 else params[-1].grad
                twin.step()
        held(change)
        ours, theirs = (
            [x for p in t.state for x in (p.detach(), *(x for x in t.state[p].values() if isinstance(x, torch.Tensor)))]
            + [x for x, *_ in (*t._working_copies.values(), *t._scores.values())]
            for t in twins
        )
        assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs)), change


def test_whatever_changes_between_steps_is_noticed(device):
    changed_between_steps(device)


def test_a_moment_that_no_longer_fits_is_named_at_any_step(device):
    params = make_params(device=device)
    optimizer = MaskedAdamW(params, **SETTINGS)
    train(optimizer, 3)
    optimizer.state[params[0]]["exp_avg"].data = torch.zeros(4, 6, device=device)
    with pytest.raises(ValueError, match=r"masked_adamw: exp_avgs\[0\] is float32 \(4, 6\)"):
        train(optimizer, 1)
    optimizer.state[params[0]]["exp_avg"].data = torch.zeros(6, 4, device=device)
    optimizer.grad_factor = torch.ones((), dtype=torch.float64)
    with pytest.raises(ValueError, match="masked_adamw: grad_factor is float64"):
        train(optimizer, 1)


def test_steps_can_be_traced_without_memory():
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(6, 4))
        weight.grad = torch.empty(6, 4)
        optimizer = MaskedAdamW([weight], **SETTINGS)
        for _ in range(3):
            optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_step_replays_with_new_gradients_and_a_new_rate():
    results = []
    for captured in (False, True):
        params, rate = make_params(device="cuda"), torch.tensor(1e-2, device="cuda")
        optimizer = MaskedAdamW(params, lr=rate)
        score = torch.zeros(6, 1, device="cuda")
        optimizer.set_keep(params[0], torch.arange(6, device="cuda")[:, None] != 2, Grid.row())
        optimizer.track({params[0]: (score, Grid.row())})
        train(optimizer, 1)  # allocates the state
        graph = torch.cuda.CUDAGraph()
        if captured:
            before = [p.detach().clone() for p in params]
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                optimizer.step()
            assert all(torch.equal(p, q) for p, q in zip(params, before))  # captured, not run
        for step in range(3):
            rate.fill_(1e-2 / (1 + step))
            for p in params:
                p.grad.fill_(0.1 * (step + 1))
            graph.replay() if captured else optimizer.step()
        results.append([*(p.detach() for p in params), score])
    for eager, replayed in zip(*results):
        assert torch.equal(eager, replayed)
