"""Removal costs against a search that solves every step anew, layers together and alone, and how much is launched."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sensibert.sensitivity.kfac_obs import FisherFactors, compensate_weights, inner
from sensibert.sensitivity.removal import DAMP, STEP_UP, Consumer, predicted_curves, removal_costs


def problem(units, span, height=5, seed=0, rank=5):
    """A weight, its factors over 200 random tokens with correlated inputs, and the columns of each unit.

    rank: of the gradients at the output; less than height makes their second factors singular."""
    generator = torch.Generator().manual_seed(seed)
    width = units * span
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    h = torch.randn(200, width, generator=generator, dtype=torch.float64) @ mix + 1
    delta = torch.randn(200, height, generator=generator, dtype=torch.float64)
    delta[:, rank:] = delta[:, :rank].sum(-1, keepdim=True)
    factors = FisherFactors(width, height, torch.device("cpu"), torch.float64, units)
    factors.add(h, delta)
    weight = torch.randn(height, width, generator=generator, dtype=torch.float64)
    return weight, factors, torch.arange(width).view(units, span)


def rise(weight, covariance, output, gone):
    """1/2 tr(G dW C dW^T) of the best dW that clears the columns `gone`: a plain least-squares solution."""
    stay = torch.ones(weight.shape[1], dtype=torch.bool)
    stay[gone] = False
    change = torch.zeros_like(weight)
    change[:, gone] = -weight[:, gone]
    if stay.any():
        change[:, stay] = torch.linalg.solve(covariance[stay][:, stay], covariance[stay][:, gone] @ weight[:, gone].T).T
    return 0.5 * float(torch.trace(output @ change @ covariance @ change.T))


@pytest.mark.parametrize(("units", "span"), [(7, 1), (4, 3)], ids=["neurons", "heads"])
@pytest.mark.parametrize("bias", [None, torch.zeros(5, dtype=torch.float64)], ids=["no-bias", "bias"])
@pytest.mark.parametrize("rank", [5, 3, 1])
def test_costs_are_those_of_a_greedy_search_that_solves_each_step_anew(units, span, bias, rank):
    weight, factors, columns = problem(units, span, rank=rank)
    covariance = centred(factors, bias)
    output = factors.output / factors.weight
    gone, before, floor, want = [], 0.0, 0.0, torch.zeros(units, dtype=torch.float64)
    while len(gone) < units:
        after = {
            unit: rise(weight, covariance, output, columns[[*gone, unit]].flatten())
            for unit in range(units)
            if unit not in gone
        }
        unit = min(after, key=after.get)
        floor = max(after[unit] - before, floor * STEP_UP)
        want[unit], before = floor, after[unit]
        gone.append(unit)
    torch.testing.assert_close(costs_of(weight, factors, bias, columns), want, rtol=1e-9, atol=0)


def test_of_two_units_that_do_the_same_one_is_free_and_the_other_dear(monkeypatch):
    monkeypatch.setattr("sensibert.sensitivity.removal.DAMP", 1e-9)
    weight, factors, columns = problem(6, 1)
    twin = FisherFactors(7, 5, torch.device("cpu"), torch.float64)
    pick = torch.tensor([0, 1, 2, 3, 4, 5, 5])
    twin.weight, twin.output = factors.weight, factors.output
    twin.first, twin.second = factors.first[pick], factors.second[pick][:, pick]
    costs = costs_of(weight[:, pick], twin, None, torch.arange(7)[:, None])
    assert costs[5:].min() < 0.02 * costs[:5].min()
    assert costs[5:].max() > 0.5 * costs_of(weight, factors, None, columns)[5]


def test_rounds_of_many_choose_nearly_as_well_as_one_at_a_time(monkeypatch):
    weight, factors, columns = problem(96, 1)
    covariance = centred(factors, None)
    rounds = costs_of(weight, factors, None, columns)
    monkeypatch.setattr("sensibert.sensitivity.removal.ROUND", 10**6)
    singly = costs_of(weight, factors, None, columns)
    half = [rise(weight, covariance, factors.output / factors.weight, c.argsort()[:48]) for c in (rounds, singly)]
    chance = rise(weight, covariance, factors.output / factors.weight, torch.arange(48))
    assert half[0] < 1.1 * half[1] < 0.5 * chance
    assert len(rounds.float().unique()) == 96  # a threshold takes any number


def test_an_output_that_the_loss_does_not_see_costs_nothing():
    weight, _, columns = problem(4, 1)
    unseen = FisherFactors(4, 5, torch.device("cpu"), units=4)
    costs = costs_of(weight, unseen, None, columns)
    assert not costs.any()
    assert predicted_curves([Consumer(weight, None, unseen, columns)], [costs]) == [[(0, 0.0), (4, 0.0)]]


@pytest.mark.parametrize("bias", [True, False])
def test_a_curve_is_the_slope_along_the_change_of_the_weights_and_the_costs(bias):
    """y = W h + b with the loss sum(v . y): the slope of a change is what the loss changes by."""
    weight, factors, columns = problem(6, 2)
    h, slope = torch.randn(50, 12, dtype=torch.float64), torch.randn(50, 5, dtype=torch.float64)
    factors.add(h, torch.zeros(50, 5), slope)
    factors.samples, factors.gates = 10, torch.arange(6.0)
    linear = torch.nn.Linear(12, 5, bias=bias, dtype=torch.float64).requires_grad_(False)
    linear.weight.copy_(weight)
    costs = costs_of(linear.weight, factors, linear.bias, columns)
    (curve,), before = (
        predicted_curves([Consumer(linear.weight, linear.bias, factors, columns)], [costs]),
        (slope * linear(h)).sum(),
    )
    assert [gone for gone, _ in curve] == [0, 1, 3, 4, 6] and curve[0] == (0, 0.0)
    for gone, rise in curve[1:]:
        changed, order = copy.deepcopy(linear), costs.argsort()
        kept = columns[order[gone:]].flatten().sort().values
        compensate_weights(changed, factors, kept)
        clear = torch.ones(12, dtype=torch.bool)
        clear[kept] = False
        changed.weight[:, clear] = 0
        expected = (slope * changed(h)).sum() - before
        expected += costs[order[:gone]].sum() + 0.5 * factors.gates[order[:gone]].sum()
        assert rise == pytest.approx(float(expected) / 10)


def costs_of(*consumer):
    (costs,) = removal_costs([Consumer(consumer[0], consumer[2], consumer[1], consumer[3])])
    return costs


def centred(factors, bias):
    return inner([factors], bias is not None, DAMP)[1][0]


def made(*arguments, **options):
    weight, factors, columns = problem(*arguments, **options)
    factors.samples = 200
    return Consumer(weight, None, factors, columns)


@pytest.mark.parametrize("most", [10**9, 1, 200], ids=["together", "alone", "by two"])
def test_layers_are_solved_together_as_they_are_alone(most, monkeypatch):
    consumers = [made(7, 1, seed=1), made(4, 3), made(7, 1, seed=2), made(9, 1), made(7, 1, seed=3)]
    alone = [removal_costs([consumer])[0] for consumer in consumers]
    curves = [predicted_curves([consumer], [costs])[0] for consumer, costs in zip(consumers, alone, strict=True)]
    monkeypatch.setattr("sensibert.sensitivity.removal.MOST", most)
    together = removal_costs(consumers)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    for ours, theirs in zip(predicted_curves(consumers, together), curves, strict=True):
        assert [gone for gone, _ in ours] == [gone for gone, _ in theirs]
        assert [rise for _, rise in ours] == pytest.approx([rise for _, rise in theirs], rel=1e-9)


def test_inputs_that_never_change_and_layers_without_units_are_no_error():
    still = FisherFactors(4, 5, torch.device("cpu"))
    still.add(torch.ones(9, 4), torch.randn(9, 5))
    still.samples = 9
    costs = costs_of(torch.randn(5, 4), still, torch.zeros(5), torch.arange(4)[:, None])
    assert costs.isfinite().all()
    none = FisherFactors(0, 5, torch.device("cpu"))
    none.add(torch.ones(9, 0), torch.randn(9, 5))
    empty = Consumer(torch.zeros(5, 0), None, none, torch.zeros(0, 1, dtype=torch.long))
    for consumers in ([empty], [empty, empty]):
        costs = removal_costs(consumers)
        assert all(cost.shape == (0,) for cost in costs)
        assert predicted_curves(consumers, costs) == [[(0, 0.0)]] * len(consumers)


def test_inputs_that_hardly_vary_are_scored_by_what_is_more_than_rounding():
    """In fp32 their covariance has negative eigenvalues, and its inverse has no meaning."""
    generator = torch.Generator().manual_seed(0)
    h = 1 + 1e-5 * torch.randn(400, 32, generator=generator)
    factors = FisherFactors(32, 5, torch.device("cpu"), units=32)
    for batch in h.split(50):
        factors.add(batch, torch.randn(50, 5, generator=generator))
    weight = torch.randn(5, 32, generator=generator)
    weight[:, 7] = 0
    covariance = inner([factors], True, DAMP)[1][0]
    assert torch.linalg.eigvalsh(covariance).min() < 0
    costs = costs_of(weight, factors, torch.zeros(5), torch.arange(32)[:, None])
    assert costs.isfinite().all() and costs.argmin() == 7 and (costs >= 0).all()
    norms = weight.double().square().sum(0)
    assert torch.corrcoef(torch.stack([costs, norms]))[0, 1] > 0.8


class Counting(TorchDispatchMode):
    """Counts the calls that launch something, and those that read a number."""

    def __init__(self):
        super().__init__()
        self.launched = self.read = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.launched += not func.is_view
        self.read += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [1, 2])
def test_an_analysis_launches_little_and_the_same_for_any_number_of_layers(layers):
    """The sizes of MiniLM-L6, but for its 384 outputs, which change nothing here: 12 heads of 32, 1,536 neurons."""
    consumers = [made(units, span, height=4, rank=4) for units, span in ((12, 32), (1536, 1)) for _ in range(layers)]
    with Counting() as counted:
        predicted_curves(consumers, removal_costs(consumers))
    assert counted.launched <= 2000 and counted.read <= 4
