"""The binding of the dW kernel, run without a GPU: built for the CPU machine, registered for CPU tensors in a process
of its own, it must answer through the dispatcher as the reference does, and refuse what would read out of bounds."""

from .bindings import passes

PROGRAM = """
import torch
from sensibert.core.grid import Grid
from sensibert.ops.masked_linear.dweight import block_list, reference
from tests.native.through_binding import refused
op = torch.ops.sensibert.masked_linear_tiles_dweight
torch.manual_seed(0)
grid = Grid.block(64, 64)
keep = torch.rand(2, 3) < 0.6
keep[0] = torch.tensor([True, False, True])
blocks = block_list(keep, grid, 72, 136)
for dtype in (torch.bfloat16, torch.float16):
    dy, x = torch.randn(2, 35, 72).to(dtype), torch.randn(2, 35, 144).to(dtype)[..., :136]  # rows with gaps
    want = reference(dy.double(), x.double(), *blocks).float()
    got = op(dy, x, *blocks)
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=1e-2)
    assert got.dtype == dtype and not got[~grid.expand(keep, 72, 136)].any()
    torch.testing.assert_close(op(dy.flatten(0, 1).T.contiguous().T, x, *blocks), got)
many = torch.randn(1600, 72).bfloat16(), torch.randn(1600, 136).bfloat16()  # several chunks
torch.testing.assert_close(op(*many, *blocks), reference(*many, *blocks), atol=0.5, rtol=2e-2)
assert not op(dy[:, :0], x[:, :0], *blocks).any()
assert op(dy[..., :0], x, *block_list(keep[:0], grid, 0, 136)).shape == (0, 136)
torch.library.opcheck(op.default, (dy, x, *blocks))

refused("dy and x must both be bfloat16, or both float16", op, dy.float(), x, *blocks)
refused("want multiples of 8", op, dy[..., :70], x, *blocks)
refused("dy has 35 rows, want 70 as x", op, dy[0], x, *blocks)
refused("tiles is not [.., 13]", op, dy, x, blocks.tiles[:, :12], blocks.dropped)
refused("dropped is not contiguous int32", op, dy, x, blocks.tiles, blocks.dropped.long())
print("passed")
"""


def test_the_binding_agrees_with_the_reference_and_refuses_what_would_read_out_of_bounds(binding):
    passes(binding("masked_linear_dweight"), PROGRAM)
