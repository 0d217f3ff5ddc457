"""The binding of the tile kernel, run without a GPU: built for the CPU machine, registered for CPU tensors in a process
of its own, it must answer through the dispatcher as the reference does, and refuse what would read out of bounds."""

from .bindings import passes

PROGRAM = """
import torch
from sensibert.core.grid import Grid
from sensibert.ops.masked_linear.tiles import column_tile_list, reference, tile_list
from tests.native.through_binding import refused
op = torch.ops.sensibert.masked_linear_tiles
torch.manual_seed(0)
grid = Grid.block(64, 64)
keep = torch.tensor([[True, False, True], [False, True, True]])
rows, columns = tile_list(keep, grid, 72, 136), column_tile_list(keep, grid, 72, 136)
near = dict(atol=3e-2, rtol=2e-2)
for dtype in (torch.bfloat16, torch.float16):
    x, weight, bias, dy = (torch.randn(s).to(dtype) for s in ((2, 35, 144), (72, 136), (72,), (2, 35, 72)))
    x, weight = x[..., :136], weight / 10  # rows with gaps
    torch.testing.assert_close(op(x, weight, bias, *rows, False), reference(x, weight, bias, *rows, False), **near)
    other = op(dy, weight.T.contiguous().T, None, *columns, True)
    torch.testing.assert_close(other, reference(dy, weight, None, *columns, True), **near)
assert op(x[:, :0], weight, None, *rows, False).shape == (2, 0, 72)
torch.library.opcheck(op.default, (x, weight, bias, *rows, False))

refused("x and weight must both be bfloat16, or both float16", op, x.float(), weight, bias, *rows, False)
refused("tile_cols is 128, want 192 or 256", op, x, weight, bias, *rows[:3], 128, False)
refused("x has 72 columns, want 136", op, dy, weight, bias, *rows, False)
refused("bias does not fit weight", op, x, weight, bias[1:], *rows, False)
refused("offsets and order are not those of 1 tiles", op, x, weight, bias, rows[0][1:], *rows[1:], False)
refused("entries is not contiguous int32", op, x, weight, bias, rows[0], rows[1].long(), *rows[2:], False)
print("passed")
"""


def test_the_binding_agrees_with_the_reference_and_refuses_what_would_read_out_of_bounds(binding):
    passes(binding("masked_linear_tiles"), PROGRAM)
