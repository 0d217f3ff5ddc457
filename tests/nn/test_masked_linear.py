"""MaskedLinear takes the place of an nn.Linear: same constructor, same keys, same tools around it."""

import copy
import io
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sensibert.core.grid import Grid
from sensibert.nn import MaskedLinear
from tests.fresh import FORKED

pytestmark = pytest.mark.usefixtures("poisoned_empty")
GRIDS = [Grid.element(), Grid.row(), Grid.column(), Grid.rows(4), Grid.block(4, 4)]


def make_layer(grid=Grid.row(), in_features=12, out_features=8, **kwargs) -> MaskedLinear:
    layer = MaskedLinear(in_features, out_features, grid=grid, **kwargs)
    keep = torch.rand(layer.keep.shape) < 0.6
    keep.view(-1)[0], keep.view(-1)[-1] = True, False
    layer.set_keep(keep)
    return layer


def masked_weight(layer):
    return layer.weight * layer.grid.expand(layer.keep, *layer.weight.shape)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_computes_with_the_masked_weight(grid):
    layer, x = make_layer(grid), torch.randn(2, 3, 12)
    torch.testing.assert_close(layer(x), F.linear(x, masked_weight(layer), layer.bias))


def test_fresh_it_is_an_nn_linear():
    torch.manual_seed(3)
    plain = nn.Linear(12, 8)
    torch.manual_seed(3)
    layer = MaskedLinear(12, 8)
    x = torch.randn(5, 12)
    assert isinstance(layer, nn.Linear) and torch.equal(layer(x), plain(x))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_a_strict_load_works_both_ways():
    layer, plain = make_layer(), nn.Linear(12, 8)
    plain.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(plain.weight, layer.weight)
    keep = layer.keep.clone()
    layer.load_state_dict(nn.Linear(12, 8).state_dict(), strict=True)
    assert torch.equal(layer.keep, keep)


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_equal_and_independent(copied):
    layer, x = make_layer(Grid.rows(4)), torch.randn(5, 12)
    twin = copied(layer)
    assert torch.equal(twin(x), layer(x)) and twin.grid == layer.grid
    twin.set_keep(None)
    assert not torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_device_and_dtype_reach_weight_and_mask(bias):
    layer = MaskedLinear(12, 8, bias, device="meta", dtype=torch.bfloat16, grid=Grid.block(4, 4))
    assert layer.weight.is_meta and layer.keep.is_meta and layer.keep.shape == (2, 3)
    assert layer(torch.empty(5, 12, device="meta", dtype=torch.bfloat16)).shape == (5, 8)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.keep.all() and layer.weight.isfinite().all() and (layer.bias is None) == (not bias)
    assert layer.to(torch.float32).keep.dtype == torch.bool


def test_it_follows_a_move_to_the_device(device):
    layer = make_layer().to(device)
    assert layer(torch.randn(5, 12, device=device)).device.type == device.type


