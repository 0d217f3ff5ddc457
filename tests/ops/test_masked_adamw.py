"""The op: AdamW where nothing is masked, exact zeros where something is, the right extras in the same pass."""

import pytest
import torch

from sensibert.core.grid import Grid
from sensibert.ops import block_sensitivity, masked_adamw
from sensibert.ops.masked_adamw import _adamw_in_double, index_map, matrix_shape
from tests.helpers import DTYPES, assert_no_worse, dtype_id

SHAPES = [(5, 7), (6,), (), (0, 4), (3, 2, 3), (16, 8)]
GRIDS = [Grid.element(), Grid.row(), Grid.column(), Grid.rows(3), Grid.columns(4), Grid.block(4, 3), Grid.tensor()]
SETTINGS = {"betas": [(0.9, 0.999), (0.8, 0.95)], "eps": [1e-8, 1e-6], "weight_decay": [0.1, 0.0]}


def make_state(dtype=torch.float32, device="cpu", shapes=SHAPES):
    """Seeded params, grads, both moments as after some steps, step counts, lr and groups."""
    rng = torch.Generator().manual_seed(1)
    draw = lambda shape: torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype)  # noqa: E731
    params, grads, exp_avgs = ([draw(shape) for shape in shapes] for _ in range(3))
    exp_avg_sqs = [draw(shape).square() for shape in shapes]
    steps = [torch.tensor(float(3 + t % 2), device=device) for t in range(len(shapes))]
    groups = [t % 2 for t in range(len(shapes))]
    return params, grads, exp_avgs, exp_avg_sqs, steps, torch.tensor([1e-2, 3e-3], device=device), groups


def make_keeps(grid, params, device="cpu"):
    rng = torch.Generator().manual_seed(2)
    shapes = [grid.shape(*matrix_shape(p)) for p in params]
    return {t: ((torch.rand(s, generator=rng) < 0.6).to(device), grid) for t, s in enumerate(shapes)}


def expanded(keep, grid, like):
    return grid.expand(keep, *matrix_shape(like)).view(like.shape)


def formula(params, grads, exp_avgs, exp_avg_sqs, steps, lr, groups, betas, eps, weight_decay, factor=1.0):
    """The docstring's lines, one tensor at a time, in the dtype given."""
    results = []
    for w, g, m, v, step, i in zip(params, grads, exp_avgs, exp_avg_sqs, steps, groups):
        (beta1, beta2), rate, step = betas[i], float(lr[i]), float(step)
        g = g * factor
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        w = w * (1 - rate * weight_decay[i])
        w = w - rate * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps[i])
        results.append((w, m, v))
    return results


@pytest.mark.parametrize("factor", [None, 0.125])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_id)
def test_a_step_is_the_formula(dtype, device, factor):
    state = make_state(dtype, device)
    wide = make_state(torch.float64)
    exact_inputs = [[x.double().cpu() for x in tensors] for tensors in state[:4]]
    exact = formula(*exact_inputs, *wide[4:], **SETTINGS, factor=factor or 1.0)
    plain = formula(*state[:4], *wide[4:], **SETTINGS, factor=factor or 1.0)
    masked_adamw(*state, **SETTINGS, grad_factor=factor and torch.tensor(factor, device=device))
    for t in range(len(SHAPES)):
        for ours, theirs, truth in zip((state[0][t], state[2][t], state[3][t]), plain[t], exact[t]):
            assert_no_worse(ours.cpu(), theirs.cpu(), truth, label=f"tensor {t}")


