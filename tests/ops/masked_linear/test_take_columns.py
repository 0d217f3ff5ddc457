"""take_columns copies what indexing would, bit for bit, and lets nothing through that no index names."""

import pytest
import torch

from sensibert.ops.masked_linear.take_columns import take_columns
from tests.helpers import DTYPES, dtype_id

pytestmark = pytest.mark.usefixtures("poisoned_empty")
WIDTHS = [5, 12, 64, 100, 384, 1100]  # of the full matrix; kept: ragged, and multiples of 8


def kept_columns(width: int, share: float = 0.6, device="cpu") -> torch.Tensor:
    return (torch.rand(width) < share).nonzero()[:, 0].to(device, torch.int32)


def places(kept: torch.Tensor, width: int) -> torch.Tensor:
    """int32 [width]: the place of each column among the kept ones, or -1."""
    index = torch.full((width,), -1, dtype=torch.int32, device=kept.device)
    index[kept.long()] = torch.arange(len(kept), dtype=torch.int32, device=kept.device)
    return index


def expected(x, index, fill=None):
    """Column by column, as the definition says."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    other = [zero if fill is None else fill[j] for j in range(len(index))]
    columns = [x[..., i] if i >= 0 else other[j].expand(x.shape[:-1]) for j, i in enumerate(index.tolist())]
    return torch.stack(columns, -1) if columns else x.new_zeros(*x.shape[:-1], 0)


def same(ours: torch.Tensor, want: torch.Tensor) -> bool:
    """Bit for bit, NaN included."""
    integer = {2: torch.int16, 4: torch.int32}[want.itemsize]
    return ours.dtype == want.dtype and ours.is_contiguous() and torch.equal(ours.view(integer), want.view(integer))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_kept_columns_are_gathered(dtype, width, device):
    x, kept = torch.randn(3, 7, width).to(device, dtype), kept_columns(width, device=device)
    for index in (kept, kept[: len(kept) // 8 * 8]):
        assert same(take_columns(x, index), expected(x, index))


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_columns_are_put_back_in_their_places(dtype, width, filled, device):
    kept = kept_columns(width, device=device)
    y, index = torch.randn(21, len(kept)).to(device, dtype), places(kept, width)
    fill = torch.randn(width).to(device, dtype) if filled else None
    assert same(take_columns(y, index, fill), expected(y, index, fill))
    assert same(take_columns(take_columns(y, index, fill), kept), y)


@pytest.mark.parametrize("rows", [1, 2, 5, 133, 4097])
def test_any_number_of_rows(rows, device):
    x, kept = torch.randn(rows, 100).to(device, torch.bfloat16), kept_columns(100, device=device)[:40]
    assert same(take_columns(x, kept), x[:, kept.long()])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_no_index_names_does_not_matter(poison, device):
    x, kept = torch.randn(9, 64, device=device), kept_columns(64, device=device)
    dropped = places(kept, 64) < 0
    assert same(take_columns(x.masked_fill(dropped, poison), kept), x[:, kept.long()])
    fill = torch.randn(64, device=device)
    want = take_columns(x[:, : len(kept)].contiguous(), places(kept, 64), fill)
    ours = take_columns(x[:, : len(kept)].contiguous(), places(kept, 64), fill.masked_fill(~dropped, poison))
    assert same(ours, want)


def test_a_nan_that_is_named_keeps_its_bits(device):
    x = torch.arange(0x7F81, 0x7FC1, dtype=torch.int16).view(torch.bfloat16).expand(3, -1).to(device)
    index = torch.arange(63, -1, -1, dtype=torch.int32, device=device)
    assert same(take_columns(x, index), x.flip(-1).contiguous())


def test_columns_may_come_in_any_order_and_twice(device):
    x, index = torch.randn(4, 5, device=device), torch.tensor([4, 0, -1, 0, 3], dtype=torch.int32, device=device)
    assert same(take_columns(x, index), expected(x, index))


STRIDED = {
    "columns of a wider matrix": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every second row": lambda x: x.repeat_interleave(2, -2)[:, ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "batches swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one row for all": lambda x: x[:, :1].expand_as(x),
    "not aligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@pytest.mark.parametrize("how", STRIDED)
def test_strided_activations(how, device):
    x, kept = STRIDED[how](torch.randn(3, 6, 52).to(device, torch.float16)), kept_columns(52, device=device)[:24]
    assert same(take_columns(x, kept), x[..., kept.long()].contiguous())
    index, fill = places(kept, 104)[::2], torch.randn(104).to(device, torch.float16)[::2]
    assert same(take_columns(x, index, fill), expected(x, index, fill))


@pytest.mark.parametrize(
    "shape, width", [((0, 4), 3), ((2, 0, 4), 8), ((3, 4), 0), ((3, 0), 5), ((3, 0), 0), ((4,), 3)]
)
def test_empty_sizes_and_a_single_row(shape, width, device):
    x = torch.randn(shape, device=device)
    index = torch.full((width,), -1, dtype=torch.int32, device=device)
    if x.shape[-1]:
        index[::2] = 1
    for fill in (None, torch.randn(width, device=device)):
        ours = take_columns(x, index, fill)
        assert ours.shape == (*shape[:-1], width) and same(ours, expected(x, index, fill))


def test_the_result_has_no_gradient(device):
    x = torch.randn(4, 5, device=device, requires_grad=True)
    fill = torch.nn.Parameter(torch.randn(3, device=device))
    assert not take_columns(x, torch.tensor([1, -1, 2], dtype=torch.int32, device=device), fill).requires_grad


@pytest.mark.parametrize("filled", [False, True])
def test_registration(filled, device):
    kept = kept_columns(24, device=device)
    y, index = torch.randn(2, 3, len(kept), device=device), places(kept, 24)
    fill = torch.randn(24, device=device) if filled else None
    torch.library.opcheck(torch.ops.sensibert.take_columns.default, (y, index, fill))


def test_it_compiles_without_a_graph_break():
    def run(y, index, kept, fill):
        return take_columns(take_columns(y, index, fill), kept)

    kept = kept_columns(24)
    arguments = torch.randn(6, len(kept)), places(kept, 24), kept, torch.randn(24)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), run(*arguments))


def test_an_index_outside_the_activations_is_refused():
    with pytest.raises((IndexError, RuntimeError), match="out of"):  # range, or bounds
        take_columns(torch.zeros(3, 4), torch.tensor([4], dtype=torch.int32))


X, I, F = torch.zeros(3, 4), torch.tensor([0, -1], dtype=torch.int32), torch.zeros(2)
WRONG = {
    r"x is torch.float64 \(3, 4\) on cpu, want float32, bfloat16 or float16 \[..., K\]": (X.double(), I),
    r"x is torch.float32 \(\) on cpu": (X[0, 0], I),
    r"index is torch.int64 \(2,\) on cpu, want torch.int32 of one axis on cpu": (X, I.long()),
    r"index is torch.int32 \(1, 2\) on cpu": (X, I[None]),
    r"index is torch.int32 \(2,\) on meta, want torch.int32 of one axis on cpu": (X, I.to("meta")),
    r"fill is torch.float32 \(3,\) on cpu, want torch.float32 \(2,\) on cpu": (X, I, X[:, 0]),
    r"fill is torch.float16 \(2,\) on cpu, want torch.float32 \(2,\) on cpu": (X, I, F.half()),
    r"fill is torch.float32 \(2,\) on meta": (X, I, F.to("meta")),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message):
    with pytest.raises(ValueError, match=f"take_columns: {message}"):
        take_columns(*WRONG[message])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("M, K", [(16, 768), (4096, 768), (4100, 3072), (32768, 1024)])
def test_layers_on_the_gpu_are_captured_and_follow_what_the_tensors_hold(M, K):
    kept = kept_columns(K, device="cuda")[: K // 16 * 8]
    index, fill = places(kept, K), torch.randn(K, device="cuda").bfloat16()
    x = torch.randn(M, K, device="cuda").bfloat16()
    take_columns(take_columns(x, kept), index, fill)  # the first launch loads the module
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        small = take_columns(x, kept)
        wide = take_columns(small, index, fill)
    x.neg_()
    fill.add_(1)
    graph.replay()
    assert same(small, x[:, kept.long()]) and same(wide, torch.where(index < 0, fill, x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_more_than_two_to_the_31_elements():
    M = (1 << 31) // 4096 + 9
    if torch.cuda.mem_get_info()[0] < 3 * 2 * 4096 * M:
        pytest.skip("not enough memory on this device")
    x = torch.randn(M, 8, device="cuda").half()
    index = places(torch.arange(4088, 4096, dtype=torch.int32, device="cuda"), 4096)
    wide = take_columns(x, index)
    assert torch.equal(wide[:, 4088:], x) and not wide[-9:, :4088].any()
    assert torch.equal(take_columns(wide, torch.arange(4088, 4096, dtype=torch.int32, device="cuda")), x)