@pytest.mark.parametrize("lead", [(0,), (2, 0), ()])
def test_no_rows_and_no_batch_are_fine(lead):
    layer = make_layer()
    layer(torch.randn(*lead, 12)).sum().backward()
    assert layer.weight.grad.shape == (8, 12)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("sizes", [(0, 8), (12, 0), (0, 0)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_empty_widths_are_fine(grid, sizes):
    layer = MaskedLinear(*sizes, grid=grid)
    x = torch.randn(3, sizes[0])
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer, x = make_layer(Grid.column()), torch.randn(5, 12)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        want = F.linear(x, masked_weight(layer), layer.bias)
    assert y.dtype == dtype
    torch.testing.assert_close(y, want, atol=2e-2, rtol=2e-2)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("grid", [Grid.element(), Grid.column()], ids=str)
def test_compiled_without_a_graph_break_it_gives_the_same(grid):
    layer = make_layer(grid)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for rows in (5, 9):  # the second makes the shape dynamic
        x = torch.randn(rows, 12)
        want, got = layer(x), compiled(x)
        assert torch.equal(got, want)
        want.sum().backward(), got.sum().backward()
    assert torch.equal(compiled._orig_mod.weight.grad, layer.weight.grad)


def test_compiled_under_autocast_it_gives_the_same():
    layer, x = make_layer(Grid.column()), torch.randn(5, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))


def test_compiled_it_sees_a_new_mask():
    layer, x = make_layer(), torch.randn(5, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    layer.set_keep(~layer.keep)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_it_gives_the_same(strict):
    layer, x = make_layer(Grid.block(4, 4)), torch.randn(5, 12)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},), strict=strict)
    x = torch.randn(9, 12)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    layer, x = nn.Sequential(make_layer(), nn.GELU(), make_layer(in_features=8)), torch.randn(5, 12, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    again = [x.grad, *(p.grad for p in layer.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_gradients_accumulate():
    layer, x = make_layer(), torch.randn(6, 12)
    layer(x[:2]).sum().backward(), layer(x[2:]).sum().backward()
    (want,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    torch.testing.assert_close(layer.weight.grad, want)


def test_a_tied_weight_is_masked_by_this_layer_alone():
    embedding, layer = nn.Embedding(8, 12), make_layer()
    layer.weight = embedding.weight
    tokens = torch.arange(8)
    assert torch.equal(embedding(tokens), layer.weight)
    torch.testing.assert_close(layer(torch.eye(12)) - layer.bias, masked_weight(layer).T)


def test_a_parametrized_weight_is_used():
    layer, x = make_layer(), torch.randn(5, 12)
    before = layer(x) - layer.bias
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Double())
    torch.testing.assert_close(layer(x) - layer.bias, 2 * before)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_mask_of_the_same_shape_is_set_in_place():
    layer = make_layer()
    buffer, keep = layer.keep, torch.zeros(8, 1, dtype=torch.bool)
    layer.set_keep(keep)
    assert layer.keep is buffer and not buffer.any()
    keep[0] = True
    assert not layer.keep.any()  # a copy, not the caller's tensor
    layer.set_keep(None, Grid.element())
    assert layer.keep.shape == (8, 12) and layer.grid == Grid.element()


def test_repr_shows_grid_and_share():
    layer = MaskedLinear(12, 8, grid=Grid.rows(4))
    layer.set_keep(torch.tensor([[True], [False]]))
    assert repr(layer) == "MaskedLinear(in_features=12, out_features=8, bias=True, grid=rows:4, kept=1/2)"


@pytest.mark.parametrize("keep", [torch.ones(7, 1, dtype=torch.bool), torch.ones(8, 1)])
def test_a_wrong_mask_is_named(keep):
    with pytest.raises(ValueError, match=r"keep is torch.\w+ \(\d, 1\), want torch.bool \(8, 1\) for the grid row"):
        MaskedLinear(12, 8).set_keep(keep)


def _ddp_worker(rank, world, file, queue):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.manual_seed(0)
    layer = make_layer()
    if rank:
        layer.set_keep(None)  # DDP must bring rank 0's masks
    model = DistributedDataParallel(layer)
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model(x[rank::world]).square().mean().backward()
    queue.put((rank, layer.keep.tolist(), layer.weight.grad.tolist()))
    dist.barrier()
    os._exit(0)  # taken down, gloo may wait for its own threads for ever (seen once, torch 2.13)


def test_ddp_averages_the_gradients_of_two_processes(tmp_path):
    queue = FORKED.SimpleQueue()
    given = [(rank, 2, tmp_path / "store", queue) for rank in range(2)]
    workers = [FORKED.Process(target=_ddp_worker, args=args, daemon=True) for args in given]
    for worker in workers:
        worker.start()
    results = sorted(queue.get() for _ in workers)
    for worker in workers:
        worker.join(60)
    torch.manual_seed(0)
    layer = make_layer()
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        layer(x).square().mean().backward()
    for _, keep, grad in results:
        assert keep == layer.keep.tolist()
        torch.testing.assert_close(torch.tensor(grad), layer.weight.grad)
