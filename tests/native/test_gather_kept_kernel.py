"""The CUDA source of gather_kept, run on the CPU: bit for bit what indexing gives, sanitized, in any order; then its
binding in the place of the reference."""

import pytest
import torch

from tests.helpers import DTYPES, dtype_id
from tests.ops.test_gather_kept import entry, expected

from .bindings import ops_tests_pass, passes
from .runner import BUILDS, KernelFailed

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = [(r, c, b) for r in (False, True) for c in (False, True) for b in (False, True)]
SHAPES = [(35, 52), (3, 4200), (70, 260), (66, 5), (257, 1), (1, 1), (0, 4), (4, 0)]


def launch(program, some, to=torch.float32, skip=0, **env):
    """The matrices after the kernel; `some` holds (weight, rows, cols, bits) of each tensor."""
    arrays = []
    for weight, rows, cols, bits in some:
        n, k = weight.shape[0] if rows is None else len(rows), weight.shape[1] if cols is None else len(cols)
        about = [*weight.shape, n, k, CODES[weight.dtype], CODES[to], rows is not None, cols is not None, skip, skip]
        none, front = torch.empty(0, dtype=torch.int64), weight.new_zeros(skip)
        arrays += [torch.tensor([int(x) for x in about]), torch.cat([front, weight.reshape(-1)])]
        arrays += [none if rows is None else rows, none if cols is None else cols]
        arrays += [
            torch.empty(0, dtype=torch.int8) if bits is None else bits,
            torch.full((n * k + skip,), torch.nan, dtype=to),
        ]
    results = program(*arrays, **env)
    outs = []
    for i, given in enumerate(some):
        out, shape = results[6 * i + 5], expected(*given, to).shape
        assert out[:skip].isnan().all(), "written before its start"
        outs.append(out[skip:].view(shape))
    return outs


def check(program, some, to=torch.float32, **options):
    for ours, given in zip(launch(program, some, to, **options), some, strict=True):
        want = expected(*given, to)
        assert torch.equal(ours, want), [None if t is None else t.shape for t in given]


@pytest.mark.parametrize("to", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_shape_and_kind_in_one_launch(kernel, dtype, to):
    some = [entry(shape, *kind, dtype) for shape in SHAPES for kind in KINDS]
    for skip in (0, 1):
        check(kernel("gather_kept"), some, to, skip=skip)


def test_columns_that_leave_a_multiple_of_four(kernel):
    some = []
    for kept in (4, 8, 260):
        weight, bits = torch.randn(37, 300), (torch.rand(37, kept) < 0.5).to(torch.int8).neg_()
        some += [(weight, None, torch.randperm(300)[:kept].sort().values, b) for b in (bits, None)]
    check(kernel("gather_kept"), some, torch.bfloat16)


def test_more_tensors_than_one_launch_carries(kernel):
    check(kernel("gather_kept"), [entry((3, 4 + t % 3), *KINDS[t % 8]) for t in range(460)], torch.bfloat16)


@pytest.mark.parametrize("build", [build for build in BUILDS if build != "plain"])
def test_clean_under_the_sanitizers(kernel, build):
    some = [entry(shape, *kind, dtype) for shape, dtype in zip(SHAPES, DTYPES * 3) for kind in KINDS]
    for to in (torch.float32, torch.bfloat16):
        check(kernel("gather_kept", build), some, to)


@pytest.mark.parametrize(
    "env", [{"CUDA_ON_CPU_BACKWARD": "1"}, {"CUDA_ON_CPU_BLOCKS": "1"}, {"CUDA_ON_CPU_BLOCKS": "64"}]
)
def test_the_same_in_any_order_and_for_any_number_of_blocks(kernel, env):
    check(kernel("gather_kept"), [entry(shape, *kind) for shape in SHAPES for kind in KINDS], **env)


def test_a_nan_in_a_hole_goes_nowhere(kernel):
    weight, rows, cols, bits = entry((35, 52), True, True, True)
    holes = torch.ones_like(weight, dtype=torch.bool)
    holes[rows[:, None], cols] = bits == 0
    (ours,) = launch(kernel("gather_kept"), [(weight.masked_fill(holes, torch.nan), rows, cols, bits)])
    assert torch.equal(ours, expected(weight, rows, cols, bits, torch.float32))


@pytest.mark.parametrize("wrong", [-1, 5, 2**40, -(2**62)])
def test_an_index_outside_the_weight_reads_nothing_and_gives_nan(kernel, wrong):
    weight, index = torch.randn(5, 5), torch.tensor([0, wrong, 4])
    (by_row,) = launch(kernel("gather_kept", "asan"), [(weight, index.clamp(0, 4), None, None)])
    assert torch.equal(by_row, weight[index.clamp(0, 4)])
    arrays = [torch.tensor([5, 5, 3, 3, 0, 0, 1, 1, 0, 0]), weight, index, index, torch.empty(0), torch.zeros(3, 3)]
    ours = kernel("gather_kept", "asan")(*arrays)[5]
    assert ours[1].isnan().all() and ours[:, 1].isnan().all()
    assert torch.equal(ours[::2, ::2], weight[[0, 4]][:, [0, 4]])


@pytest.mark.parametrize("sizes", [(2**31, 4, 2**31, 4), (4, 4, 3, 4), (4, 4, 4, 3)])
def test_sizes_that_do_not_fit_are_refused(kernel, sizes):
    arrays = [torch.tensor([*sizes, 0, 0, 0, 0, 0, 0]), *(torch.zeros(16) for _ in range(5))]
    with pytest.raises(KernelFailed, match="launch failed with error 1"):
        kernel("gather_kept")(*arrays)


def test_the_op_passes_its_tests_through_the_binding(binding):
    ops_tests_pass(binding("gather_kept"), "gather_kept", "not fp64 and not outside")


PROGRAM = """
import torch, sensibert.ops
from tests.native import through_binding
from tests.ops.test_gather_kept import op_arguments
op = torch.ops.sensibert.gather_kept_
torch.manual_seed(0)

def refused(index, change, message):
    arguments = list(op_arguments())
    arguments[index] = change(arguments[index])
    through_binding.refused(message, op, *arguments)

refused(0, lambda out: out[1:], "out has 1 entries, want 2 as weight")
refused(0, lambda out: [out[0][1:], out[1]], "contiguous elements on the device of weight[0]")
refused(0, lambda out: [out[0].double(), out[1]], "out[0] is of a dtype the CUDA kernel does not take")
refused(1, lambda weight: [weight[0].T, weight[1]], "weight[0] is not 48 contiguous elements")
refused(1, lambda weight: [weight[0][0], weight[1]], "weight[0] has 1 axes, want 2")
refused(2, lambda rows: [rows[0].int()], "rows[0] is not int64")
refused(3, lambda of: [2], "rows_of holds 2, of 2")
refused(5, lambda of: [], "cols has 1 entries, cols_of 0")
refused(6, lambda bits: [bits[0][1:]], "bits[0] is not")
refused(6, lambda bits: [bits[0].float()], "bits[0] is not int8")
op([], [], [], [], [], [], [], [])
print("passed")
"""


def test_the_binding_refuses_what_would_read_out_of_bounds(binding):
    passes(binding("gather_kept"), PROGRAM)
