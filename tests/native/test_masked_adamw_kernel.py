"""The CUDA source of masked_adamw, run on the CPU: against float64, sanitized, the same bits in any order."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sensibert.core.grid import Grid
from sensibert.ops.masked_adamw import index_map
from tests.helpers import DTYPES, assert_no_worse, dtype_id

from .runner import BUILDS, KernelFailed

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
REDUCES = ("signed", "abs", "square", "grad_square", "weight_square")
FINISHES = ("none", "square", "abs")
GROUPS = torch.tensor([[0.9, 0.999, 1e-8, 0.1], [0.0, 0.95, 1e-6, 0.0]], dtype=torch.float64)  # betas, eps, decay
LR = torch.tensor([1e-2, 3e-3])


@dataclass
class Case:
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    keep: Grid | None = None
    score: Grid | None = None
    copy: bool = False
    skip: int = 0  # elements before the first: more than 0 is misaligned
    maps: str = ""  # "r", "c", "rc": the working copy is compact along these axes
    whole: int = 1  # its rows and columns are multiples of this


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    size = case.shape[0] * case.shape[1]
    state = {name: torch.randn(size + case.skip, generator=rng) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    state["exp_avg_sq"].square_()
    state = {name: x.to(case.dtype) for name, x in state.items()} | {"step": torch.tensor([1.0 + seed])}
    bits = torch.rand(case.keep.shape(*case.shape), generator=rng) < 0.6 if case.keep else torch.empty(0)
    state["keep"] = bits.to(torch.uint8)
    compact, maps = list(case.shape), {}
    for axis, letter in enumerate("rc"):
        maps[f"{letter}_map"] = torch.empty(0, dtype=torch.int32)
        if letter in case.maps:
            size = case.shape[axis]
            kept = torch.randperm(size, generator=rng)[: (size + 1) // 2 // case.whole * case.whole]
            maps[f"{letter}_map"], compact[axis] = index_map(kept, size), len(kept)
    state["copy"] = torch.full(compact, torch.nan, dtype=torch.bfloat16) if case.copy else torch.empty(0)
    state["score"] = torch.rand(case.score.shape(*case.shape), generator=rng) if case.score else torch.empty(0)
    return state | maps


def kept_part(case: Case, state: dict[str, Tensor], full: Tensor) -> Tensor:
    """What the maps of the case leave of a tensor [N, K]."""
    for axis, letter in enumerate("rc"):
        if letter in case.maps:
            places = state[f"{letter}_map"]
            full = full.index_select(axis, places.argsort()[(places < 0).sum() :])
    return full


def launch(program, cases, states, reduce="abs", finish="none", factor=None, decay=1.0, scale=1.0, **env):
    """The states after the kernel."""
    meta = [len(cases), len(GROUPS), REDUCES.index(reduce), FINISHES.index(finish), int(factor is not None)]
    arrays = [torch.tensor(meta), GROUPS, LR, torch.tensor([factor or torch.nan, decay, scale])]
    for t, (case, state) in enumerate(zip(cases, states)):
        grids = [case.keep or Grid.tensor(), case.score or Grid.tensor()]
        blocks = [size for grid in grids for size in (grid.block_rows, grid.block_cols)]
        compact = state["copy"].shape if case.copy else case.shape
        arrays += [
            torch.tensor([*case.shape, CODES[case.dtype], t % len(GROUPS), *blocks, case.skip, *compact]),
            *state.values(),
        ]
    results = program(*arrays, **env)[4:]
    return [dict(zip(state, results[11 * t + 1 : 11 * t + 11])) for t, state in enumerate(states)]


def formula(case, state, group, dtype, reduce="abs", finish="none", factor=None, decay=1.0, scale=1.0):
    """(param, exp_avg, exp_avg_sq, score) after one step in `dtype`, in plain PyTorch."""
    w, g, m, v = (
        state[name][case.skip :].view(case.shape).to(dtype) for name in ("param", "grad", "exp_avg", "exp_avg_sq")
    )
    alive = torch.ones(case.shape, dtype=torch.bool)
    if case.keep:
        alive = case.keep.expand(state["keep"].bool(), *case.shape)
    beta1, beta2, eps, weight_decay = GROUPS[group].tolist()
    lr, step, g = float(LR[group]), float(state["step"]), g * (factor or 1.0)
    score = None
    if case.score:
        terms = {
            "signed": w * g,
            "abs": (w * g).abs(),
            "square": (w * g) ** 2,
            "grad_square": g * g,
            "weight_square": w * w,
        }
        terms = terms[reduce].masked_fill(~alive, 0)
        rows, cols = case.score.block_size(*case.shape)
        sums = torch.stack([band.sum(0) for band in terms.split(rows)])
        sums = torch.stack([band.sum(1) for band in sums.split(cols, 1)], 1)
        sums = {"none": sums, "square": sums**2, "abs": sums.abs()}[finish]
        score = decay * state["score"].to(dtype) + scale * sums if decay else scale * sums
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    w = w * (1 - lr * weight_decay)
    w = w - lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    return *(x.masked_fill(~alive, 0) for x in (w, m, v)), score


def check(program, cases, **options):
    """One launch over all cases: no worse than plain PyTorch in the same dtype, zeros and working copies exact."""
    states = [draw(case, seed) for seed, case in enumerate(cases)]
    after = launch(program, cases, states, **options)
    for t, (case, before, ours) in enumerate(zip(cases, states, after)):
        exact = formula(case, before, t % len(GROUPS), torch.float64, **options)
        plain = formula(case, before, t % len(GROUPS), case.dtype, **options)
        for name, theirs, truth in zip(("param", "exp_avg", "exp_avg_sq"), plain, exact):
            label = f"{name} of {case}"
            assert torch.equal(ours[name][: case.skip], before[name][: case.skip]), f"{label}: written before its start"
            assert_no_worse(ours[name][case.skip :].view(case.shape), theirs, truth, label=label)
            if case.keep:
                assert (ours[name][case.skip :].view(case.shape)[truth == 0] == 0).all(), label
        if case.copy:
            full = ours["param"][case.skip :].view(case.shape).bfloat16()
            assert torch.equal(ours["copy"], kept_part(case, before, full)), case
        if case.score:
            rtol = 1e-5 if case.dtype == torch.float32 else 1e-4
            largest = float(exact[3].abs().max()) if exact[3].numel() else 1.0
            torch.testing.assert_close(ours["score"].double(), exact[3], rtol=rtol, atol=1e-6 * largest, msg=str(case))
    return states, after


NAMED = [Grid.element(), Grid.row(), Grid.column(), Grid.tensor()]
GRIDS = [*NAMED, Grid.rows(5), Grid.columns(12), Grid.block(3, 6), Grid.block(64, 64), Grid.block(48, 160)]
SHAPES = [(35, 150), (2, 2100), (66, 5), (257, 1), (1, 1)]  # ragged in both axes, few rows, few columns, a vector


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_plain_tensors_of_any_shape_and_alignment(kernel, dtype):
    shapes = [*SHAPES, (0, 4), (4, 0), (64, 64)]
    cases = [Case(shape, dtype, skip=skip, copy=copy) for shape in shapes for skip, copy in ((0, True), (1, False))]
    check(kernel("masked_adamw"), cases)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_grid_masks_and_scores_at_every_shape(kernel, grid):
    cases = [Case(shape, keep=grid, score=grid) for shape in SHAPES]
    cases += [Case((35, 152), dtype, grid, Grid.block(7, 40), copy=True, skip=dtype.itemsize % 4) for dtype in DTYPES]
    check(kernel("masked_adamw"), cases, factor=0.25, decay=0.5, scale=3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("maps", ["r", "c", "rc"])
def test_a_compact_copy_at_every_shape_and_alignment(kernel, maps, dtype):
    cases = [Case(shape, dtype, copy=True, maps=maps, skip=skip) for shape in SHAPES for skip in (0, 1)]
    cases += [Case((35, 152), dtype, Grid.element(), Grid.row(), True, maps=maps)]
    cases += [Case((37, 264), dtype, Grid.row(), copy=True, maps=maps, whole=4)]  # its rows take full quads
    check(kernel("masked_adamw"), cases)


def test_an_empty_compact_copy_is_not_written(kernel):
    case = Case((5, 8), keep=Grid.tensor(), copy=True, maps="r", whole=4)
    none = {"r_map": torch.full((5,), -1, dtype=torch.int32), "copy": torch.empty(0, 8, dtype=torch.bfloat16)}
    state = draw(case, 0) | none
    (after,) = launch(kernel("masked_adamw", "asan"), [case], [state])
    assert not torch.equal(after["param"], state["param"])


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("finish", FINISHES)
def test_every_statistic(kernel, reduce, finish):
    cases = [Case((35, 150), score=grid, keep=Grid.row()) for grid in (Grid.column(), Grid.rows(16))]
    check(kernel("masked_adamw"), cases, reduce=reduce, finish=finish, decay=0.9)


def test_a_score_block_of_very_many_tiles(kernel):
    check(kernel("masked_adamw"), [Case((288, 1000), score=Grid.tensor())])


def test_more_tensors_than_one_launch_carries(kernel):
    cases = [Case((2, 3), keep=Grid.row() if t % 3 else None, score=Grid.row() if t % 2 else None) for t in range(270)]
    check(kernel("masked_adamw"), cases)


@pytest.mark.parametrize("build", [build for build in BUILDS if build != "plain"])
def test_clean_under_the_sanitizers(kernel, build):
    cases = [
        Case((35, 130), torch.float32, Grid.block(3, 6), Grid.columns(50), True),
        Case((9, 601), torch.bfloat16, Grid.element(), Grid.row(), True),
        Case((257, 1), torch.float16, Grid.rows(2), Grid.tensor(), True, skip=1),
        Case((33, 132), torch.float32, Grid.element(), Grid.tensor()),
        Case((11, 50), torch.bfloat16),
        Case((35, 132), torch.float32, Grid.row(), copy=True, maps="r", whole=4),
        Case((35, 130), torch.float16, Grid.block(4, 4), Grid.row(), copy=True, maps="rc", skip=1),
        Case((257, 1), copy=True, maps="r"),
    ]
    check(kernel("masked_adamw", build), cases, factor=0.5)


def test_the_same_bits_whatever_the_order_of_blocks_and_threads(kernel):
    cases = [Case((35, 150), keep=Grid.element(), score=grid, copy=True) for grid in GRIDS]
    cases += [Case((35, 150), keep=Grid.row(), copy=True, maps="rc")]
    states = [draw(case, seed) for seed, case in enumerate(cases)]
    forward, backward = (
        launch(kernel("masked_adamw"), cases, states, **e) for e in ({}, {"CUDA_ON_CPU_BACKWARD": "1"})
    )
    for a, b in zip(forward, backward):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("score", [Grid.row(), Grid.tensor()], ids=str)
def test_a_nan_in_a_dropped_element_goes_nowhere(kernel, score):
    case = Case((40, 132), keep=Grid.block(8, 3), score=score, copy=True)
    state = draw(case, 1)
    alive = case.keep.expand(state["keep"].bool(), *case.shape).reshape(-1)
    clean = launch(kernel("masked_adamw"), [case], [state], decay=0.0)
    for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
        state[name] = state[name].masked_fill(~alive, torch.nan)
    state["score"] = torch.full_like(state["score"], torch.nan)  # not read when decay is 0
    poisoned = launch(kernel("masked_adamw"), [case], [state], decay=0.0)
    for name in ("param", "exp_avg", "exp_avg_sq", "copy", "score"):
        assert torch.equal(clean[0][name], poisoned[0][name]), name


def test_bias_correction_is_exact_at_the_first_and_at_late_steps(kernel):
    case = Case((5, 8))
    for step in (1.0, 2.0, 1e5):
        state = draw(case, 0) | {"step": torch.tensor([step])}
        (ours,) = launch(kernel("masked_adamw"), [case], [state])
        exact = formula(case, state, 0, torch.float64)[0]
        torch.testing.assert_close(ours["param"].view(case.shape).double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_settings", [2, 100])
def test_every_tensor_may_have_its_own_group(kernel, monkeypatch, num_settings):
    groups = GROUPS[0] * torch.linspace(0.5, 1, num_settings)[:, None].double()
    monkeypatch.setattr(f"{__name__}.GROUPS", groups.repeat(200 // num_settings, 1))
    monkeypatch.setattr(f"{__name__}.LR", torch.linspace(1e-3, 1e-2, 200))
    check(kernel("masked_adamw"), [Case((1, 5))] * 200)


def test_too_many_groups_are_refused(kernel, monkeypatch):
    monkeypatch.setattr(f"{__name__}.GROUPS", GROUPS[:1].expand(1 << 16, 4))
    with pytest.raises(KernelFailed, match="launch failed with error 1"):
        launch(kernel("masked_adamw"), [Case((2, 2))], [draw(Case((2, 2)), 0)])
