"""What it costs to remove units one by one while the remaining ones compensate, under the factors of `kfac_obs`.

Layers of the same sizes are solved together, in batched linear algebra, and almost nothing is read from the device
until all of it is done: an analysis of an untrimmed model launches as much for twelve layers as for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .kfac_obs import DAMP, DAMP_WEIGHTS, FisherFactors, inner

# Each round removes one in ROUND of the remaining units, and no fewer than one in LAST of all: the most valuable ones
# need no order of their own. With rounds half as large or twice as large, accuracy right after the cut is the same:
# 72.2 to 72.8 % at 50 % and 68.9 to 69.2 % at 30 % (banking77).
ROUND, LAST = 16, 256
COMPACT = 0.75  # once no more than this share of the columns is left, the others are dropped
POINTS = 4  # of a predicted curve, without its origin; each needs a least-squares solution
STEP_UP = 1 + 1e-6  # units removed later have larger scores, in fp32 too
MOST = 2**27  # elements of the matrices C [K, K] that are solved together: 1 GiB in fp64

Curve = list[tuple[int, float]]
R = TypeVar("R")


class Consumer(NamedTuple):
    """A consuming layer y = W h + b: weight [N, K], bias, factors, and the columns of each unit [units, span]."""

    weight: Tensor
    bias: Tensor | None
    factors: FisherFactors
    columns: Tensor


def _groups(consumers: Sequence[Consumer]) -> Iterator[list[int]]:
    """The positions of consumers of the same sizes, as many as are solved together."""
    alike: dict[tuple, list[int]] = {}
    for number, each in enumerate(consumers):
        key = each.weight.shape, each.columns.shape, each.weight.device, each.bias is None
        alike.setdefault(key, []).append(number)
    for (shape, *_), numbers in alike.items():
        size = max(1, MOST // max(1, shape[1] ** 2))
        yield from (numbers[begin : begin + size] for begin in range(0, len(numbers), size))


def _in_order(consumers: Sequence[Consumer], solve: Callable[[list[int]], Iterable[R]]) -> list[R]:
    """Solve group by group; return the results in the order of the consumers."""
    results: dict[int, R] = {}
    for numbers in _groups(consumers):
        results |= zip(numbers, solve(numbers), strict=True)
    return [results[number] for number in range(len(consumers))]


@torch.no_grad()
def removal_costs(consumers: Sequence[Consumer]) -> list[Tensor]:
    """Rise of the summed loss as units are removed one by one, the lowest cost first: fp64 [units] for each consumer.

    Units are removed in rounds. After each round the remaining units compensate, so those that replace removed ones get
    a higher cost. Costs never decrease in the order of removal (a lower cost is raised to that of the unit before), so
    a threshold on costs respects that order. They are 0 where the loss does not depend on the output."""

    def solve(numbers: list[int]) -> Iterable[Tensor]:
        group = [consumers[number] for number in numbers]
        rises, order = _removals(group)
        growth = STEP_UP ** torch.arange(rises.shape[1], dtype=rises.dtype, device=rises.device)
        costs = growth * (rises / growth).cummax(1).values if rises.numel() else rises
        seen = torch.stack([each.factors.weight > 0 for each in group])
        return torch.where(seen[:, None], torch.zeros_like(costs).scatter_(1, order, costs), 0)

    return _in_order(consumers, solve)


def _removals(group: list[Consumer]) -> tuple[Tensor, Tensor]:
    """(rise of the loss with each removal, number of the unit removed), in the order of removal, [L, units] for L
    consumers of the same sizes."""
    units, span = group[0].columns.shape
    device = group[0].weight.device
    columns = torch.stack([each.columns.flatten() for each in group]).to(device)
    covariance = inner([each.factors for each in group], group[0].bias is not None, DAMP)[1]
    # C is factored in fp64. The rest is in fp32 for weights of that precision: it chooses the same units.
    working = torch.promote_types(group[0].weight.dtype, torch.float32)
    inverse = _inverse(covariance, group, working)
    weight = torch.stack([each.weight for each in group]).double()
    output = torch.stack([each.factors.output.double() / each.factors.weight for each in group])
    # H and (R W)^T, with R^T R = G, side by side [L, K, K + N]: a removal changes both in the same way. In R W the
    # errors of rounding stay small where W^T G W is a small difference of large numbers.
    state = _kept(torch.cat([inverse, (_root(output) @ weight).mT.to(working)], 2), columns)
    numbers = torch.arange(units, device=device).expand(len(group), -1)
    gone = torch.zeros_like(numbers, dtype=torch.bool)
    rises: list[Tensor] = []
    removed: list[Tensor] = []  # positions among the current columns
    order, left = [], units
    while left:
        if left <= COMPACT * numbers.shape[1]:
            order.append(numbers.gather(1, torch.cat(removed, 1)))
            kept = gone.to(torch.int8).argsort(dim=1, stable=True)[:, :left]
            state = _kept(state, _positions(kept, span))
            numbers, gone, removed = numbers.gather(1, kept), torch.zeros_like(kept, dtype=torch.bool), []
        rise = _rise(state, span).masked_fill_(gone, torch.inf)
        size = min(left, max(1, left // ROUND, units // LAST))
        values, chosen = (part[:, :size] for part in rise.sort(dim=1, stable=True))
        rises.append(values)
        removed.append(chosen)
        left -= size
        if left:
            gone.scatter_(1, chosen, True)
            positions = _positions(chosen, span)
            lost = _rows(state, positions)  # H_D: and (R W_D)^T
            share = torch.linalg.solve_ex(_last(lost, positions), lost).result
            state.baddbmm_(lost[:, :, : state.shape[1]].mT, share, alpha=-1)
    if not rises:
        return weight.new_zeros(len(group), 0), numbers
    order.append(numbers.gather(1, torch.cat(removed, 1)))
    return torch.cat(rises, 1).double().clamp_min(0).mul_(0.5), torch.cat(order, 1)


def _rise(state: Tensor, span: int) -> Tensor:
    """tr(R W_u (H_uu)^-1 W_u^T R^T) of every unit u, [L, units]; anything for those that were removed."""
    width = state.shape[1]
    inverse, weight = state[:, :, :width], state[:, :, width:]
    if span == 1:
        return weight.square().sum(2) / inverse.diagonal(dim1=1, dim2=2)
    count = width // span
    blocks = inverse.unflatten(1, (count, span)).unflatten(3, (count, span)).diagonal(dim1=1, dim2=3)
    weight = weight.unflatten(1, (count, span))  # [L, units, span, N]
    return (torch.linalg.solve_ex(blocks.permute(0, 3, 1, 2), weight).result * weight).sum((2, 3))


def _kept(state: Tensor, columns: Tensor) -> Tensor:
    """The rows [L, k] of a state [L, K, K + N], and of its first K columns the same."""
    rows = _rows(state, columns)
    width = state.shape[1]
    return torch.cat([_last(rows[:, :, :width], columns), rows[:, :, width:]], 2)


def _positions(units: Tensor, span: int) -> Tensor:
    """The columns of units [L, n] whose columns stand one after the other, [L, n * span]."""
    return units if span == 1 else (units[:, :, None] * span + torch.arange(span, device=units.device)).flatten(1)


def _rows(matrix: Tensor, positions: Tensor) -> Tensor:
    """Rows of matrices [L, N, K] at positions [L, n]. On a CPU faster than gather."""
    layers, height, width = matrix.shape
    if layers > 1:
        positions = positions + torch.arange(layers, device=matrix.device)[:, None] * height
    return matrix.flatten(0, 1).index_select(0, positions.flatten()).view(layers, positions.shape[1], width)


def _last(matrix: Tensor, positions: Tensor) -> Tensor:
    """Columns of matrices [L, N, K] at positions [L, n]."""
    return matrix.gather(2, positions[:, None].expand(-1, matrix.shape[1], -1))


def _root(gram: Tensor) -> Tensor:
    """Matrices R with R^T R = gram, for symmetric positive semidefinite ones [L, N, N]. Cholesky is ten times as fast
    as eigh."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed.any():
        return factor.mT
    finite = gram.isfinite().all((1, 2), keepdim=True)  # eigh takes no others
    spectrum, axes = torch.linalg.eigh(torch.where(finite, gram, 0))
    return spectrum.clamp_min(0).sqrt()[:, :, None] * axes.mT


