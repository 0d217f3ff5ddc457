"""The CUDA source of take_columns, run on the CPU: bit for bit what indexing gives, sanitized, in any order; then its
binding in the place of the reference."""

import pytest
import torch

from tests.helpers import DTYPES, dtype_id
from tests.ops.masked_linear.test_take_columns import expected, kept_columns, places, same

from .bindings import ops_tests_pass, passes
from .runner import BUILDS

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SHAPES = [(1, 8), (5, 5), (35, 52), (9, 100), (40, 16), (3, 4200), (13, 1096), (2, 300), (130, 1), (0, 8), (4, 0)]


def launch(program, some, skip=0, **env):
    """What the kernel gives; `some` holds (x, index, fill) of each launch, x [M, K] with rows that may lie apart."""
    arrays = []
    for x, index, fill in some:
        M, k, stride = x.shape[0], len(index), x.stride(0)
        size = (M - 1) * stride + x.shape[1] if x.numel() else 0  # of memory that may be read
        arrays += [torch.tensor([M, k, stride, CODES[x.dtype], skip])]
        arrays += [torch.cat([x.new_zeros(skip), x.as_strided((size,), (1,))]), index]
        arrays += [torch.empty(0) if fill is None else fill, torch.full((M * k + skip,), torch.nan, dtype=x.dtype)]
    outs = program(*arrays, **env)[4::5]
    assert all(out[:skip].isnan().all() for out in outs), "written before its start"
    return [out[skip:].view(len(x), len(index)) for out, (x, index, _) in zip(outs, some, strict=True)]


def cases(M: int, width: int, dtype: torch.dtype = torch.bfloat16):
    """(x, index, fill): gathered, and put back without and with fill."""
    kept = kept_columns(width)
    x, y = torch.randn(M, width).to(dtype), torch.randn(M, len(kept)).to(dtype)
    yield x, kept, None
    yield x, kept[: len(kept) // 8 * 8], None
    yield y, places(kept, width), None
    yield y, places(kept, width), torch.randn(width).to(dtype)


def check(program, some, **options):
    for ours, given in zip(launch(program, some, **options), some, strict=True):
        assert same(ours, expected(*given)), (given[0].shape, given[1].shape)


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_shape(kernel, dtype, skip):
    check(kernel("take_columns"), [case for shape in SHAPES for case in cases(*shape, dtype)], skip=skip)


@pytest.mark.parametrize("build", [build for build in BUILDS if build != "plain"])
def test_clean_under_the_sanitizers(kernel, build):
    check(kernel("take_columns", build), [case for shape in SHAPES for d in DTYPES for case in cases(*shape, d)])


@pytest.mark.parametrize(
    "env", [{"CUDA_ON_CPU_BACKWARD": "1"}, {"CUDA_ON_CPU_BLOCKS": "1"}, {"CUDA_ON_CPU_BLOCKS": "64"}]
)
def test_the_same_in_any_order_and_for_any_number_of_blocks(kernel, env):
    check(kernel("take_columns"), [case for shape in SHAPES for case in cases(*shape)], **env)


@pytest.mark.parametrize("stride", [0, 52, 67])
def test_rows_that_lie_apart_or_over_each_other(kernel, stride):
    x = torch.randn(20 * 67 + 52).bfloat16().as_strided((20, 52), (stride, 1))
    check(kernel("take_columns", "asan"), [(x, kept_columns(52), None), (x, kept_columns(52)[:24], None)])


def test_nothing_behind_the_last_named_column_is_read(kernel):
    """There x ends: AddressSanitizer sees one element more."""
    index = torch.tensor([3, -1, 5, 9, -1, 0, 1, 2], dtype=torch.int32)
    check(kernel("take_columns", "asan"), [(torch.randn(7, 64)[:, :10], index, None)])


def test_the_op_passes_its_tests_through_the_binding(binding):
    ops_tests_pass(binding("take_columns"), "take_columns", "not outside")


PROGRAM = """
import torch, sensibert.ops
from tests.native.through_binding import refused
op = torch.ops.sensibert.take_columns
x, index, fill = torch.randn(3, 4), torch.tensor([0, -1, 2], dtype=torch.int32), torch.randn(3)

refused("x[0] is of a dtype the CUDA kernel does not take", op, x.double(), index, None)
refused("x has no axis, want [.., K]", op, x[0, 0], index, None)
refused("index has 2 axes, want 1", op, x, index[None], None)
refused("index is not contiguous int32", op, x, index.long(), None)
refused("fill has 2 axes, want 1", op, x, index, fill[None])
refused("fill is not 3 elements of the dtype of x", op, x, index, fill[1:])
refused("fill is not 3 elements of the dtype of x", op, x, index, fill.half())
print("passed")
"""


def test_the_binding_refuses_what_would_read_out_of_bounds(binding):
    passes(binding("take_columns"), PROGRAM)