def test_double_precision_on_a_gpu_is_the_formula_in_double_precision():
    params, grads, exp_avgs, exp_avg_sqs, steps, lr, groups = state = make_state(torch.float64)
    lr = lr.double()
    exact = formula(*state[:5], lr, groups, **SETTINGS)
    for t, (expected, i) in enumerate(zip(exact, groups)):
        ours = params[t], exp_avgs[t], exp_avg_sqs[t]
        settings = *SETTINGS["betas"][i], SETTINGS["eps"][i], SETTINGS["weight_decay"][i]
        _adamw_in_double(params[t], grads[t], *ours[1:], steps[t], lr[i], *settings)
        torch.testing.assert_close(ours, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_dropped_weights_and_moments_are_zero_and_the_rest_is_as_without_masks(grid, dtype, device):
    state, plain = make_state(dtype, device), make_state(dtype, device)
    keeps = make_keeps(grid, state[0], device)
    masked_adamw(*state, **SETTINGS, keeps=keeps)
    masked_adamw(*plain, **SETTINGS)
    for which in (0, 2, 3):
        for t, (keep, _) in keeps.items():
            expected = torch.where(expanded(keep, grid, plain[which][t]), plain[which][t], 0)
            assert torch.equal(state[which][t], expected), (which, t)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_a_dropped_element_held_does_not_matter(poison, device):
    grid = Grid.block(2, 2)
    state, clean = make_state(device=device), make_state(device=device)
    keeps = make_keeps(grid, state[0], device)
    for tensors in state[:4]:
        for t, (keep, _) in keeps.items():
            tensors[t].masked_fill_(~expanded(keep, grid, tensors[t]), poison)
    scores = [{0: (torch.zeros(5, 1, device=device), Grid.row())} for _ in range(2)]
    for tensors, score in zip((state, clean), scores):
        masked_adamw(*tensors, **SETTINGS, keeps=keeps, scores=score, reduce="grad_square")
    assert torch.equal(scores[0][0][0], scores[1][0][0])
    for which in (0, 2, 3):
        for ours, expected in zip(state[which], clean[which]):
            assert torch.equal(ours, expected)


def test_zero_eps_leaves_no_nan_in_dropped_elements():
    state = make_state()
    masked_adamw(
        *state, **{**SETTINGS, "eps": [0.0, 0.0]}, keeps={0: (torch.zeros(1, 1, dtype=torch.bool), Grid.tensor())}
    )
    assert torch.equal(state[0][0], torch.zeros(5, 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_working_copy_is_the_new_masked_weight_in_bf16(dtype, device, poisoned_empty):
    state = make_state(dtype, device)
    working_copies = {t: torch.empty(SHAPES[t], dtype=torch.bfloat16, device=device) for t in (0, 3, 5)}
    masked_adamw(*state, **SETTINGS, keeps=make_keeps(Grid.rows(2), state[0], device), working_copies=working_copies)
    for t, working_copy in working_copies.items():
        assert torch.equal(working_copy, state[0][t].bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("mapped", ["rows", "cols", "both"])
def test_a_compact_working_copy_is_what_the_maps_leave_of_the_full_one(mapped, dtype, device, poisoned_empty):
    shapes = [(35, 52), (6,), (3, 2, 3), (16, 8), (8, 16), (5, 1)]
    state = make_state(dtype, device, shapes)
    keeps, working_copies, maps, expected = make_keeps(Grid.block(3, 2), state[0], device), {}, ({}, {}), {}
    for t, param in enumerate(state[0]):
        N, K = matrix_shape(param)
        index = [torch.randperm(size, device=device)[: size - size // 3] for size in (N, K)]  # in any order
        if mapped != "cols":
            maps[0][t] = index_map(index[0], N)
        if mapped != "rows":
            maps[1][t] = index_map(index[1], K)
        n, k = len(index[0]) if t in maps[0] else N, len(index[1]) if t in maps[1] else K
        working_copies[t] = torch.empty(n, k, dtype=torch.bfloat16, device=device)
        rows = index[0] if t in maps[0] else torch.arange(N, device=device)
        expected[t] = rows, index[1] if t in maps[1] else torch.arange(K, device=device)
    masked_adamw(*state, **SETTINGS, keeps=keeps, working_copies=working_copies, row_maps=maps[0], col_maps=maps[1])
    for t, (rows, cols) in expected.items():
        full = state[0][t].view(matrix_shape(state[0][t])).bfloat16()
        assert torch.equal(working_copies[t], full[rows][:, cols]), t


def test_nothing_kept_leaves_an_empty_working_copy(device):
    state, none = make_state(device=device), torch.full((5,), -1, dtype=torch.int32, device=device)
    working_copy = torch.empty(0, 7, dtype=torch.bfloat16, device=device)
    masked_adamw(*state, **SETTINGS, working_copies={0: working_copy}, row_maps={0: none})
    assert state[0][0].isfinite().all()


@pytest.mark.parametrize(
    "reduce, finish",
    [("signed", "square"), ("signed", "abs")]
    + [(r, "none") for r in ("abs", "square", "grad_square", "weight_square")],
)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_score_is_the_sensitivity_of_survivors_before_the_step(grid, reduce, finish, device):
    state = make_state(device=device)
    keeps = make_keeps(Grid.block(3, 2), state[0], device)
    scored = [t for t, shape in enumerate(SHAPES) if len(shape) in (1, 2)]
    start = [torch.rand(grid.shape(*matrix_shape(state[0][t])), device=device) for t in scored]
    survivors = lambda tensors, t: torch.where(expanded(*keeps[t], tensors[t]), tensors[t], 0)  # noqa: E731
    expected = block_sensitivity(
        [survivors(state[0], t) for t in scored], [survivors(state[1], t) * 0.5 for t in scored],
        grid, reduce, finish, out=[s.clone() for s in start], decay=0.75, scale=2.0,
    )  # fmt: skip
    half = torch.tensor(0.5, device=device)
    scores = {t: (s, grid) for t, s in zip(scored, start)}
    extras = {"reduce": reduce, "finish": finish, "decay": 0.75, "scale": 2.0}
    masked_adamw(*state, **SETTINGS, grad_factor=half, keeps=keeps, scores=scores, **extras)
    for ours, theirs in zip(start, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_decay_of_zero_does_not_read_what_the_score_held(device):
    state = make_state(device=device)
    score = torch.full((5, 1), float("nan"), device=device)
    masked_adamw(*state, **SETTINGS, scores={0: (score, Grid.row())}, decay=0.0)
    assert score.isfinite().all()


def test_tensors_with_gaps_are_written_through(device):
    state, plain = make_state(device=device), make_state(device=device)
    for which in range(4):
        state[which][0] = state[which][0].t().contiguous().t()
    score, working_copy = (
        torch.zeros(5, 2, device=device)[:, ::2],
        torch.zeros(7, 5, dtype=torch.bfloat16, device=device).t(),
    )
    keeps = {0: (torch.rand(7, 5, device=device).t() < 0.5, Grid.element())}
    masked_adamw(*state, **SETTINGS, keeps=keeps, scores={0: (score, Grid.row())}, working_copies={0: working_copy})
    masked_adamw(*plain, **SETTINGS, keeps=keeps)
    for which in (0, 2, 3):
        assert torch.equal(state[which][0], plain[which][0])
    assert torch.equal(working_copy, plain[0][0].bfloat16()) and (score > 0).all()


def test_no_tensors_is_no_work():
    masked_adamw([], [], [], [], [], torch.tensor([0.1]), [], betas=[(0.9, 0.99)], eps=[1e-8], weight_decay=[0.0])


def op_arguments(device="cpu"):
    keep, score = torch.rand(5, 1, device=device) < 0.5, torch.zeros(1, 7, device=device)
    working_copy = torch.zeros(16, 8, dtype=torch.bfloat16, device=device)
    compact, places = torch.zeros_like(working_copy)[:2, :3].contiguous(), torch.tensor([1, 4, 6], device=device)
    maps = [index_map(places[:2], 5)], [0], [index_map(places, 7)], [0]
    settings = [0.9, 0.8], [0.999, 0.95], [1e-8, 1e-6], [0.1, 0.0], torch.tensor(0.5, device=device)
    working_copies = [working_copy, compact], [5, 0], *maps
    extras = [keep], [0], [1, 0], *working_copies, [score], [0], [0, 1], "abs", "none", 1.0, 1.0
    return *make_state(device=device), *settings, *extras


def test_registration(device):
    torch.library.opcheck(torch.ops.sensibert.masked_adamw_.default, op_arguments(device))


def test_it_compiles_without_a_graph_break():
    def step(params, grads, exp_avgs, exp_avg_sqs, keep, score, working_copy, row_map):
        state = (params, grads, exp_avgs, exp_avg_sqs, *make_fixed)
        extras = {"keeps": {0: (keep, Grid.row())}, "scores": {0: (score, Grid.column())}}
        masked_adamw(*state, **SETTINGS, **extras, working_copies={0: working_copy}, row_maps={0: row_map})

    make_fixed = make_state()[4:]
    keep, results = torch.arange(5)[:, None] % 2 == 0, []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        state, score, working_copy = make_state(), torch.zeros(1, 7), torch.zeros(3, 7, dtype=torch.bfloat16)
        run(*state[:4], keep, score, working_copy, index_map(torch.tensor([0, 2, 4]), 5))
        results.append([*state[0], *state[2], *state[3], score, working_copy])
        assert torch.equal(working_copy, state[0][0][::2].bfloat16())
    for eager, compiled in zip(*results):
        assert torch.equal(eager, compiled)


MAP, HALF = torch.zeros(5, dtype=torch.int32), torch.zeros(5, 7, dtype=torch.bfloat16)
WRONG = {
    "grads has 5 entries, want 6": lambda s, o: s[1].pop(),
    r"exp_avgs\[0\] is float32 \(5, 6\) on cpu, want float32 \(5, 7\)": lambda s, o: s[2].__setitem__(
        0, torch.zeros(5, 6)
    ),
    r"grads\[1\] is float64 \(6,\)": lambda s, o: s[1].__setitem__(1, s[1][1].double()),
    r"params\[0\] is int64": lambda s, o: s[0].__setitem__(0, torch.zeros(5, 7, dtype=torch.long)),
    r"steps\[0\] is int64": lambda s, o: s[4].__setitem__(0, torch.tensor(1)),
    r"groups\[0\] is 2, want 0 to 1": lambda s, o: s[6].__setitem__(0, 2),
    r"betas has 1 entries, lr is \(2,\): one a group": lambda s, o: o.update(betas=[(0.9, 0.99)]),
    r"keep of params\[0\] is bool \(5, 7\) on cpu, want bool \(5, 1\) on cpu \(grid row\)": lambda s, o: o.update(
        keeps={0: (torch.ones(5, 7, dtype=torch.bool), Grid.row())}
    ),
    r"score of params\[0\] is float64 \(5, 1\)": lambda s, o: o.update(
        scores={0: (torch.zeros(5, 1).double(), Grid.row())}
    ),
    r"keep is for params\[9\], of 6": lambda s, o: o.update(
        keeps={9: (torch.ones(1, 1, dtype=torch.bool), Grid.tensor())}
    ),
    r"working_copy\[0\] is float32": lambda s, o: o.update(working_copies={0: torch.zeros(5, 7)}),
    r"row_map is for params\[0\], which has no working_copy": lambda s, o: o.update(row_maps={0: MAP}),
    r"row_map of params\[0\] is int32 \(6,\) on cpu, want int32 \(5,\)": lambda s, o: o.update(
        working_copies={0: HALF}, row_maps={0: torch.zeros(6, dtype=torch.int32)}
    ),
    r"col_map of params\[0\] is int64 \(7,\)": lambda s, o: o.update(
        working_copies={0: HALF}, col_maps={0: torch.zeros(7).long()}
    ),
    r"working_copy\[0\] is bfloat16 \(2, 3\) on cpu, want bfloat16 \(2, 7\)": lambda s, o: o.update(
        working_copies={0: HALF[:2, :3]}, row_maps={0: MAP}
    ),
    r"working_copy\[0\] is bfloat16 \(10, 7\) on cpu, want bfloat16 \(5, 7\)": lambda s, o: o.update(
        working_copies={0: HALF.repeat(2, 1)}, row_maps={0: MAP}
    ),
    "grad_factor is float64": lambda s, o: o.update(grad_factor=torch.tensor(1.0).double()),
    "reduce, finish are 'sum', 'none'": lambda s, o: o.update(reduce="sum"),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message):
    state, options = list(make_state()), dict(SETTINGS)
    WRONG[message](state, options)
    with pytest.raises(ValueError, match=f"masked_adamw: .*{message}"):
        masked_adamw(*state, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_whole_model_on_the_gpu_matches_fused_adamw_and_repeats_bit_for_bit():
    shapes = [(30522, 768), (512, 768), (768,), *[(768, 768), (768,), (3072, 768), (3072,), (768, 3072)] * 12]
    lr, groups = torch.tensor([1e-3], device="cuda"), [0] * len(shapes)
    settings = {"betas": [(0.9, 0.999)], "eps": [1e-8], "weight_decay": [0.01]}
    outcomes = []
    for _ in range(2):
        params, grads, exp_avgs, exp_avg_sqs, steps, _, _ = make_state(device="cuda", shapes=shapes)
        scores = {t: (torch.zeros(Grid.column().shape(*matrix_shape(p)), device="cuda"), Grid.column())
                  for t, p in enumerate(params)}  # fmt: skip
        masked_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, lr, groups, **settings, scores=scores)
        outcomes.append([*params, *exp_avgs, *exp_avg_sqs, *(score for score, _ in scores.values())])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))
    theirs = make_state(device="cuda", shapes=shapes)
    torch._fused_adamw_(*theirs[:4], [], theirs[4], lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8,
                        amsgrad=False, maximize=False)  # fmt: skip
    for ours, other in zip(outcomes[0], [*theirs[0], *theirs[2], *theirs[3]]):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)  # where v is tiny a step is of size 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_more_elements_than_32_bits_count():
    size = 2**31 + 4099
    state = [[torch.full((size,), value, dtype=torch.bfloat16, device="cuda")] for value in (1.0, 0.5, 0.0, 0.0)]
    step, lr = torch.tensor(1.0, device="cuda"), torch.tensor([0.25], device="cuda")
    masked_adamw(*state, [step], lr, [0], betas=[(0.9, 0.99)], eps=[0.0], weight_decay=[0.0])
    assert (state[0][0] == 0.75).all()
