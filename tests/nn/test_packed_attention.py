"""Attention within packed rows: values and gradients of plain attention row by row, whatever the lengths."""

import pytest
import torch

from sensibert.nn.packed_attention import LINE, Packing, packed_attention
from tests.helpers import assert_no_worse

LENGTHS = [
    pytest.param([1], id="one token"),
    pytest.param([5, 3, 2, 1], id="short"),
    pytest.param([LINE, LINE - 1, 30, 30, 5], id="full lines"),
    pytest.param([130, 90, LINE + 1, LINE + 1], id="long"),
    pytest.param([200, 150, 66, 40, 40, 20, 1, 1], id="both"),
]


def tensors(lengths, dtype=torch.float64, heads=3, rest=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = sum(lengths) + rest, heads, 4
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for _ in range(3)]


def row_by_row(q, k, v, lengths, scale, window=None):
    """Plain attention of each row; zeros for the padding."""
    out, begin = [], 0
    for n in lengths:
        rows = [x[begin : begin + n].transpose(0, 1) for x in (q, k, v)]
        scores = scale * rows[0] @ rows[1].transpose(1, 2)
        if window is not None:
            place = torch.arange(n)
            scores = scores.masked_fill((place[:, None] - place).abs() >= window, -torch.inf)
        out.append((scores.softmax(-1) @ rows[2]).transpose(0, 1))
        begin += n
    return torch.cat([*out, torch.zeros_like(q[begin:])])


@pytest.mark.parametrize("window", [None, 4], ids=["whole", "window"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_values_and_gradients(lengths, window):
    inputs = tensors(lengths)
    packing = Packing.of(lengths, len(inputs[0]))
    ours, plain = packed_attention(*inputs, packing, 0.5, window=window), row_by_row(*inputs, lengths, 0.5, window)
    assert torch.allclose(ours, plain, atol=1e-12)
    weight = torch.randn(ours.shape, dtype=torch.float64)
    for mine, theirs in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, plain)), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_error_is_that_of_plain_attention(dtype):
    lengths = [150, 70, 40, 20, 3]
    exact = [x.detach().to(dtype).double() for x in tensors(lengths)]
    packing = Packing.of(lengths, len(exact[0]))
    low = [x.to(dtype) for x in exact]
    ours, plain = packed_attention(*low, packing, 0.5), row_by_row(*low, lengths, 0.5)
    assert_no_worse(ours, plain, row_by_row(*exact, lengths, 0.5))


def test_gradients_by_finite_differences_also_with_dropout():
    lengths = [6, 3]
    packing = Packing.of(lengths, 11)

    def function(q, k, v):
        torch.manual_seed(0)
        return packed_attention(q, k, v, packing, 0.5, p=0.4)

    assert torch.autograd.gradcheck(function, tensors(lengths, rest=2))


def test_dropout_keeps_the_mean():
    lengths, total = [70, 30, 30], 0
    inputs = [x.detach() for x in tensors(lengths, rest=0)]
    packing = Packing.of(lengths, 130)
    torch.manual_seed(0)
    for _ in range(400):
        total = total + packed_attention(*inputs, packing, 0.5, p=0.3)
    assert float((total / 400 - packed_attention(*inputs, packing, 0.5)).abs().mean()) < 0.02


def test_a_row_does_not_see_the_others_nor_the_padding():
    lengths = [80, 30, 20, 2]
    q, k, v = (x.detach() for x in tensors(lengths))
    packing = Packing.of(lengths, len(q))
    before = packed_attention(q, k, v, packing, 0.5)
    for x in (q, k, v):
        x[80:110] += 1  # the second row
        x[132:] += 7  # the padding
    after = packed_attention(q, k, v, packing, 0.5)
    same = (before == after).flatten(1).all(1)
    assert bool(same[:80].all()) and bool(same[110:].all()) and not bool(same[80:110].any())
    assert bool((after[132:] == 0).all())


def test_a_layer_without_heads():
    q, k, v = tensors([4, 2], heads=0)
    assert packed_attention(q, k, v, Packing.of([4, 2], len(q)), 0.5).shape == q.shape