def _inverse(matrix: Tensor, group: list[Consumer], dtype: torch.dtype) -> Tensor:
    """Inverses of the C [L, K, K] of a group, which are positive definite up to rounding.

    The rounding error is added to the diagonal of those that are not: C is a sum in fp32 less the square of a mean, and
    where inputs hardly vary, the difference is little else."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any():
        total = torch.stack([each.factors.second.diagonal().sum() for each in group])
        rounding = torch.finfo(torch.float32).eps * total.double() * (failed > 0)
        matrix.diagonal(dim1=1, dim2=2).add_(rounding[:, None])
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed.any():
            return torch.linalg.inv_ex(matrix).inverse.to(dtype)
    return torch.cholesky_inverse(factor.to(dtype))


@torch.no_grad()
def predicted_curves(consumers: Sequence[Consumer], costs: Sequence[Tensor]) -> list[Curve]:
    """[(units removed, predicted rise of the mean loss)] for each consumer, at 0 and at POINTS equal steps, when units
    are removed in the order of their costs and the remaining ones compensate.

    costs: `removal_costs`. The slope needs factors collected with labels."""

    def solve(numbers: list[int]) -> Iterable[Curve]:
        group = [consumers[number] for number in numbers]
        points, rises = _predicted(group, torch.stack([costs[number] for number in numbers]))
        seen = torch.stack([each.factors.weight > 0 for each in group])
        for each, values, known in zip(group, rises.tolist(), seen.tolist(), strict=True):
            curve = zip(points, (value / each.factors.samples for value in values), strict=True)
            yield [(0, 0.0), *curve] if known else [(0, 0.0), (len(each.columns), 0.0)]

    return _in_order(consumers, solve)


def _predicted(group: list[Consumer], costs: Tensor) -> tuple[list[int], Tensor]:
    """(numbers of removed units, rise of the summed loss [L, points]) of L consumers of the same sizes."""
    units, span = group[0].columns.shape
    device = group[0].weight.device
    columns = torch.stack([each.columns for each in group]).to(device)
    mean, covariance = inner([each.factors for each in group], group[0].bias is not None, DAMP_WEIGHTS)
    working = torch.promote_types(group[0].weight.dtype, torch.float32)
    covariance, weight = covariance.to(working), torch.stack([each.weight for each in group]).to(working)
    slope = torch.stack([each.factors.slope for each in group])
    slope -= torch.stack([each.factors.bias_slope for each in group])[:, :, None] * mean.to(working)[:, None]
    gates = torch.stack([each.factors.gates for each in group])
    order = costs.to(device).argsort(dim=1, stable=True)
    alone = (costs.to(device) + 0.5 * gates).gather(1, order).cumsum(1)  # without the slope
    of_order = columns.gather(1, order[:, :, None].expand(-1, -1, span))
    points = sorted({units * point // POINTS for point in range(1, POINTS + 1)} - {0})
    rises = []
    for gone in points:
        drop, kept = (part.flatten(1).sort(1).values for part in (of_order[:, :gone], of_order[:, gone:]))
        lost, rise = _last(weight, drop), alone[:, gone - 1]
        rise = rise - (_last(slope, drop) * lost).sum((1, 2))
        if gone < units:
            rows = _rows(covariance, kept)
            share = torch.linalg.solve_ex(_last(rows, kept), _last(rows, drop)).result  # (C_SS)^-1 C_SD
            rise = rise + (_last(slope, kept) * (lost @ share.mT)).sum((1, 2))
        rises.append(rise)
    return points, torch.stack(rises, 1) if rises else costs.new_zeros(len(group), 0)
