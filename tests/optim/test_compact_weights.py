"""A layer that follows the optimizer multiplies with the compact matrix the optimizer wrote, and nobody can tell."""

import copy
import gc
import os
import pickle
import weakref

import pytest
import torch
from torch import nn

from sensibert.core.grid import Grid
from sensibert.nn import MaskedLinear
from sensibert.ops.masked_linear import dispatch as paths
from sensibert.ops.masked_linear.kept_index import live, published
from sensibert.optim import compact_weights as following
from sensibert.optim.compact_weights import follow
from sensibert.optim.masked_adamw import MaskedAdamW

pytestmark = pytest.mark.usefixtures("poisoned_empty")
BF16 = torch.bfloat16
GRIDS = [Grid.row(), Grid.column(), Grid.rows(4), Grid.columns(3), Grid.block(4, 4), Grid.element()]


def some_keep(grid, shape=(8, 12), seed=0) -> torch.Tensor:
    """Half of the blocks; where the grid has as many, whole rows and columns are left empty too."""
    keep = torch.rand(grid.shape(*shape), generator=torch.Generator().manual_seed(seed)) < 0.6
    keep[0, 0] = True
    for dim in (0, 1):
        if keep.shape[dim] > 2:
            keep.select(dim, 1 + seed % 2).zero_()
    return keep


def make_layer(grid, device="cpu", seed=0) -> MaskedLinear:
    torch.manual_seed(seed)
    layer = MaskedLinear(12, 8, grid=grid)
    layer.set_keep(some_keep(grid))
    return layer.to(device)


def make_pair(grid=Grid.row(), device="cpu", lr=0.1):
    """A layer and the optimizer it follows."""
    layer = make_layer(grid, device)
    optimizer = MaskedAdamW(layer.parameters(), lr=lr)
    follow(layer, optimizer)
    return layer, optimizer


def seen(layer, dtype=BF16):
    return published(layer.weight, layer.keep, layer.grid, dtype)


def compact_of(layer):
    """The kept rows and columns of the masked weight, by plain indexing."""
    wide = layer.grid.expand(layer.keep, *layer.weight.shape)
    return layer.weight.detach().masked_fill(~wide, 0)[wide.any(1)][:, wide.any(0)].bfloat16()


