"""The tests of the op once more, with the binding and the CUDA source in place of the reference, on CPU tensors."""

from .bindings import ops_tests_pass, passes


def test_the_op_passes_its_tests_through_the_binding(binding):
    ops_tests_pass(binding("block_sensitivity"), "block_sensitivity", "not float64")  # float64 is the reference's alone


PROGRAM = """
import torch, sensibert.ops
from tests.native.through_binding import refused
op = torch.ops.sensibert.block_sensitivity_
w, g, out = torch.ones(4, 6), torch.ones(4, 6), torch.zeros(4, 1)

words = ("abs", "none")
refused("grads are 0, want 1", op, [out], [w], [], [1, 0], *words, 1.0, 1.0)
refused("blocks are 1, want 2", op, [out], [w], [g], [1], *words, 1.0, 1.0)
refused("out has 0 tensors, want 1", op, [], [w], [g], [1, 0], *words, 1.0, 1.0)
gaps = "out[0] is not contiguous float32 with one value a block"
refused(gaps, op, [out[:3]], [w], [g], [1, 0], *words, 1.0, 1.0)
refused(gaps, op, [out.double()], [w], [g], [1, 0], *words, 1.0, 1.0)
refused("grads[0] is not of the shape of weights[0]", op, [out], [w], [g.T], [1, 0], *words, 1.0, 1.0)
refused("weights[0] has 3 axes, want 1 or 2", op, [out], [w[None]], [g[None]], [1, 0], *words, 1.0, 1.0)
dtype = "is of a dtype the CUDA kernel does not take"
refused("weights[0] " + dtype, op, [out], [w.double()], [g], [1, 0], *words, 1.0, 1.0)
refused("grads[0] " + dtype, op, [out], [w], [g.long()], [1, 0], *words, 1.0, 1.0)
refused("blocks[0] is -1", op, [out], [w], [g], [-1, 0], *words, 1.0, 1.0)
refused("reduce is sum", op, [out], [w], [g], [1, 0], "sum", "none", 1.0, 1.0)
refused("finish is root", op, [out], [w], [g], [1, 0], "abs", "root", 1.0, 1.0)
op([out], [w.T.contiguous().T], [g], [1, 0], *words, 1.0, 0.5)
assert out.flatten().tolist() == [3.0] * 4
torch.library.opcheck(op.default, ([out], [w], [g], [1, 0], *words, 1.0, 1.0))
print("passed")
"""


def test_the_binding_refuses_what_would_read_out_of_bounds(binding):
    passes(binding("block_sensitivity"), PROGRAM)


RANDOM = """
import random, torch, sensibert.ops, tests.native.through_binding
from sensibert.core.grid import Grid
from sensibert.ops.block_sensitivity import FINISHES, REDUCES, reference
random.seed(0)
torch.manual_seed(0)
ROWS, COLS = [1, 2, 7, 16, 17, 31, 129, 300], [1, 3, 8, 64, 127, 129, 257, 5000, 17000]
BLOCKS = [0, 1, 2, 3, 4, 8, 16, 17, 37, 64, 100, 128, 129, 150, 300]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

def some(n, k):  # anywhere in memory, aligned or not
    skip = random.choice([0, 0, 1, 2])
    return torch.randn(n * k + skip).to(random.choice(DTYPES))[skip:].view(n, k)

for case in range(60):
    shapes = [(random.choice(ROWS), random.choice(COLS)) for _ in range(random.randint(1, 5))]
    grids = [Grid(random.choice(BLOCKS), random.choice(BLOCKS)) for _ in shapes]
    shapes = [(min(n, 3), k) if k > 300 else (n, k) for n, k in shapes]
    weights, grads = [some(*s) for s in shapes], [some(*s) for s in shapes]
    blocks = [b for g in grids for b in (g.block_rows, g.block_cols)]
    words = random.choice(REDUCES), random.choice(FINISHES), random.choice([0.0, 0.5, 1.0]), random.choice([1.0, -0.3])
    want = [torch.randn(g.shape(*s)) for g, s in zip(grids, shapes)]
    ours = [o.clone() for o in want]
    torch.ops.sensibert.block_sensitivity_(ours, weights, grads, blocks, *words)
    reference(want, [w.double() for w in weights], [g.double() for g in grads], blocks, *words)
    for s, grid, a, b in zip(shapes, grids, ours, want):
        atol = 3e-4 * max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=3e-5, atol=atol, msg=lambda m: f"{s} {grid} {words}: {m}")
print("passed")
"""


def test_random_shapes_grids_dtypes_and_alignments(binding):
    passes(binding("block_sensitivity"), RANDOM)
