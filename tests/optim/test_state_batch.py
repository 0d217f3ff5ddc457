"""take_kept: many tensors in one launch, others one by one, all as index_select copies them."""

import pytest
import torch

from sensibert.optim.state import take_kept

ROWS, COLS = torch.tensor([4, 0, 1]), torch.tensor([3, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int8])
def test_every_shape_and_dtype_is_taken(dtype):
    matrix, vector, deep = (torch.randn(*shape).to(dtype) for shape in ((6, 4), (6,), (6, 4, 3)))
    requests = [
        (matrix, {0: ROWS, 1: COLS}),
        (matrix.T, {1: ROWS}),  # not contiguous
        (matrix, {}),
        (vector, {0: ROWS}),
        (vector, {0: torch.tensor([], dtype=torch.int64)}),
        (deep, {0: ROWS, 2: torch.tensor([2])}),
    ]
    expected = [matrix[ROWS][:, COLS], matrix.T[:, ROWS], matrix, vector[ROWS], vector[:0], deep[ROWS][:, :, [2]]]
    for actual, want in zip(take_kept(requests), expected, strict=True):
        assert actual.dtype == dtype and torch.equal(actual, want)


def test_mixed_dtypes_and_nan_survive_as_they_are():
    first, second = torch.full((6, 4), torch.nan), torch.full((6,), -torch.inf, dtype=torch.bfloat16)
    actual = take_kept([(first, {1: COLS}), (second, {0: ROWS})])
    assert actual[0].isnan().all() and actual[0].shape == (6, 2)
    assert actual[1].dtype == torch.bfloat16 and actual[1].isneginf().all()


def test_a_position_outside_its_axis_is_an_error():
    with pytest.raises(IndexError):
        take_kept([(torch.randn(6, 4), {0: torch.tensor([6])})])