def one_step(layer, optimizer, x, dtype):
    """y, dx and dweight of one training step."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype or BF16, enabled=dtype is not None):
        y = layer(x)
    optimizer.zero_grad()
    y.float().square().sum().backward()
    optimizer.step()
    return y.detach(), x.grad, layer.weight.grad.clone(), layer.weight.detach().clone()


@pytest.mark.parametrize("dtype", [None, BF16], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_training_is_bit_for_bit_that_of_a_layer_that_makes_its_own_copy(grid, dtype, device):
    ours, optimizer = make_pair(grid, device)
    theirs = make_layer(grid, device)
    plain = MaskedAdamW(theirs.parameters(), lr=0.1)
    plain.set_keep(theirs.weight, theirs.keep, grid)
    x = torch.randn(5, 12, device=device)
    for number in range(4):
        if number == 2:  # in place, so both optimizers have the new masks
            ours.set_keep(some_keep(grid, seed=1)), theirs.set_keep(some_keep(grid, seed=1))
        for mine, other in zip(one_step(ours, optimizer, x, dtype), one_step(theirs, plain, x, dtype), strict=True):
            assert mine.dtype == other.dtype and torch.equal(mine, other), number
        assert torch.equal(seen(ours), compact_of(ours)) and seen(theirs) is None


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_matrix_has_no_empty_row_or_column(grid):
    layer, _ = make_pair(grid)
    kept = live(layer.keep, grid, 8, 12)
    assert kept.share < 1
    assert seen(layer).numel() == round(kept.share * 96) and torch.equal(seen(layer), compact_of(layer))


def test_without_an_empty_row_or_column_it_has_full_size():
    layer, optimizer = make_pair(Grid.element())
    layer.set_keep(torch.eye(8, 12, dtype=torch.bool) | (torch.arange(12) == 11) | (torch.arange(8)[:, None] == 7))
    one_step(layer, optimizer, torch.randn(5, 12), BF16)
    assert seen(layer).shape == (8, 12) and torch.equal(seen(layer), compact_of(layer))


def test_forward_and_input_gradient_read_the_matrix_and_not_the_weight():
    layer, _ = make_pair(Grid.rows(4))
    seen(layer).fill_(7)  # not what the weight holds: so we see who was asked
    x = torch.eye(12, requires_grad=True)
    with torch.autocast("cpu", BF16):
        y = layer(x)
    assert ((y - layer.bias.bfloat16())[:, live(layer.keep, layer.grid, 8, 12).rows].float() - 7).abs().max() < 0.1
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert (dx == 7 * 4).all()


@pytest.mark.parametrize("path, grid", [("tiles", Grid.block(64, 64)), ("bits", Grid.element())])
def test_kernels_that_apply_the_masks_get_the_cast_weight_if_it_is_whole(path, grid, monkeypatch):
    monkeypatch.setattr(paths, "resolve", lambda problem: paths.Choice(path, "as if on sm_90"))
    x = torch.randn(5, 128, requires_grad=True)
    for whole in (True, False):
        layer = MaskedLinear(128, 128, bias=False, grid=grid)
        keep = torch.eye(*layer.keep.shape, dtype=torch.bool)
        keep[-1] = whole  # without its last row nothing is at full size
        layer.set_keep(keep)
        follow(layer, MaskedAdamW(layer.parameters()))
        with torch.autocast("cpu", BF16):
            want = torch.autograd.grad(copy.deepcopy(layer)(x).float().sum(), x)[0]
            assert torch.equal(torch.autograd.grad(layer(x).float().sum(), x)[0], want)
            seen(layer).zero_()
            assert layer(x).any().item() != whole


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_weight_gradient_has_full_size_and_exact_zeros(grid):
    layer, _ = make_pair(grid)
    x = torch.randn(5, 12)
    x[:, ~grid.expand(layer.keep, 8, 12).any(0)] = torch.nan  # columns that nobody keeps are not read
    layer.weight.grad = None
    with torch.autocast("cpu", BF16):
        layer(x).float().square().sum().backward()
    dropped = ~grid.expand(layer.keep, 8, 12)
    assert layer.weight.grad.shape == (8, 12) and layer.weight.grad.isfinite().all()
    assert (layer.weight.grad[dropped] == 0).all() and (layer.weight.grad[~dropped] != 0).all()


def test_a_weight_changed_by_hand_ends_it_until_the_next_step():
    layer, optimizer = make_pair()
    with torch.no_grad():
        layer.weight.mul_(2)
    assert seen(layer) is None
    one_step(layer, optimizer, torch.randn(5, 12), BF16)
    assert torch.equal(seen(layer), compact_of(layer))


def test_a_step_without_a_gradient_promises_nothing():
    layer, optimizer = make_pair()
    before = seen(layer)
    optimizer.step()
    assert seen(layer) is before
    with torch.no_grad():
        layer.weight.mul_(2)
    optimizer.step()
    assert seen(layer) is None


def test_new_masks_on_many_layers_cost_one_gather(monkeypatch):
    calls, gather = [], following.gather_kept
    monkeypatch.setattr(following, "gather_kept", lambda *args, **kw: calls.append(len(args[0])) or gather(*args, **kw))
    model = nn.Sequential(*(MaskedLinear(12, 12, grid=Grid.row()) for _ in range(4)))
    optimizer = MaskedAdamW(model.parameters(), lr=0.1)
    for layer in model:
        layer.set_keep(some_keep(Grid.row(), (12, 12)))
        follow(layer, optimizer)
    assert calls == [1, 1, 1, 1]

    def train():
        with torch.autocast("cpu", BF16):
            model(torch.randn(5, 12)).float().square().sum().backward()
        optimizer.step()

    train(), train()
    assert calls[4:] == []
    for layer in model:
        layer.set_keep(some_keep(Grid.row(), (12, 12), seed=1))
    train(), train()
    assert calls[4:] == [4]
    assert all(torch.equal(seen(layer), compact_of(layer)) for layer in model)


def test_new_masks_just_before_a_step_are_those_of_the_step():
    layer, optimizer = make_pair(Grid.block(4, 4))
    one_step(layer, optimizer, torch.randn(5, 12), BF16)
    layer.set_keep(some_keep(layer.grid, seed=1))
    optimizer.step()
    assert not layer.weight[~layer.grid.expand(layer.keep, 8, 12)].any()
    assert torch.equal(seen(layer), compact_of(layer))


def test_another_grid_of_the_same_shape_is_noticed():
    layer = MaskedLinear(12, 5, grid=Grid.rows(3))  # [2, 1] either way: 3 + 2 rows, 4 + 1 rows
    optimizer = MaskedAdamW(layer.parameters(), lr=0.1)
    follow(layer, optimizer)
    layer.set_keep(torch.tensor([[True], [False]]), Grid.rows(4))
    one_step(layer, optimizer, torch.randn(5, 12), BF16)
    assert layer.weight[3].any() and not layer.weight[4].any() and seen(layer).shape == (4, 12)


def test_a_keep_of_another_shape_ends_it_and_lets_the_matrix_go():
    layer, optimizer = make_pair()
    gone = weakref.ref(seen(layer))
    layer.set_keep(None, Grid.element())
    one_step(layer, optimizer, torch.randn(5, 12), BF16)
    gc.collect()
    assert seen(layer) is None and optimizer.shadow(layer.weight) is None and gone() is None


@pytest.mark.parametrize(
    "end", [MaskedLinear.to_linear, lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight))]
)
def test_a_layer_that_was_turned_back_or_cut_is_left_alone(end):
    layer, optimizer = make_pair()
    weight = layer.weight
    end(layer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.shadow(weight) is None


def test_the_layers_masks_win_over_those_of_a_loaded_state():
    layer, optimizer = make_pair()
    one_step(layer, optimizer, torch.randn(5, 12), BF16)
    saved = copy.deepcopy(optimizer.state_dict())
    layer.set_keep(some_keep(layer.grid, seed=1))
    optimizer.load_state_dict(saved)
    one_step(layer, optimizer, torch.randn(5, 12), BF16)
    assert not layer.weight[~layer.keep[:, 0]].any() and torch.equal(seen(layer), compact_of(layer))


def test_a_shadow_taken_away_is_not_believed():
    layer, optimizer = make_pair()
    optimizer.set_shadow(layer.weight, None)
    one_step(layer, optimizer, torch.randn(5, 12), BF16)
    assert seen(layer) is None


def test_a_tied_weight_with_other_masks_is_not_confused():
    layer, optimizer = make_pair()
    other = MaskedLinear(12, 8)
    other.weight = layer.weight
    other.set_keep(~layer.keep)
    x = torch.randn(5, 12)
    with torch.autocast("cpu", BF16):
        want = copy.deepcopy(other)(x)
        assert torch.equal(other(x), want)


def test_masks_first_used_in_inference_mode_serve_training_too():
    layer, optimizer = make_pair()
    layer.set_keep(some_keep(layer.grid, seed=1))
    with torch.inference_mode(), torch.autocast("cpu", BF16):
        layer(torch.randn(5, 12))
    one_step(layer, optimizer, torch.randn(5, 12), BF16)
    assert torch.equal(seen(layer), compact_of(layer))


def test_copies_pickles_and_state_dicts_know_nothing_of_it():
    layer, optimizer = make_pair()
    one_step(layer, optimizer, torch.randn(5, 12), BF16)
    x = torch.randn(5, 12)
    with torch.autocast("cpu", BF16):
        want = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert seen(twin) is None and torch.equal(twin(x), want)
    assert list(layer.state_dict()) == ["weight", "bias"]
    plain = MaskedAdamW(make_layer(Grid.row()).parameters())
    plain.load_state_dict(optimizer.state_dict())
    twin = copy.deepcopy(optimizer)
    assert twin.shadow(twin.param_groups[0]["params"][0]) is None
    pickle.dumps(optimizer)


def test_model_and_optimizer_die_together():
    layer, optimizer = make_pair()
    gone = [weakref.ref(t) for t in (layer.weight, seen(layer), optimizer)]
    del layer, optimizer
    gc.collect()
    assert [r() for r in gone] == [None] * 3


@pytest.mark.parametrize("grid", [Grid.row(), Grid.block(4, 4)], ids=str)
def test_compiled_without_a_graph_break_it_uses_the_matrix(grid):
    layer, optimizer = make_pair(grid)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 12)
    for number in range(2):
        if number:
            layer.set_keep(some_keep(grid, seed=1))
        with torch.autocast("cpu", BF16):
            want, got = layer(x), compiled(x)
            assert torch.equal(got, want)
        grads = [torch.autograd.grad(y.float().square().sum(), layer.weight)[0] for y in (want, got)]
        assert torch.equal(*grads)
        layer.weight.grad = grads[0]
        optimizer.step()
    seen(layer).fill_(7)
    with torch.autocast("cpu", BF16):
        assert torch.equal(compiled(x), layer(x)) and layer(x).float().abs().max() > 7


def _ddp_against_plain(file):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    ours, optimizer = make_pair()
    theirs, plain = make_pair()
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    wrapped = DistributedDataParallel(ours)
    for number in range(3):
        if number == 2:
            ours.set_keep(some_keep(ours.grid, seed=1)), theirs.set_keep(some_keep(ours.grid, seed=1))
        x = torch.randn(5, 12)
        for model, stepper in ((wrapped, optimizer), (theirs, plain)):
            with torch.autocast("cpu", BF16):
                y = model(x)
            stepper.zero_grad()
            y.float().square().sum().backward()
            stepper.step()
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(seen(ours), compact_of(ours))
    os._exit(0)  # taken down, gloo may wait for its own threads for ever (seen once, torch 2.13)


def test_ddp_trains_as_without(tmp_path):
    process = torch.multiprocessing.get_context("spawn").Process
    worker = process(target=_ddp_against_plain, args=(tmp_path / "store",), daemon=True)
    worker.start()
    worker.join(120)
    assert worker.exitcode == 0


def test_a_weight_that_the_optimizer_does_not_hold_is_named():
    layer, _ = make_pair()
    with pytest.raises(ValueError, match=r"param \(8, 12\) is in none of the optimizer's param_groups"):
        follow(layer, MaskedAdamW([nn.Parameter(torch.zeros(2))]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("grid", [Grid.rows(4), Grid.columns(3), Grid.block(4, 4)], ids=str)
def test_a_captured_training_step_replays_what_eager_steps_do(grid):
    x, weights = torch.randn(64, 12, device="cuda"), []
    for captured in (False, True):
        layer, optimizer = make_pair(grid, "cuda", lr=torch.tensor(0.1, device="cuda"))

        def step(layer=layer, optimizer=optimizer):
            with torch.autocast("cuda", BF16, cache_enabled=False):
                loss = layer(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(), step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step()
        for _ in range(3):
            graph.replay() if captured else step()
        weights.append((layer.weight.detach().clone(), optimizer.shadow(layer.weight).clone()))
        assert torch.equal(weights[-1][1], compact_of(layer))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
