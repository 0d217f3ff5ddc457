"""Dropout with masks drawn four at a time: the share, the scale, and the same mask in both passes."""

import pytest
import torch

from sensibert.nn.dropout import dropout
from tests.helpers import dtype_id

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_share_of_zeros_is_p_and_the_rest_is_scaled(dtype, p):
    torch.manual_seed(0)
    x = torch.ones(1000, 333, dtype=dtype, requires_grad=True)
    y = dropout(x, p)
    assert abs(float((y == 0).double().mean()) - p) < 0.003  # six standard deviations at p = 0.5
    assert torch.allclose(y[y != 0], torch.ones((), dtype=dtype) / (1 - p), rtol=2 * torch.finfo(dtype).eps)
    assert len(torch.unique((y == 0).double().mean(0))) > 10  # columns have masks of their own
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx == 0, y == 0) and torch.allclose(dx, y)


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(2**20, dtype=torch.bfloat16), 0.1) == 0).double()
    for lag in (1, 2, 3, 4, 8):  # masks of four elements come from one number
        assert abs(float((dropped[lag:] * dropped[:-lag]).mean()) - 0.01) < 0.001


def test_a_seed_gives_the_same_mask():
    x, masks = torch.ones(1001), []
    for _ in range(2):
        torch.manual_seed(3)
        masks.append(dropout(x, 0.3) == 0)
    assert torch.equal(*masks) and not torch.equal(masks[0], dropout(x, 0.3) == 0)


@pytest.mark.parametrize("p, training", [(0.0, True), (0.4, False)])
def test_without_dropout_the_input_comes_back(p, training):
    x = torch.randn(7, 5)
    assert torch.equal(dropout(x, p, training), x)


def test_inputs_that_are_not_contiguous_and_values_that_are_not_finite():
    x = torch.full((6, 8), torch.nan).T
    y = dropout(x, 0.5)
    assert y.shape == x.shape and bool(((y == 0) | y.isnan()).all()) and bool((y == 0).any())
