"""MaskedAdamW is torch.optim.AdamW plus masks, and its state survives save, load and physical trimming."""

import copy
import gc
import weakref

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.optimization import Adafactor

from sensibert.core.grid import Grid
from sensibert.ops import block_sensitivity
from sensibert.ops.masked_adamw import index_map
from sensibert.optim.masked_adamw import MaskedAdamW
from sensibert.optim.state import slice_state
from tests.helpers import DTYPES, dtype_id, tiny_batch, tiny_model

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
def test_dropped_blocks_stay_zero_until_the_keep_is_cleared(grid, device):
    weight = make_params(device=device)[0]
    optimizer = MaskedAdamW([weight], **SETTINGS)
    train(optimizer, 2)
    keep = torch.rand(grid.shape(6, 4), device=device) < 0.5
    optimizer.set_keep(weight, keep, grid)
    train(optimizer, 3)
    dropped, state = ~grid.expand(keep, 6, 4), optimizer.state[weight]
    for tensor in (weight, state["exp_avg"], state["exp_avg_sq"]):
        assert (tensor[dropped] == 0).all() and (tensor[~dropped] != 0).all()
    optimizer.clear_keep(weight)
    train(optimizer, 1)
    assert (weight != 0).all()


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


def test_the_shadow_and_the_score_follow_every_step(device):
    weight = make_params(device=device)[0]
    optimizer = MaskedAdamW([weight], **SETTINGS)
    shadow, score = torch.empty(6, 4, dtype=torch.bfloat16, device=device), torch.zeros(6, 1, device=device)
    optimizer.set_shadow(weight, shadow)
    optimizer.track({weight: (score, Grid.row())}, reduce="signed", finish="square")
    wanted = torch.zeros(6, 1, device=device)
    for i in range(3):
        before = weight.detach().clone()
        train(optimizer, 1, seed=i)
        block_sensitivity([before], [weight.grad], Grid.row(), "signed", "square", out=[wanted])
        assert torch.equal(shadow, weight.bfloat16())
    torch.testing.assert_close(score, wanted)
    compact, rows = torch.empty(2, 4, dtype=torch.bfloat16, device=device), torch.tensor([1, 4], device=device)
    optimizer.set_shadow(weight, compact, index_map(rows, 6))
    assert optimizer.shadow(weight) is compact
    optimizer.track({})
    train(optimizer, 1)
    assert torch.equal(compact, weight[rows].bfloat16())
    optimizer.set_shadow(weight, None)
    train(optimizer, 1)
    assert not torch.equal(shadow, weight.bfloat16())
    torch.testing.assert_close(score, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_training_goes_on_from_a_saved_state_as_if_unbroken(dtype, tmp_path):
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


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "accelerate"])
@pytest.mark.parametrize("kind", [MaskedAdamW, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_sliced_parameter_trains_on_like_the_rows_and_columns_it_keeps(kind, wrapped):
    whole, small = make_params()[0], None
    settings = {"lr": 1e-2, **({"momentum": 0.9} if kind is torch.optim.SGD else {})}
    reference, optimizer = kind([whole], **settings), None
    train(reference, 3)
    small = nn.Parameter(whole.detach().clone())
    optimizer = kind([{"params": [small]}], **settings)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    optimizer = Accelerator(cpu=True).prepare(optimizer) if wrapped else optimizer
    rows, cols = torch.tensor([4, 0, 1]), torch.tensor([3, 1])
    new = nn.Parameter(small.detach()[rows][:, cols].clone())
    slice_state(optimizer, small, new, {0: rows, 1: cols})
    assert optimizer.param_groups[0]["params"][0] is new and list(optimizer.state) == [new]
    whole.grad = torch.randn(6, 4)
    new.grad = whole.grad[rows][:, cols]
    reference.step()
    optimizer.step()
    torch.testing.assert_close(new, whole.detach()[rows][:, cols], rtol=1e-6, atol=1e-7)


def test_a_mask_is_sliced_with_its_parameter_and_goes_when_it_drops_nothing():
    weight, bias = make_params()[:2]
    optimizer = MaskedAdamW([weight, bias])
    optimizer.set_keep(weight, torch.tensor([[True, False], [True, True]]), Grid.block(3, 3))  # ragged: 3 + 3 by 3 + 1
    optimizer.set_keep(bias, torch.arange(5)[:, None] != 2, Grid.row())
    shadow = torch.zeros(6, 4, dtype=torch.bfloat16)
    optimizer.set_shadow(weight, shadow)
    train(optimizer, 2)
    new_weight, new_bias = nn.Parameter(weight.detach()[2:5].clone()), nn.Parameter(bias.detach()[[0, 4]].clone())
    slice_state(optimizer, weight, new_weight, {0: torch.arange(2, 5)})
    slice_state(optimizer, bias, new_bias, {0: torch.tensor([0, 4])})
    train(optimizer, 1)
    assert new_weight.eq(0).nonzero().tolist() == [[0, 3]]
    assert "keep" not in optimizer.state[new_bias]


def test_slicing_before_the_first_step_only_swaps_the_parameter():
    weight = make_params()[0]
    optimizer = torch.optim.AdamW([weight])
    new = nn.Parameter(weight.detach()[:2].clone())
    slice_state(optimizer, weight, new, {0: torch.tensor([0, 1])})
    assert optimizer.param_groups[0]["params"] == [new] and not optimizer.state


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, Adafactor])
def test_the_factors_of_adafactor_are_sliced_with_their_rows_and_columns(kind):
    def factors(parameter):
        return [v.flatten().clone() for v in optimizer.state[parameter].values() if torch.is_tensor(v) and v.dim()]

    weight = nn.Parameter(torch.randn(6, 4))
    optimizer = kind([weight])
    train(optimizer, 2)
    (of_rows, of_cols), rows, cols = factors(weight), torch.tensor([4, 0, 1]), torch.tensor([3, 1])
    new = nn.Parameter(weight.detach()[rows][:, cols].clone())
    slice_state(optimizer, weight, new, {0: rows, 1: cols})
    for found, wanted in zip(factors(new), (of_rows[rows], of_cols[cols]), strict=True):
        assert torch.equal(found, wanted)
    train(optimizer, 1)


