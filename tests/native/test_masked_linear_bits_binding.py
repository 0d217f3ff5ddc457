"""The binding of the bit kernel, run without a GPU: built for the CPU machine, registered for CPU tensors in a process
of its own, it must answer through the dispatcher as the reference does, and refuse what does not fit."""

from .bindings import passes

PROGRAM = """
import torch
import torch.nn.functional as F
from sensibert.ops.masked_linear.bits import pack, reference
from tests.native.through_binding import refused
op = torch.ops.sensibert.masked_linear_bits
torch.manual_seed(0)
kept = torch.rand(72, 136) < 0.5
bits, bias = pack(kept), torch.randn(72)
for dtype in (torch.bfloat16, torch.float16):
    x, w, b = torch.randn(2, 7, 144).to(dtype), torch.randn(72, 136).to(dtype), bias.to(dtype)
    x = x[..., :136]  # rows with gaps
    want = reference(x.float(), w.float(), b.float(), bits, False)
    w = w.masked_fill(~kept, float("nan"))
    got = op(x, w, b, bits, False)
    assert got.dtype == dtype and got.shape == (2, 7, 72)
    torch.testing.assert_close(got.float(), want, atol=1e-2, rtol=1e-2)
    assert torch.equal(op(x, w.T.contiguous(), b, bits, True), got)
    assert torch.equal(op(x, F.pad(w, (0, 3))[:, :-3], b, bits.contiguous(), False), got)  # copied to aligned rows
    torch.testing.assert_close(op(x, w, None, bits, False) + b, got, atol=0.1, rtol=1e-2)
assert op(x[:, :0], w, b, bits, False).shape == (2, 0, 72)
torch.library.opcheck(op.default, (x, w.nan_to_num(), b, bits, False))

refused("x and weight must both be bfloat16, or both float16", op, x.float(), w, b, bits, False)
refused("x has 128 columns, want 136 as weight", op, x[..., :128], w, b, bits, False)
refused("weight is for 136 -> 70 features, want multiples of 8", op, x, w[:70], b[:70], bits[:70], False)
refused("bits are not uint8 (72, 17)", op, x, w, b, bits[:, :16], False)
refused("bits are not uint8 (72, 17)", op, x, w, b, bits.bool(), False)
refused("bits are not uint8 (72, 17)", op, x, w.T.contiguous(), b, pack(kept.T), True)
refused("bias does not fit weight", op, x, w, b[:64], bits, False)
print("passed")
"""


def test_the_binding_agrees_with_the_reference_and_refuses_what_does_not_fit(binding):
    passes(binding("masked_linear_bits"), PROGRAM)