def test_what_cannot_be_sliced_is_named():
    weight, other = make_params()[:2]
    optimizer = torch.optim.AdamW([weight])
    with pytest.raises(ValueError, match=r"slice_state: old \(5,\) is in none of the optimizer's param_groups"):
        slice_state(optimizer, other, other, {})
    with pytest.raises(ValueError, match=r"slice_state: new is \(6, 4\), want \(2, 4\)"):
        slice_state(optimizer, weight, weight, {0: torch.tensor([0, 1])})
    optimizer.state[weight]["absmax"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"AdamW keeps absmax \(3,\) for a parameter \(6, 4\), want a state that can"):
        slice_state(optimizer, weight, nn.Parameter(weight.detach()[:2]), {0: torch.tensor([0, 1])})


def test_a_slice_that_fails_leaves_the_optimizer_as_it_was():
    weight = make_params()[0]
    optimizer = MaskedAdamW([weight])
    train(optimizer)
    before = copy.copy(optimizer.state[weight])
    with pytest.raises(IndexError):
        slice_state(optimizer, weight, nn.Parameter(torch.zeros(2, 4)), {0: torch.tensor([0, 6])})
    assert optimizer.param_groups[0]["params"] == [weight]
    assert all(optimizer.state[weight][name] is value for name, value in before.items())


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


@pytest.mark.parametrize("given", ["instance", "class"])
def test_trainer_trains_with_it_as_with_adamw(given, tmp_path):
    from transformers import Trainer, TrainingArguments

    batch = tiny_batch()
    rows = [{**{name: x[i] for name, x in batch.items()}, "labels": i % 2} for i in range(3)]
    weights = []
    for kind in (MaskedAdamW, torch.optim.AdamW):
        model = tiny_model()
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=3,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        if given == "instance":
            options = {"optimizers": (kind(model.parameters(), lr=1e-2), None)}
        else:
            options = {"optimizer_cls_and_kwargs": (kind, {"lr": 1e-2})}
        Trainer(model, arguments, train_dataset=rows, **options).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


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
    "no keep": lambda o, w, s: o.clear_keep(w),
    "a shadow": lambda o, w, s: o.set_shadow(w, torch.zeros(6, 4, dtype=torch.bfloat16, device=w.device)),
    "a compact shadow": lambda o, w, s: o.set_shadow(w, *mapped(w, [1, 4])),
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
    "no shadow": lambda o, w, s: o.set_shadow(w, None),
    "no score": lambda o, w, s: o.track({}),
    "a cut parameter": lambda o, w, s: cut(o),
    "a new group": lambda o, w, s: o.add_param_group({"params": [nn.Parameter(torch.ones(3, 5, device=w.device))]}),
    "groups swapped": lambda o, w, s: o.param_groups[0].update(params=o.param_groups[0]["params"][::-1]),
}


def changed_between_steps(device, seen=lambda change: None):
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
        seen(change)
        ours, theirs = (
            [x for p in t.state for x in (p.detach(), *(x for x in t.state[p].values() if isinstance(x, torch.Tensor)))]
            + [x for x, *_ in (*t._shadows.values(), *t._scores.values())]
            for t in twins
        )
        assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs)), change


def test_whatever_changes_between_steps_is_seen(device):
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


def test_a_replaced_state_is_not_kept_alive():
    params = make_params()
    optimizer = MaskedAdamW(params)
    train(optimizer, 3)
    old = weakref.ref(params[0])
    rows = torch.tensor([0, 1])
    slice_state(optimizer, params[0], nn.Parameter(params[0].detach()[rows].clone()), {0: rows})
    del params[0]
    gc.collect()
    assert old() is None


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
